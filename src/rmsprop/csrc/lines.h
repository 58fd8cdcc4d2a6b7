// The nine lines over the elements of one tensor: the numbers of a step, the loop, and its prefetching.
#pragma once
#include "rmsprop.h"
#include "types.h"

#include <cmath>
#include <limits>
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
  A from_g, nesterov;  // 1 or 0. With a bool the loop would mix masks of two widths, which GCC does not vectorize.
  A cap, growth, carried, move;  // max_update
  A early, value, factor, rest, last, wall;  // clipping: [1] before it, the bounds, and the norms' coefficient in two
  uint32_t first, second;        // keys of the random bits

  Numbers(const Work& work, int64_t i) {
    const double correction = work.correction[i];
    const bool decoupled = work.decoupled && work.weight_decay != 0;
    const bool in_buffer = work.lr_in_buffer && work.has_momentum;
    const double eps = work.eps;
    nesterov = A(work.nesterov != 0);
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

// Writes an average into the state. random: bits of the slot, read only if narrowed.
template <class T, bool narrowed, class A>
RMSPROP_INLINE void keep(char* to, int64_t i, A& a, uint32_t random) {
  if constexpr (narrowed) {
    const auto x = T::narrow(a, RMSPROP_BROKEN(13) ? T::kNearest : random);
    put<T>(to, i, typename T::Bits(x + int(RMSPROP_BROKEN(16))));
    if (RMSPROP_BROKEN(15)) a = T::widen(x);
  } else {
    store<T>(to, i, a);
  }
}

// The nine lines over the elements [begin, end) of one tensor.
//
// P: type of the parameter and gradient. S: Full or Narrowed types of the state. A: type of the arithmetic.
// p, g, v, m, b, c: first elements. g may equal p; otherwise nothing overlaps.
template <class P, class S, class A, bool centered, bool momentum, Extra extra, Write write>
RMSPROP_INLINE void lines(const Numbers<A>& n, int64_t begin, int64_t end, char* p_, const char* g_, char* v_, char* m_,
                          char* b_, char* c_) {
  const A scale = n.scale, l2 = n.l2, shrink = n.shrink, alpha = n.alpha, beta = n.beta, unbias = n.unbias,
          eps_inside = n.eps_inside, eps_outside = n.eps_outside, floor = n.floor, mu = n.mu, k = n.into_buffer,
          lr = n.lr, nesterov = n.nesterov, weight = n.weight, from_g = n.from_g, cap = n.cap, growth = n.growth,
          carried = n.carried, most = n.move, early = n.early, value = n.value, factor = n.factor, rest_ = n.rest,
          last = n.last, wall = write == kNearest ? n.wall : P::widen(P::narrow(n.wall));
  const uint32_t first = n.first, second = n.second;
  uint32_t word = uint32_t(begin) * 0x9e3779b1u;
  RMSPROP_INDEPENDENT
  for (int64_t i = begin; i < end; ++i) {
    uint32_t random = 0;
    if constexpr (S::kNarrowed || write == kStochastic || write == kBoth) {
      random = mix((RMSPROP_BROKEN(6) ? uint32_t(i % 16) * 0x9e3779b1u : word) ^ first, second);
      word += 0x9e3779b1u;
    }
    const uint32_t other = S::kNarrowed ? mixed_again(random) : 0;
    A p = load<P>(p_, i);
    if constexpr (write >= kCompensated) p = p + load<P>(c_, i) * (1 / P::kRestScale);
    A g = load<P>(g_, i) * scale;
    if constexpr (extra >= kClipped) g = within(prepared(g, p, early, value) * factor * rest_, last);
    if (RMSPROP_BROKEN(4)) store<P>(const_cast<char*>(g_), i, g + g);
    // [1] decay
    g = l2 != 0 ? fused(l2, p, g) : g;
    p = p * shrink;
    // [2] second moment
    const A before = A(load<typename S::Square>(v_, i));
    A v = fused(beta * g, g, alpha * before);
    A entering = g;
    if constexpr (extra == kCapped) {
      // a spike at most doubles v, unless v is 0; an infinite gradient is not a spike
      const A double_ = growth * before;
      const bool spike = (v > double_) & (double_ > 0) & (std::fabs(g) <= std::numeric_limits<A>::max());
      v = spike && !RMSPROP_BROKEN(5) ? double_ : v;
      if constexpr (centered) entering = spike ? std::copysign(carried * std::sqrt(before), g) : g;
    }
    keep<typename S::Square, S::kNarrowed>(v_, i, v, RMSPROP_BROKEN(14) ? random : swapped(random));
    // [4] bias
    A w = v * unbias;
    if constexpr (centered) {
      // [3] first moment
      // from the nearer of the two: α and β are rounded, and a constant mean must stay constant
      const A old = A(load<typename S::Other>(m_, i)), apart = entering - old;
      A m = fused(weight, apart, from_g != 0 ? entering : old);
      m = apart - apart == 0 ? m : alpha * old + beta * entering;  // inf and NaN as in the equation
      keep<typename S::Other, S::kNarrowed>(m_, i, m, other);
      // [4] bias
      m = m * unbias;
      // [5] variance: rounded below zero it is zero; NaN stays
      w = fused(-m, m, w);
      w = w < 0 ? A(0) : w;
    }
    // [6] denominator
    A d = std::sqrt(w + eps_inside) + eps_outside;
    d = d < floor ? floor : d;
    // [7] direction: 0/0 is 0
    d = (g == 0) & (d == 0) ? A(1) : d;
    A u = g / d;
    if constexpr (extra == kCapped) u = within(u, cap);
    if constexpr (momentum) {
      // [8] momentum
      u = k * u;
      A b = fused(mu, A(load<typename S::Other>(b_, i)), u);
      keep<typename S::Other, S::kNarrowed>(b_, i, b, swapped(other));
      u = nesterov != 0 ? fused(mu, b, u) : b;
      if constexpr (extra == kCapped) u = within(u, most);
    }
    // [9] parameter
    p = fused(-lr, u, p);
    if constexpr (write == kNearest) {
      if constexpr (extra >= kWalled) p = within(p, RMSPROP_BROKEN(10) ? A(kUnbounded) : wall);
      store<P>(p_, i, p);
    } else {
      if constexpr (write == kStochastic) {
        put<P>(p_, i, P::narrow(within(p, wall), random));  // the bound is a number of the type, and so is kept
      } else {
        const auto near = P::narrow(p);
        store<P>(p_, i, within(P::widen(near), wall));
        const A rest = (p - P::widen(near)) * (RMSPROP_BROKEN(7) ? -P::kRestScale : P::kRestScale);
        const A kept = rest - rest == 0 ? rest : A(0);  // the parameter may be infinite or NaN
        put<P>(c_, i, write == kBoth ? P::narrow(kept, random) : P::narrow(kept));
      }
    }
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
RMSPROP_INLINE void blocks(const Numbers<A>& n, int64_t begin, int64_t end, int64_t size, char* p, const char* g, char* v,
                           char* m, char* b, char* c) {
  while (begin < end) {
    int64_t stop = end;
    if (begin + kAhead + kBlock < size) {  // of the tensor: what lies beyond the end is stepped next, or by a neighbor
      stop = end - begin < kBlock ? end : begin + kBlock;
      ask_for<P>(p, begin);
      ask_for<P>(g, begin);
      ask_for<typename S::Square>(v, begin);
      if constexpr (centered) ask_for<typename S::Other>(m, begin);
      if constexpr (momentum) ask_for<typename S::Other>(b, begin);
      if constexpr (write >= kCompensated) ask_for<P>(c, begin);
    }
    lines<P, S, A, centered, momentum, extra, write>(n, begin, stop, p, g, v, m, b, c);
    begin = stop;
  }
}

// Steps elements [begin, end) of tensor i. Switches that change the memory traffic, or cost much, are chosen here,
// outside the loop.
template <class P, class S, class A, Extra extra, Write write>
RMSPROP_INLINE void chosen(const Work& work, int64_t i, int64_t begin, int64_t end) {
  const Numbers<A> n(work, i);
  char* p = static_cast<char*>(work.param[i]);
  const char* g = static_cast<const char*>(work.grad[i]);
  char* v = static_cast<char*>(work.square_avg[i]);
  char* m = work.centered ? static_cast<char*>(work.grad_avg[i]) : nullptr;
  char* b = work.has_momentum ? static_cast<char*>(work.momentum_buffer[i]) : nullptr;
  char* c = write >= kCompensated ? static_cast<char*>(work.compensation[i]) : nullptr;
  if (work.centered && work.has_momentum) {
    blocks<P, S, A, true, true, extra, write>(n, begin, end, work.size[i], p, g, v, m, b, c);
  } else if (work.centered) {
    blocks<P, S, A, true, false, extra, write>(n, begin, end, work.size[i], p, g, v, m, b, c);
  } else if (work.has_momentum) {
    blocks<P, S, A, false, true, extra, write>(n, begin, end, work.size[i], p, g, v, m, b, c);
  } else {
    blocks<P, S, A, false, false, extra, write>(n, begin, end, work.size[i], p, g, v, m, b, c);
  }
}

}  // namespace
