// How close gemm.h comes to this core's FMA peak, on one thread: the peak is measured first, by FMAs on registers
// alone. Where the CPU multiplies bf16, once more for that.
//
//   cmake -S . -B build/bench -DINPAINTRT_PYTHON=OFF -DINPAINTRT_BENCH=ON -DSKBUILD_PROJECT_VERSION=0
//   cmake --build build/bench && build/bench/csrc/bench/bench_gemm_avx512bf16
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "gemm.h"

namespace irt::INPAINTRT_ISA {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Best rate of `run`, in GFLOP/s, over repetitions that together take a quarter of a second.
template <class Run>
double rate(double flops, const Run& run) {
  run();
  double best = 0;
  for (const double begin = now(); now() - begin < 0.25;) {
    const double start = now();
    run();
    const double reached = flops / (now() - start) * 1e-9;
    if (reached > best) best = reached;
  }
  return best;
}

float sink;

template <class Lane>
double peak() {
  constexpr int kChains = Vec::kWidth == 16 ? 24 : 12, kSteps = 1 << 19;  // as registers allow
  return rate(2.0 * kChains * kSteps * Vec::kWidth * Lane::kChannels, [] {
    Vec sums[kChains], factor(sink * 1e-30f + 0.999f);
    for (int c = 0; c < kChains; ++c) sums[c] = Vec(sink * 1e-30f + static_cast<float>(c));  // no two chains alike
    for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 24
      for (int c = 0; c < kChains; ++c) sums[c] = Lane::multiply_add(factor, factor, sums[c]);
    }
    for (const Vec& sum : sums) {
      float lanes[Vec::kWidth];
      store(lanes, sum);
      sink += lanes[0];
    }
  });
}

template <class Lane>
double product(int64_t rows, int64_t k, int64_t columns) {
  const int64_t lanes = (k + Lane::kChannels - 1) / Lane::kChannels;
  const int64_t groups = (lanes + Vec::kWidth - 1) / Vec::kWidth,
                panels = (columns + kPanelColumns - 1) / kPanelColumns;
  const int64_t padded = rows | 1;
  const auto floats = [](int64_t n) {
    float* p = static_cast<float*>(aligned_alloc(64, static_cast<size_t>(n * 4 + 63) / 64 * 64));
    for (int64_t i = 0; i < n; ++i) p[i] = static_cast<float>(i % 7) - 3.0f;
    return p;
  };
  float *a = floats(groups * padded * Vec::kWidth), *b = floats(lanes * panels * kPanelColumns);
  float* c = floats(panels * kPanelVectors * padded * Vec::kWidth);
  const int tail = static_cast<int>(lanes - (groups - 1) * Vec::kWidth);
  const Blocks blocks = {a, padded * Vec::kWidth, static_cast<int>(groups), 1, tail};
  const double reached = rate(2.0 * static_cast<double>(rows * k * columns), [&] {
    gemm<Lane>(blocks, rows, b, static_cast<int>(panels), [&](int panel, int64_t row, int v, Vec sums) {
      store(c + ((panel * kPanelVectors + v) * padded + row) * Vec::kWidth, sums);
    });
  });
  sink += c[0];
  free(a), free(b), free(c);
  return reached;
}

template <class Lane>
void report(const char* dtype) {
  const double best = peak<Lane>();
  printf("%s: FMA peak of one core, %d lanes: %.1f GFLOP/s\n", dtype, Vec::kWidth, best);
  const struct {
    const char* what;
    int64_t rows, k, columns;
  } shapes[] = {{"mix, 512 px", 64, 384, 384},
                {"mix, 456x560 px", 57, 384, 384},
                {"mix, 256 px", 32, 384, 384},
                {"mix, 1024 px", 128, 384, 384},
                {"mix, lama_mini", 32, 96, 96},
                {"FcF, K = 48", 256, 48, 64},
                {"K = 24", 256, 24, 64},
                {"K = 180", 256, 180, 192},
                {"K = 128 (l2g tiles)", 256, 128, 384},
                {"K = 512 (to local)", 256, 512, 128}};
  for (const auto& s : shapes) {
    const double reached = product<Lane>(s.rows, s.k, s.columns);
    printf("%-22s %4lld x %4lld x %4lld  %6.1f GFLOP/s  %5.1f %% of peak\n", s.what, static_cast<long long>(s.rows),
           static_cast<long long>(s.k), static_cast<long long>(s.columns), reached, 100 * reached / best);
  }
}

}  // namespace
}  // namespace irt::INPAINTRT_ISA

int main() {
  using namespace irt::INPAINTRT_ISA;
  report<Single>("float");
  if constexpr (LaneOf<bf16>::kChannels == 2) report<LaneOf<bf16>>("bf16");
}
