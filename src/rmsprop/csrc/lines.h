// The nine lines over the elements of one tensor: the numbers of a step, the loop, and its prefetching.
#pragma once
#include "rmsprop.h"
#include "types.h"

#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__GNUC__)
#define RMSPROP_PREFETCH(address) __builtin_prefetch(address, 1, 3)
#define RMSPROP_PREFETCH_READ(address) __builtin_prefetch(address, 0, 3)
#else
#define RMSPROP_PREFETCH(address) (void)(address)
#define RMSPROP_PREFETCH_READ(address) (void)(address)
#endif

// Mistakes that tests/kernels/test_cpu_builds.py switches on by number, to check that the parity tests fail.
#ifdef RMSPROP_BREAKABLE
RMSPROP_API int32_t rmsprop_broken;
int32_t rmsprop_broken = 0;
#define RMSPROP_BROKEN(number) (rmsprop_broken == (number))
#else
#define RMSPROP_BROKEN(number) false
#endif

namespace {

constexpr double kUnbounded = std::numeric_limits<double>::infinity();
constexpr double kSmallest = std::numeric_limits<float>::min();

// What the loop does beside the nine lines: nothing; clip_weights; all clipping, also with bounds that are infinite; and
// max_update too.
enum Extra { kPlain, kWalled, kClipped, kCapped };

// Returns the first that suffices for a tensor. A norm's factor is one of the gradient's scale, if nothing comes between.
inline Extra extra_for(const Work& work, int64_t i) {
  if (!std::isinf(work.cap)) return kCapped;
  const bool between = !std::isinf(work.clip_value) || (work.clip_after_decay && !work.decoupled);
  if (between || (work.coefficient != nullptr && work.coefficient[2 * i + 1] != 1)) return kClipped;
  return std::isinf(work.clip_weights) ? kPlain : kWalled;
}

// The numbers of one step, computed in double and rounded once to the arithmetic's type. A switch that only changes a
// number is applied here: its other value makes the line a no-op.
template <class A>
struct Numbers {
  A scale, l2, shrink, alpha, beta, unbias, eps_inside, eps_outside, floor, mu, into_buffer, lr;
  A weight;            // [3]: factor of the distance between g and m, added to g or m
  A from_g, nesterov, nearest;  // 1 or 0. With a bool the loop would mix masks of two widths, which GCC does not vectorize.
  A cap, growth, carried, move;  // max_update
  A early, value, factor, rest, last, wall;  // clipping: [1] before it, the bounds, and the norms' coefficient in two
  uint32_t first, second;        // keys of the random bits

