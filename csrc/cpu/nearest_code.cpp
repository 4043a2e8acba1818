// nearest_code on the CPU: a matrix product whose sums become distances in registers, of which each vector keeps the
// least.
//
// The vectors x are gathered once into the blocked layout of gemm.h: those that are known first, if the codebook has
// two halves. A thread takes a run of codes, as many panels at a time as its L2 cache holds, packs them, and multiplies
// them with all vectors. At most N · W floats of minima per thread are written instead of N · K distances.
//
// The least distance of a vector is kept for every lane apart, with the number of the group of W codes it is from (as a
// float, exact up to 2^24), and lanes and threads are compared at the end, so that the result does not depend on the
// number of threads.
#include <limits>
#include <type_traits>

#include "arena.h"
#include "gemm.h"
#include "kernel.h"
#include "nearest_code_call.h"
#include "parallel.h"
#include "rows.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int64_t W = Vec::kWidth;
constexpr int64_t kPackedFloats = 1 << 16;  // of codes packed at a time: 256 KB
constexpr int64_t kMostThreads = 1 << 8;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ceiling(int64_t n, int64_t d) { return (n + d - 1) / d; }
int64_t aligned(int64_t floats) { return ceiling(floats, 16) * 16; }

// Vectors [first, first + count) of the gathered ones and the codes [begin, end) they are compared with.
struct Search {
  int64_t first, count, begin, end;
};

// visit(data): only what reads tensors is compiled for each of their types, not the product.
template <class Visit>
void with_data(const irt_view& view, const Visit& visit) {
  switch (view.dtype) {
    case IRT_F32: return visit(static_cast<const float*>(view.data));
    case IRT_BF16: return visit(static_cast<const bf16*>(view.data));
    case IRT_F16: return visit(static_cast<const f16*>(view.data));
  }
}

bool is_known(const irt_view& known, int64_t n) {
  const int64_t i = n * known.strides[0];
  bool truth = known.dtype == IRT_BOOL && static_cast<const uint8_t*>(known.data)[i] != 0;
  with_data(known, [&](auto* data) { truth = to_float(data[i]) != 0.0f; });  // NaN is not 0 either
  return truth;
}

class Codes {
 public:
  Codes(const NearestCodeCall& call, int most_threads)
      : x_(*call.x),
        codebook_(*call.codebook),
        known_(call.known),
        n_(x_.sizes[0]),
        depth_(x_.sizes[1]),
        codes_(codebook_.sizes[0]),
        split_(call.split),
        groups_(ceiling(depth_, W)),
        panel_(depth_ * kPanelColumns),
        panels_(most(1, kPackedFloats / panel_)) {
    const int64_t items = ceiling(split_, chunk()) + ceiling(codes_ - split_, chunk());
    threads_ = static_cast<int>(most(1, least(least(most_threads, kMostThreads), items)));
    tail_ = static_cast<int>(depth_ - (groups_ - 1) * W);
  }

  // Whether the sizes above and below can be computed without overflow: what cannot would take terabytes.
  static bool fits(const irt_view& x) {
    constexpr double kMost = 0x1p40;
    return static_cast<double>(x.sizes[1]) * kPanelColumns <= kMost &&
           static_cast<double>(x.sizes[0] + 1) * static_cast<double>(x.sizes[1] + W) <= kMost &&
           static_cast<double>(x.sizes[0] + 1) * 2 * W * kMostThreads <= kMost;
  }

  size_t bytes() const { return sizeof(float) * (order_floats() + x_floats() + norm_floats() + threads_ * each()); }

