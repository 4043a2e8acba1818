// philox.h against known answers and against double. Compiled once per instruction set.
#include "philox.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "check.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;

struct Words {
  uint32_t lanes[4][kWidth];
};
Words words_of(const Philox& noise, int64_t first) {
  Bits words[4];
  philox_words(noise, first, words);
  Words out;
  static_assert(sizeof out.lanes == sizeof words, "32 bits a lane");
  memcpy(out.lanes, words, sizeof words);
  return out;
}

// The algorithm as its paper states it, one block at a time.
void plain(uint64_t seed, uint64_t block, uint32_t stream, uint32_t call, uint32_t (&c)[4]) {
  c[0] = static_cast<uint32_t>(block), c[1] = static_cast<uint32_t>(block >> 32), c[2] = stream, c[3] = call;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    const uint64_t a = uint64_t{0xd2511f53u} * c[0], b = uint64_t{0xcd9e8d57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    memcpy(c, next, sizeof next);
  }
}

void known_answers() {
  const struct {
    uint64_t seed, block;
    uint32_t stream, call, words[4];
  } answers[] = {
      {0, 0, 0, 0, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
      {~0ull, ~0ull, ~0u, ~0u, {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}},
      {42, 0, 1, 2409, {0x0435c4adu, 0x5d34a862u, 0x6e25c9c3u, 0x5bb265b6u}},
      {42, 49151, 1, 17, {0x0b23ff97u, 0x08af79dbu, 0xd3c2337au, 0xd828c29fu}},
      {1, 1099511627781ull, 2, 3, {0xb2b5fad6u, 0x3b76e1d4u, 0x758eeb47u, 0xfdc08dd9u}},
      {11400714819323198485ull, 123456789, 2, 0x80000000u, {0x43aae8ccu, 0x7937f766u, 0xdc9763fdu, 0xcc057427u}},
  };
  for (const auto& a : answers) {
    const Words got = words_of(Philox(static_cast<int64_t>(a.seed), a.stream, a.call), static_cast<int64_t>(a.block));
    for (int w = 0; w < 4; ++w) {  // block `first` is in lane 0
      CHECK(got.lanes[w][0] == a.words[w], "word %d is %08x, not %08x", w, got.lanes[w][0], a.words[w]);
    }
  }
}

void every_lane_holds_its_block() {
  Random random{3};
  for (int trial = 0; trial < 200; ++trial) {
    const uint64_t seed = random.bits() << 32 ^ random.bits();
    uint64_t first = random.bits() << 7;
    if (trial % 3 == 0) first = 0xfffffffeull;  // the low word overflows within the vector
    const uint32_t stream = static_cast<uint32_t>(trial % 3), call = static_cast<uint32_t>(random.bits());
    const Words got = words_of(Philox(static_cast<int64_t>(seed), stream, call), static_cast<int64_t>(first));
    for (int lane = 0; lane < kWidth; ++lane) {
      uint32_t want[4];
      plain(seed, first + kBlockOf[lane], stream, call, want);
      for (int w = 0; w < 4; ++w) CHECK(got.lanes[w][lane] == want[w], "lane %d word %d", lane, w);
    }
  }
}

float first_lane(Vec x) {
  float lanes[kWidth];
  store(lanes, x);
  return lanes[0];
}

void uniforms_round_twice() {
  Random random{4};
  const auto check_word = [](uint32_t word) {
    Bits bits;
    uint32_t lanes[kWidth];
    for (uint32_t& lane : lanes) lane = word;
    memcpy(&bits, lanes, sizeof bits);
    const float want = static_cast<float>(word) * 0x1p-32f + 0x1p-33f, got = first_lane(uniform(bits));
    CHECK(!memcmp(&want, &got, sizeof want), "word %08x gives %a, not %a", word, got, want);
  };
  for (int i = 0; i < 200000; ++i) check_word(static_cast<uint32_t>(random.bits()));
  for (uint32_t word : {0u, 1u, 2u, 0xffffffffu, 0xffffff80u, 0xffffff7fu, 0xfffffe80u, 0x01000001u, 0x01000003u,
                        0x00ffffffu, 0x80000040u, 0x800000c0u, 0x7fffffffu}) {
    check_word(word);
  }
}

// Worst |radius − exact| / max(1, exact) and worst error of cosine and sine, over a grid that is dense near 1 and 0.
double worst_radius() {
  double worst = 0.0;
  const auto visit = [&](float u) {
    const double exact = std::sqrt(-2.0 * std::log(static_cast<double>(u)));
    const double error = std::fabs(first_lane(square_root(minus_two_log(Vec(u)))) - exact) / std::fmax(1.0, exact);
    worst = std::fmax(worst, error);
  };
  for (uint32_t bits = float_to_bits(0x1p-33f); bits < float_to_bits(0.5f); bits += 257) visit(bits_to_float(bits));
  for (uint32_t bits = float_to_bits(0.5f); bits <= float_to_bits(1.0f); bits += 3) visit(bits_to_float(bits));
  return worst;
}

double worst_circle() {
  double worst = 0.0;
  const auto visit = [&](float u) {
    Vec cosine, sine;
    circle(Vec(u), cosine, sine);
    const double quarters = 4.0 * static_cast<double>(u), nearest = std::nearbyint(quarters);
    const double angle = (quarters - nearest) * 1.57079632679489661923;
    const int quadrant = static_cast<int>(nearest) & 3;
    const double c = std::cos(angle), s = std::sin(angle);
    const double x = quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s;
    const double y = quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c;
    worst = std::fmax(worst, std::fmax(std::fabs(first_lane(cosine) - x), std::fabs(first_lane(sine) - y)));
  };
  for (uint32_t bits = float_to_bits(0x1p-33f); bits < float_to_bits(0x1p-4f); bits += 997) visit(bits_to_float(bits));
  for (uint32_t bits = float_to_bits(0x1p-4f); bits <= float_to_bits(1.0f); bits += 11) visit(bits_to_float(bits));
  return worst;
}

// z = r · c, rounded once more: its error is at most that of the radius, r times that of the circle, and a rounding.
void the_promised_bound() {
  const double radius = worst_radius(), circle = worst_circle(), bound = 0x1p-22;
  check::note("radius %.3f, circle %.3f, rounding 0.25 of a promised 1 (2^-22)", radius / bound, circle / bound);
  CHECK(radius + circle + 0x1p-24 <= bound, "%g", (radius + circle) / bound);
}

void normals_are_in_order() {
  double worst = 0.0;
  for (int64_t first = 0; first < 4096 * kWidth; first += kWidth) {
    const Philox noise(42, 1, 7);
    Vec z[4];
    philox_normals(noise, first, z);
    float got[kGroup];
    for (int i = 0; i < 4; ++i) store(got + i * kWidth, z[i]);
    for (int e = 0; e < kGroup; e += 2) {
      uint32_t words[4];
      plain(42, static_cast<uint64_t>(first + e / 4), 1, 7, words);
      const float u0 = static_cast<float>(words[e % 4]) * 0x1p-32f + 0x1p-33f;
      const float u1 = static_cast<float>(words[e % 4 + 1]) * 0x1p-32f + 0x1p-33f;
      const double r = std::sqrt(-2.0 * std::log(static_cast<double>(u0))), angle = 6.283185307179586 * u1;
      const double error =
          std::fmax(std::fabs(got[e] - r * std::cos(angle)), std::fabs(got[e + 1] - r * std::sin(angle)));
      worst = std::fmax(worst, error / std::fmax(1.0, r));
    }
  }
  check::note("worst error %.3f of the promised 2^-22", worst / 0x1p-22);
  CHECK(worst <= 0x1p-22, "%g", worst / 0x1p-22);
}

void the_ends_of_the_uniform() {
  CHECK(first_lane(minus_two_log(Vec(1.0f))) == 0.0f, "-2 ln 1 is %g", first_lane(minus_two_log(Vec(1.0f))));
  for (float quarters : {0.0f, 0.25f, 0.5f, 0.75f, 1.0f}) {
    Vec cosine, sine;
    circle(Vec(quarters), cosine, sine);
    const int q = static_cast<int>(4 * quarters) & 3;
    CHECK(first_lane(cosine) == (q == 0 ? 1.0f : q == 2 ? -1.0f : 0.0f), "cosine at %g", quarters);
    CHECK(first_lane(sine) == (q == 1 ? 1.0f : q == 3 ? -1.0f : 0.0f), "sine at %g", quarters);
  }
}

}  // namespace
}  // namespace irt::INPAINTRT_ISA

using namespace irt::INPAINTRT_ISA;

const check::Case check::cases[] = {
    {"known answers", known_answers},
    {"every lane holds its block", every_lane_holds_its_block},
    {"uniforms round twice", uniforms_round_twice},
    {"the promised bound", the_promised_bound},
    {"normals are in order", normals_are_in_order},
    {"the ends of the uniform", the_ends_of_the_uniform},
    {nullptr, nullptr},
};