  // A function, since clang does not emit a constructor that only the versions of a function (RMSPROP_CLONES) call.
  Numbers& of(const Work& work, int64_t i) {
    const double correction = work.correction[i];
    const bool decoupled = work.decoupled && work.weight_decay != 0;
    const bool in_buffer = work.lr_in_buffer && work.has_momentum;
    const double eps = work.eps;
    nesterov = A(work.nesterov != 0);
    nearest = A(work.stochastic == 0);
    const bool left_out = RMSPROP_BROKEN(8);
    const double by_norm = work.coefficient == nullptr || left_out ? 1 : work.coefficient[2 * i];
    const bool folded = extra_for(work, i) < kClipped;
    scale = A((work.maximize ? -work.scale : work.scale) * (folded ? by_norm : 1));
    l2 = A(work.decoupled || work.clip_after_decay ? 0 : work.weight_decay);
    early = A(!work.decoupled && work.clip_after_decay ? work.weight_decay : 0);
    value = A(work.clip_value_last ? kUnbounded : work.clip_value);
    last = A(work.clip_value_last ? work.clip_value : kUnbounded);
    wall = A(work.clip_weights);
    factor = A(folded ? 1 : by_norm);
    rest = A(work.coefficient == nullptr ? 1 : work.coefficient[2 * i + 1]);
    shrink = A(decoupled ? 1 - work.lr * work.weight_decay : 1);
    alpha = A(work.alpha);
    beta = A(1 - work.alpha);
    from_g = A(work.alpha < 0.5);
    weight = A(work.alpha < 0.5 ? -work.alpha : 1 - work.alpha);
    unbias = A(1 / correction);
    eps_inside = A(work.eps_mode == kInside || work.eps_mode == kBoth ? eps : 0);
    eps_outside = A(work.eps_mode == kOutside || work.eps_mode == kBoth ? eps : 0);
    floor = A(work.eps_mode == kFloor ? eps : 0);
    mu = A(work.momentum);
    into_buffer = A(in_buffer ? work.lr : 1);
    lr = A(in_buffer ? 1 : work.lr);
    cap = A(work.cap);
    growth = A(std::isinf(work.cap) ? work.cap : 2);
    carried = A(std::sqrt((2 - work.alpha) / (1 - work.alpha)));
    move = A(in_buffer ? work.cap * std::fabs(work.lr) : work.cap);
    const bool random = work.stochastic || work.narrowed;
    first = random ? work.key[2 * i] : 0;
    second = random ? work.key[2 * i + 1] : 0;
    if (RMSPROP_BROKEN(1)) std::swap(eps_inside, eps_outside);
    if (RMSPROP_BROKEN(2) && work.has_momentum) std::swap(into_buffer, lr);
    if (RMSPROP_BROKEN(3)) beta = A(1) - A(A(work.alpha) + A(1e-6));
    if (RMSPROP_BROKEN(9)) std::swap(early, l2);
    return *this;
  }
};

// Rounding of [9]: to nearest, stochastic, or to nearest with a Kahan remainder that is itself rounded to nearest or
// stochastically.
enum Write { kNearest, kStochastic, kCompensated, kBoth };

// Bounds x to ±bound. NaN stays.
template <class A>
RMSPROP_INLINE A within(A x, A bound) {
  x = x > bound ? bound : x;
  return x < -bound ? -bound : x;
}

// A gradient as its norm is taken: after [1] where clip_after_decay asks for it, and after clip_value.
template <class A>
RMSPROP_INLINE A prepared(A g, A p, A early, A value) {
  return within(early != 0 ? fused(early, p, g) : g, value);
}

// The types of the state: of square_avg, and of the other averages. A narrowed state is rounded stochastically.
template <class T>
struct Full {
  using Square = T;
  using Other = T;
  static constexpr bool kNarrowed = false;
};

template <class T>
struct Narrowed {
  using Square = T;
  using Other = BFloat16;
  static constexpr bool kNarrowed = true;
};

// An element on its way through the lines: the parameter, its gradient, and the averages.
template <class A>
struct Element {
  A p, g, v, m, b;
};

// The nine lines for one element, whose averages are written, and narrowed, afterwards.
template <class S, class A, bool centered, bool momentum, Extra extra>
RMSPROP_INLINE void advance(const Numbers<A>& n, Element<A>& x) {
  A p = x.p, g = x.g * n.scale;
  if constexpr (extra >= kClipped) g = within(prepared(g, p, n.early, n.value) * n.factor * n.rest, n.last);
  // [1] decay
  g = n.l2 != 0 ? fused(n.l2, p, g) : g;
  p = p * n.shrink;
  // [2] second moment
  const A before = x.v;
  A v = fused(n.beta * g, g, n.alpha * before);
  A entering = g;
  if constexpr (extra == kCapped) {
    // a spike at most doubles v, unless v is 0; an infinite gradient is not a spike
    const A double_ = n.growth * before;
    const bool spike = (v > double_) & (double_ > 0) & (std::fabs(g) <= std::numeric_limits<A>::max());
    v = spike && !RMSPROP_BROKEN(5) ? double_ : v;
    if constexpr (centered) entering = spike ? std::copysign(n.carried * std::sqrt(before), g) : g;
  }
  x.v = v;
  // [4] bias
  if constexpr (S::kNarrowed) v = RMSPROP_BROKEN(15) ? S::Square::widen(S::Square::narrow(v, S::Square::kNearest)) : v;
  A w = v * n.unbias;
  if constexpr (centered) {
    // [3] first moment
    // from the nearer of the two: α and β are rounded, and a constant mean must stay constant
    const A old = x.m, apart = entering - old;
    A m = fused(n.weight, apart, n.from_g != 0 ? entering : old);
    m = apart - apart == 0 ? m : n.alpha * old + n.beta * entering;  // inf and NaN as in the equation
    x.m = m;
    // [4] bias
    m = m * n.unbias;
    // [5] variance: rounded below zero it is zero; NaN stays
    w = fused(-m, m, w);
    w = w < 0 ? A(0) : w;
  }
  // [6] denominator
  A d = std::sqrt(w + n.eps_inside) + n.eps_outside;
  d = d < n.floor ? n.floor : d;
  // [7] direction: 0/0 is 0
  d = ((g == 0) & (d == 0)) ? A(1) : d;
  A u = g / d;
  if constexpr (extra == kCapped) u = within(u, n.cap);
  if constexpr (momentum) {
    // [8] momentum
    u = n.into_buffer * u;
    const A b = fused(n.mu, x.b, u);
    x.b = b;
    u = n.nesterov != 0 ? fused(n.mu, b, u) : b;
    if constexpr (extra == kCapped) u = within(u, n.move);
  }
  // [9] parameter
  x.p = fused(-n.lr, u, p);
}

constexpr uint32_t kApart = 0x9e3779b1u;  // of the words of neighbors, from which their random bits are mixed

// Random bits of an element's averages, from those of its parameter: reference.state_bits.
struct Drawn {
  uint32_t v, m, b;
};

RMSPROP_INLINE Drawn drawn_from(uint32_t random) {
  const uint32_t m = mixed_again(random);
  return {RMSPROP_BROKEN(14) ? random : swapped(random), m, swapped(m)};
}

template <class T>
RMSPROP_INLINE typename T::Bits narrowed(float x, uint32_t random) {
  return typename T::Bits(T::narrow(x, RMSPROP_BROKEN(13) ? T::kNearest : random) + int(RMSPROP_BROKEN(16)));
}

// Rounds a parameter, or its remainder, stochastically. With `either`, to nearest if the numbers ask for it.
template <class P, bool either, class A>
RMSPROP_INLINE typename P::Bits rounded(const Numbers<A>& n, A x, uint32_t random) {
  return either && n.nearest != 0 ? P::narrow(x) : P::narrow(x, random);
}

// Whether one function steps half precision with either rounding, beside a narrowed state; else it is a function's own.
template <class S, Extra extra>
constexpr bool kEither = S::kNarrowed && extra == kCapped;

// Where an element of a tensor lies: first elements of p, g, v, m, b and c. g may equal p; otherwise nothing overlaps.
struct Places {
  char* p;
  const char* g;
  char *v, *m, *b, *c;
};

// Steps element i. word: i · kApart.
//
// P: type of the parameter and gradient. S: Full or Narrowed types of the state. A: type of the arithmetic.
template <class P, class S, class A, bool centered, bool momentum, Extra extra, Write write>
RMSPROP_INLINE void line(const Numbers<A>& n, A wall, const Places& at, int64_t i, uint32_t word) {
  using V = typename S::Square;
  using O = typename S::Other;
  uint32_t random = 0;
  if constexpr (S::kNarrowed || write == kStochastic || write == kBoth) {
    random = mix((RMSPROP_BROKEN(6) ? uint32_t(i % 16) * kApart : word) ^ n.first, n.second);
  }
  Element<A> x{A(load<P>(at.p, i)), A(load<P>(at.g, i)), A(load<V>(at.v, i)), A(0), A(0)};
  if constexpr (write >= kCompensated) x.p = x.p + load<P>(at.c, i) * (1 / P::kRestScale);
  if constexpr (centered) x.m = A(load<O>(at.m, i));
  if constexpr (momentum) x.b = A(load<O>(at.b, i));
  if (RMSPROP_BROKEN(4)) store<P>(const_cast<char*>(at.g), i, x.g + x.g);
  advance<S, A, centered, momentum, extra>(n, x);
  if constexpr (S::kNarrowed) {
    const Drawn drawn = drawn_from(random);
    put<V>(at.v, i, narrowed<V>(x.v, drawn.v));
    if constexpr (centered) put<O>(at.m, i, narrowed<O>(x.m, drawn.m));
    if constexpr (momentum) put<O>(at.b, i, narrowed<O>(x.b, drawn.b));
  } else {
    store<V>(at.v, i, x.v);
    if constexpr (centered) store<O>(at.m, i, x.m);
    if constexpr (momentum) store<O>(at.b, i, x.b);
  }
  if constexpr (write == kNearest) {
    if constexpr (extra >= kWalled) x.p = within(x.p, RMSPROP_BROKEN(10) ? A(kUnbounded) : wall);
    store<P>(at.p, i, x.p);
  } else if constexpr (write == kStochastic) {
    // the bound is a number of the type, and so is kept
    put<P>(at.p, i, rounded<P, kEither<S, extra>>(n, within(x.p, wall), random));
  } else {
    const A near = P::widen(P::narrow(x.p));
    store<P>(at.p, i, within(near, wall));
    const A rest = (x.p - near) * (RMSPROP_BROKEN(7) ? -P::kRestScale : P::kRestScale);
    const A kept = rest - rest == 0 ? rest : A(0);  // the parameter may be infinite or NaN
    put<P>(at.c, i, write == kBoth ? rounded<P, kEither<S, extra>>(n, kept, random) : P::narrow(kept));
  }
}

// Two neighbors in a word of the arithmetic's width or less, so that no vector is split or joined. See Numbers::of.
template <class T>
struct Two {
  using One = typename T::Bits;
  using Bits = std::conditional_t<sizeof(One) == 1, uint16_t, uint32_t>;
  static constexpr int kBits = 8 * sizeof(One);
  Bits word;
  static RMSPROP_INLINE Two load(const char* from, int64_t j) {
    Two found;
    std::memcpy(&found.word, from + j * int64_t(sizeof(found.word)), sizeof(found.word));
    return found;
  }
  RMSPROP_INLINE float first() const { return T::widen(One(word)); }
  RMSPROP_INLINE float second() const { return T::widen(One(word >> kBits)); }
  static RMSPROP_INLINE void put(char* to, int64_t j, One first, One second) {
    const Bits word = Bits(uint32_t(first) | uint32_t(second) << kBits);
    std::memcpy(to + j * int64_t(sizeof(word)), &word, sizeof(word));
  }
};

// Steps elements 2j and 2j + 1 of a tensor in half precision, rounded stochastically, with a narrowed state.
// word: of the first. The first is the lower half of a word.
template <class P, class S, class A, bool centered, bool momentum>
RMSPROP_INLINE void two_lines(const Numbers<A>& n, const Places& at, int64_t j, uint32_t word) {
  using V = typename S::Square;
  using O = typename S::Other;
  const uint32_t next = RMSPROP_BROKEN(6) ? word : word + kApart;
  const uint32_t bits[2] = {mix(word ^ n.first, n.second), mix(next ^ n.first, n.second)};
  const Drawn one = drawn_from(bits[0]), other = drawn_from(bits[1]);
  const Two<P> p = Two<P>::load(at.p, j), g = Two<P>::load(at.g, j);
  const Two<V> v = Two<V>::load(at.v, j);
  Element<A> x{p.first(), g.first(), v.first(), 0, 0}, y{p.second(), g.second(), v.second(), 0, 0};
  if constexpr (centered) {
    const Two<O> m = Two<O>::load(at.m, j);
    x.m = m.first(), y.m = m.second();
  }
  if constexpr (momentum) {
    const Two<O> b = Two<O>::load(at.b, j);
    x.b = b.first(), y.b = b.second();
  }
  advance<S, A, centered, momentum, kPlain>(n, x);
  advance<S, A, centered, momentum, kPlain>(n, y);
  Two<V>::put(at.v, j, narrowed<V>(x.v, one.v), narrowed<V>(y.v, other.v));
  if constexpr (centered) Two<O>::put(at.m, j, narrowed<O>(x.m, one.m), narrowed<O>(y.m, other.m));
  if constexpr (momentum) Two<O>::put(at.b, j, narrowed<O>(x.b, one.b), narrowed<O>(y.b, other.b));
  Two<P>::put(at.p, j, P::narrow(x.p, bits[0]), P::narrow(y.p, bits[1]));
}

// The nine lines over the elements [begin, end) of one tensor.
template <class P, class S, class A, bool centered, bool momentum, Extra extra, Write write>
RMSPROP_INLINE void lines(const Numbers<A>& given, int64_t begin, int64_t end, Places at) {
  const Numbers<A> n = given;  // in registers, since a char* may point to anything
  const A wall = write == kNearest ? n.wall : P::widen(P::narrow(n.wall));
  uint32_t word = uint32_t(begin) * kApart;
  if constexpr (S::kNarrowed && write == kStochastic && extra == kPlain && RMSPROP_LITTLE_ENDIAN) {
    if (begin < end && begin % 2 != 0) {
      line<P, S, A, centered, momentum, extra, write>(n, wall, at, begin++, word);
      word += kApart;
    }
    const int64_t first = begin / 2, last = end / 2;
    RMSPROP_INDEPENDENT
    for (int64_t j = first; j < last; ++j) {
      two_lines<P, S, A, centered, momentum>(n, at, j, word);
      word += 2 * kApart;
    }
    if (begin < end && end % 2 != 0) {
      line<P, S, A, centered, momentum, extra, write>(n, wall, at, end - 1, uint32_t(end - 1) * kApart);
    }
    return;
  }
  RMSPROP_INDEPENDENT
  for (int64_t i = begin; i < end; ++i) {
    line<P, S, A, centered, momentum, extra, write>(n, wall, at, i, word);
    word += kApart;
  }
}

// Root and division keep the processor too busy to prefetch far ahead by itself, so the loop prefetches elements
// [begin + kAhead, begin + kAhead + kBlock) while it computes [begin, begin + kBlock). 64 M floats then take 1.01 times
// as long as the streaming loop instead of 1.18, on one thread and on two. Cached data takes the same time.
constexpr int64_t kBlock = 128, kAhead = 512;

template <class T>
RMSPROP_INLINE void ask_for(const char* base, int64_t begin, int64_t ahead = kAhead) {
  constexpr int64_t size = sizeof(typename T::Bits), line = 64;
  for (int64_t byte = 0; byte < kBlock * size; byte += line) RMSPROP_PREFETCH(base + (begin + ahead) * size + byte);
}

template <class P, class S, class A, bool centered, bool momentum, Extra extra, Write write>
RMSPROP_INLINE void blocks(const Numbers<A>& n, int64_t begin, int64_t end, int64_t size, const Places& at) {
  while (begin < end) {
    int64_t stop = end;
    if (begin + kAhead + kBlock < size) {  // of the tensor: what lies beyond the end is stepped next, or by a neighbor
      stop = end - begin < kBlock ? end : begin + kBlock - begin % 2;  // so that `two_lines` finds its pairs
      ask_for<P>(at.p, begin);
      ask_for<P>(at.g, begin);
      ask_for<typename S::Square>(at.v, begin);
      if constexpr (centered) ask_for<typename S::Other>(at.m, begin);
      if constexpr (momentum) ask_for<typename S::Other>(at.b, begin);
      if constexpr (write >= kCompensated) ask_for<P>(at.c, begin);
    }
    lines<P, S, A, centered, momentum, extra, write>(n, begin, stop, at);
    begin = stop;
  }
}

// Steps elements [begin, end) of tensor i. Switches that change the memory traffic, or cost much, are chosen here,
// outside the loop.
template <class P, class S, class A, Extra extra, Write write>
RMSPROP_INLINE void chosen(const Work& work, int64_t i, int64_t begin, int64_t end) {
  const Numbers<A> n = Numbers<A>().of(work, i);
  const Places at{static_cast<char*>(work.param[i]),
                  static_cast<const char*>(work.grad[i]),
                  static_cast<char*>(work.square_avg[i]),
                  work.centered ? static_cast<char*>(work.grad_avg[i]) : nullptr,
                  work.has_momentum ? static_cast<char*>(work.momentum_buffer[i]) : nullptr,
                  write >= kCompensated ? static_cast<char*>(work.compensation[i]) : nullptr};
  if (work.centered && work.has_momentum) {
    blocks<P, S, A, true, true, extra, write>(n, begin, end, work.size[i], at);
  } else if (work.centered) {
    blocks<P, S, A, true, false, extra, write>(n, begin, end, work.size[i], at);
  } else if (work.has_momentum) {
    blocks<P, S, A, false, true, extra, write>(n, begin, end, work.size[i], at);
  } else {
    blocks<P, S, A, false, false, extra, write>(n, begin, end, work.size[i], at);
  }
}

}  // namespace