  void run(void* space, int64_t* out) {
    order_ = static_cast<int64_t*>(space);
    blocks_ = static_cast<float*>(space) + order_floats();
    norms_ = blocks_ + x_floats();
    scratch_ = norms_ + norm_floats();
    const int64_t known = arrange();
    parallel_for(n_, 64, threads_, [&](int64_t begin, int64_t end) { gather(begin, end); });
    const Search searches[2] = {{0, known, 0, split_}, {known, n_ - known, split_, codes_}};
    int64_t chunks[2];
    for (int half = 0; half < 2; ++half) {
      const Search& s = searches[half];
      chunks[half] = s.count ? ceiling(s.end - s.begin, chunk()) : 0;
    }
    // Threads take runs of chunks, each with minima of its own.
    const int64_t items = chunks[0] + chunks[1], share = ceiling(items, threads_);
    parallel_for(threads_, 1, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        clear(t, searches);
        for (int64_t item = t * share; item < least(items, (t + 1) * share); ++item) {
          const bool second = item >= chunks[0];
          const Search& s = searches[second];
          search(t, s, s.begin + (second ? item - chunks[0] : item) * chunk());
        }
      }
    });
    parallel_for(n_, 256, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) out[order_[i]] = winner(i);
    });
  }

 private:
  const irt_view &x_, &codebook_;
  const irt_view* known_;
  const int64_t n_, depth_, codes_, split_, groups_;
  const int64_t panel_, panels_;  // floats of a panel; panels packed at a time
  int threads_, tail_;
  int64_t* order_ = nullptr;  // the vector that is gathered to each place
  float *blocks_ = nullptr, *norms_ = nullptr, *scratch_ = nullptr;

  int64_t chunk() const { return panels_ * kPanelColumns; }  // codes
  int64_t order_floats() const { return aligned(2 * n_); }
  int64_t x_floats() const { return aligned(groups_ * n_ * W); }
  int64_t norm_floats() const { return aligned(n_); }
  // A thread's panels, the codes' norms, one block of codes, and the least distances with their groups.
  int64_t each() const { return aligned(panels_ * panel_ + chunk() + depth_ * W) + 2 * n_ * W; }
  float* own(int64_t thread) const { return scratch_ + thread * each(); }
  float* minima(int64_t thread) const { return own(thread) + each() - 2 * n_ * W; }

  // Known vectors first, both kinds in their order. Returns how many are known.
  int64_t arrange() {
    int64_t at = 0;
    for (int64_t i = 0; i < n_; ++i) {
      if (!known_ || is_known(*known_, i)) order_[at++] = i;
    }
    const int64_t known = at;
    for (int64_t i = 0; i < n_ && at < n_; ++i) {
      if (!is_known(*known_, i)) order_[at++] = i;
    }
    return known;
  }

  void gather(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Vec squares;
      with_data(x_, [&](auto* data) {
        const auto* row = data + order_[i] * x_.strides[0];
        for (int64_t g = 0; g < groups_; ++g) {
          const Vec v = Single::across(row + g * W * x_.strides[1], g + 1 < groups_ ? W : tail_, x_.strides[1]);
          store(blocks_ + (g * n_ + i) * W, v);
          squares = fma(v, v, squares);
        }
      });
      float lanes[W], sum = 0.0f;
      store(lanes, squares);
      for (const float lane : lanes) sum += lane;
      norms_[i] = sum;
    }
  }

  // A vector with no smaller distance than infinity keeps the first code of its half, in lane 0.
  void clear(int64_t thread, const Search (&searches)[2]) const {
    float* best = minima(thread);
    for (const Search& s : searches) {
      for (int64_t i = s.first; i < s.first + s.count; ++i) {
        store(best + 2 * i * W, Vec(kInfinity));
        store(best + (2 * i + 1) * W, Vec(0.0f));
      }
    }
  }

  // Compares the vectors of a search with the codes [from, from + chunk()) of it.
  void search(int64_t thread, const Search& s, int64_t from) const {
    float *packed = own(thread), *norms = packed + panels_ * panel_, *row = norms + chunk();
    const int64_t count = least(s.end - from, chunk());
    const int panels = static_cast<int>(ceiling(count, kPanelColumns));
    for (int64_t group = 0; group < panels * kPanelVectors; ++group) {
      float* columns = packed + group / kPanelVectors * panel_ + group % kPanelVectors * W;
      pack(from + group * W, from + count, row, columns, norms + group * W);
    }
    float* best = minima(thread) + 2 * s.first * W;
    const float* own_norms = norms_ + s.first;
    const int64_t first_group = (from - s.begin) / W;
    const Blocks shape = {blocks_ + s.first * W, n_ * W, static_cast<int>(groups_), 1, tail_};
    gemm(shape, s.count, packed, panels, [&](int panel, int64_t r, int v, Vec products) {
      const int64_t group = panel * kPanelVectors + v;
      const Vec distance = fma(Vec(-2.0f), products, Vec(own_norms[r]) + load(norms + group * W));
      // NaN comes before all numbers, as in argmin: as −infinity, which is no distance.
      const Vec d = if_positive(distance, distance, if_at_most_zero(distance, distance, Vec(-kInfinity)));
      float* at = best + 2 * r * W;
      const Vec before = load(at), nearer = before - d;  // NaN where both are infinite: not nearer
      store(at, if_positive(nearer, d, before));
      store(at + W, if_positive(nearer, Vec(static_cast<float>(first_group + group)), load(at + W)));
    });
  }

  // Codes [from, end), at most W of them, as columns of a panel, and their squared norms. Columns that are left over
  // repeat the last code: at equal distances the first wins, and zeros would make NaN of an infinite vector.
  void pack(int64_t from, int64_t end, float* row, float* columns, float* norms) const {
    from = least(from, end - 1);
    const int64_t count = least(W, end - from), code = codebook_.strides[0], channel = codebook_.strides[1];
    with_data(codebook_, [&](auto* data) {
      read_row(Row<std::remove_pointer_t<decltype(data)>>{data + from * code, count, code, channel}, depth_, row);
    });
    Vec squares;
    for (int64_t k = 0; k < depth_; ++k) {
      for (int64_t lane = count; lane < W; ++lane) row[k * W + lane] = row[k * W + count - 1];
      const Vec v = load(row + k * W);
      store(columns + k * kPanelColumns, v);
      squares = fma(v, v, squares);
    }
    store(norms, squares);
  }

  // The code at the least distance from the vector gathered to place i; the first of equal ones.
  int64_t winner(int64_t i) const {
    const int64_t begin = known_ && !is_known(*known_, order_[i]) ? split_ : 0;
    float least_distance = kInfinity;
    int64_t found = 0;
    bool any = false;
    for (int64_t t = 0; t < threads_; ++t) {
      const float* at = minima(t) + 2 * i * W;
      for (int64_t lane = 0; lane < W; ++lane) {
        const int64_t code = static_cast<int64_t>(at[W + lane]) * W + lane;
        if (at[lane] < least_distance || (any && at[lane] == least_distance && code < found)) {
          least_distance = at[lane], found = code, any = true;
        }
      }
    }
    return begin + found;
  }
};

void run(const NearestCodeCall& call, int most_threads, irt_status& status) {
  if (call.out->sizes[0] == 0) return;
  if (!Codes::fits(*call.x)) return fail(status, IRT_UNSUPPORTED, "x is too large");
  Codes codes(call, most_threads);
  const Workspace space(codes.bytes());
  if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the workspace");
  codes.run(space.data(), static_cast<int64_t*>(call.out->data));
}

void nearest_code(const irt_call& given, irt_status& status) {
  NearestCodeCall call;
  if (!call.read(given, status)) return;
  switch (call.x->dtype) {
    case IRT_F32:
    case IRT_BF16:
    case IRT_F16: return run(call, given.threads, status);
    default: return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace

IRT_CPU_KERNEL(nearest_code)

}  // namespace irt::INPAINTRT_ISA
