// How a complex transform of any length is cut into stages. Read by launch plans (host C++) and kernels, as nest.h is.
#pragma once

#include "nest.h"

namespace irt {

// n = r0 · r1 · …, one stage per factor: as many fours as there are, a two, then odd primes. The stage of radix r works
// on blocks of r · span points, n / (r · span) = step of them.
struct Fft {
  static constexpr int kThreads = 256;  // of each block that transforms
  static constexpr int kMaxStages = 12;
  static constexpr int kWidest = 7;  // the largest radix with a butterfly of its own; greater ones are dense products

  struct Stage {
    int radix, step;
    Divisor<int> span;
  };

  int n, stages, scratch;  // scratch: complex numbers that the dense products need between reading and writing
  Stage stage[kMaxStages];

  IRT_BOTH static Fft of(int n) {
    Fft fft{};
    fft.n = n;
    int rest = n, step = 1;
    for (int radix = 4; rest > 1; radix = radix == 4 ? 2 : radix == 2 ? 3 : radix + 2) {
      if (radix > 4 && radix * radix > rest) radix = rest;  // what no smaller number divides is a prime
      for (; rest % radix == 0; rest /= radix, step *= radix) {
        fft.stage[fft.stages++] = {radix, step, Divisor<int>::of(rest / radix)};
        const int most = radix > kThreads ? radix : kThreads;
        if (radix > kWidest && most > fft.scratch) fft.scratch = most;
      }
    }
    return fft;
  }

  // Lines of n points lie this far apart in shared memory: an odd distance, so that neighbouring threads on
  // neighbouring lines use different banks.
  IRT_BOTH int pitch() const { return n | 1; }
};

}  // namespace irt
