// What a test program is made of: a list of cases, and checks that say what failed and go on.
//
// Some tests are compiled for one instruction set (see cmake/isa.cmake for what that forbids), so this header holds
// macros and functions of internal linkage only, and cases are constants, not static constructors.
#pragma once

#include <cstdint>

namespace check {

struct Case {
  const char* name;
  void (*run)();
};

extern const Case cases[];  // each test file defines it; ends with a null name

__attribute__((format(printf, 3, 4))) void fail(const char* file, int line, const char* format, ...);
__attribute__((format(printf, 1, 2))) void note(const char* format, ...);

}  // namespace check

// CHECK(condition, "values: %d", x): the text says what was seen.
#define CHECK(condition, ...)                                       \
  do {                                                              \
    if (!(condition)) check::fail(__FILE__, __LINE__, __VA_ARGS__); \
  } while (false)

namespace {

// Numbers that are the same in every run (SplitMix64).
struct Random {
  uint64_t state;

  uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  // Of [low, high], ends included.
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
};

}  // namespace
