// The nine lines on a CPU: one pass over memory, one parallel region over all tensors.
//
// Plain C++17 behind a C interface. It needs no header of torch or Python and links nothing: built anywhere in seconds,
// called through ctypes, and run on torch's own threads through a function pointer.
//
// Compile with -ffp-contract=off: then every instruction set, every split over threads and every tail of a loop rounds
// alike, and the same inputs give the same bits. Where a sum takes a product rounded once, `fused` says so.
// Never compile with -ffast-math: it is wrong for NaN, and switches the whole process to flush-to-zero.
#include "rmsprop.h"
#include "types.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#if defined(__GNUC__)
#define RMSPROP_PREFETCH(address) __builtin_prefetch(address, 1, 3)
#else
#define RMSPROP_PREFETCH(address) (void)(address)
#endif

// Mistakes that tests/test_cpu_builds.py compiles in, to see that the parity tests notice.
#ifndef RMSPROP_BREAK
#define RMSPROP_BREAK 0
#endif

namespace {

// The numbers of one step, worked out in double and rounded once to the arithmetic's type. A switch that only moves a
// number stands here, as the number that leaves its line without effect.
template <class A>
struct Numbers {
  A scale, l2, shrink, alpha, beta, unbias, eps_inside, eps_outside, floor, mu, into_buffer, lr;
  A weight;            // [3] of the distance between g and m, and from which of them
  A from_g, nesterov;  // 1 or 0: a bool would leave the loop with masks of two widths, which GCC does not vectorise

  Numbers(const Work& work, double correction) {
    const bool decoupled = work.decoupled && work.weight_decay != 0;
    const bool in_buffer = work.lr_in_buffer && work.has_momentum;
    const double eps = work.eps;
    nesterov = A(work.nesterov != 0);
    scale = A(work.maximize ? -work.scale : work.scale);
    l2 = A(work.decoupled ? 0 : work.weight_decay);
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
#if RMSPROP_BREAK == 1  // ε on the other side of the root
    std::swap(eps_inside, eps_outside);
#elif RMSPROP_BREAK == 2  // the learning rate on the other side of the buffer
    if (work.has_momentum) std::swap(into_buffer, lr);
#elif RMSPROP_BREAK == 3  // 1 − α taken in the arithmetic's type
    beta = A(1) - A(A(work.alpha) + A(1e-6));
#endif
  }
};

// The nine lines over the elements [begin, end) of one tensor.
//
// P, S: types of parameter (and gradient) and of state. A: the arithmetic's.
// p, g, v, m, b: first elements. g may be p itself, element for element; else nothing overlaps.
template <class P, class S, class A, bool centered, bool momentum>
RMSPROP_INLINE void lines(const Numbers<A>& n, int64_t begin, int64_t end, char* p_, const char* g_, char* v_, char* m_,
                          char* b_) {
  const A scale = n.scale, l2 = n.l2, shrink = n.shrink, alpha = n.alpha, beta = n.beta, unbias = n.unbias,
          eps_inside = n.eps_inside, eps_outside = n.eps_outside, floor = n.floor, mu = n.mu, k = n.into_buffer,
          lr = n.lr, nesterov = n.nesterov, weight = n.weight, from_g = n.from_g;
  RMSPROP_INDEPENDENT
  for (int64_t i = begin; i < end; ++i) {
    A p = load<P>(p_, i);
    A g = load<P>(g_, i) * scale;
#if RMSPROP_BREAK == 4  // the gradient edited
    store<P>(const_cast<char*>(g_), i, g + g);
#endif
    // [1] decay
    g = l2 != 0 ? fused(l2, p, g) : g;
    p = p * shrink;
    // [2] second moment
    const A v = fused(beta * g, g, alpha * A(load<S>(v_, i)));
    store<S>(v_, i, v);
    // [4] bias
    A w = v * unbias;
    if constexpr (centered) {
      // [3] first moment
      // from the nearer of the two: α and β are rounded, and a mean that stands still is to stand still
      const A old = A(load<S>(m_, i)), apart = g - old;
      A m = fused(weight, apart, from_g != 0 ? g : old);
      m = apart - apart == 0 ? m : alpha * old + beta * g;  // inf and NaN as the equation has them
      store<S>(m_, i, m);
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
    if constexpr (momentum) {
      // [8] momentum
      u = k * u;
      const A b = fused(mu, A(load<S>(b_, i)), u);
      store<S>(b_, i, b);
      u = nesterov != 0 ? fused(mu, b, u) : b;
    }
    // [9] parameter
    store<P>(p_, i, fused(-lr, u, p));
  }
}

// Root and division keep the processor too busy to look far ahead in memory by itself: it is asked for the elements
// [begin + kAhead, begin + kAhead + kBlock) while [begin, begin + kBlock) are worked on. 64 M floats then take 1.01 of
// the streaming loop's time instead of 1.18, on one thread and on two; what lies in cache takes the same.
constexpr int64_t kBlock = 128, kAhead = 512;

template <class T>
RMSPROP_INLINE void ask_for(const char* base, int64_t begin) {
  constexpr int64_t size = sizeof(typename T::Bits), line = 64;
  for (int64_t byte = 0; byte < kBlock * size; byte += line) RMSPROP_PREFETCH(base + (begin + kAhead) * size + byte);
}

template <class P, class S, class A, bool centered, bool momentum>
RMSPROP_INLINE void blocks(const Numbers<A>& n, int64_t begin, int64_t end, char* p, const char* g, char* v, char* m,
                           char* b) {
  while (begin < end) {
    int64_t stop = end;
    if (begin + kAhead + kBlock < end) {
      stop = begin + kBlock;
      ask_for<P>(p, begin);
      ask_for<P>(g, begin);
      ask_for<S>(v, begin);
      if constexpr (centered) ask_for<S>(m, begin);
      if constexpr (momentum) ask_for<S>(b, begin);
    }
    lines<P, S, A, centered, momentum>(n, begin, stop, p, g, v, m, b);
    begin = stop;
  }
}

// Elements [begin, end) of tensor i: what changes the memory traffic is chosen here, outside the loop.
template <class P, class S, class A>
RMSPROP_INLINE void piece(const Work& work, int64_t i, int64_t begin, int64_t end) {
  const Numbers<A> n(work, work.correction[i]);
  char* p = static_cast<char*>(work.param[i]);
  const char* g = static_cast<const char*>(work.grad[i]);
  char* v = static_cast<char*>(work.square_avg[i]);
  char* m = work.centered ? static_cast<char*>(work.grad_avg[i]) : nullptr;
  char* b = work.has_momentum ? static_cast<char*>(work.momentum_buffer[i]) : nullptr;
  if (work.centered && work.has_momentum) {
    blocks<P, S, A, true, true>(n, begin, end, p, g, v, m, b);
  } else if (work.centered) {
    blocks<P, S, A, true, false>(n, begin, end, p, g, v, m, b);
  } else if (work.has_momentum) {
    blocks<P, S, A, false, true>(n, begin, end, p, g, v, m, b);
  } else {
    blocks<P, S, A, false, false>(n, begin, end, p, g, v, m, b);
  }
}

// One function for each pair of types, since the attribute takes no template. P with a state of its own type, or wider.
#define RMSPROP_PIECE(name, P, S, A)                                                     \
  RMSPROP_CLONES void name(const Work& work, int64_t i, int64_t begin, int64_t end) {    \
    piece<P, S, A>(work, i, begin, end);                                                 \
  }
RMSPROP_PIECE(f32_f32, Float32, Float32, float)
RMSPROP_PIECE(f32_f64, Float32, Float64, float)
RMSPROP_PIECE(f64_f32, Float64, Float32, double)
RMSPROP_PIECE(f64_f64, Float64, Float64, double)
RMSPROP_PIECE(bf16_f32, BFloat16, Float32, float)
RMSPROP_PIECE(bf16_f64, BFloat16, Float64, float)
RMSPROP_PIECE(bf16_bf16, BFloat16, BFloat16, float)
RMSPROP_PIECE(f16_f32, Float16, Float32, float)
RMSPROP_PIECE(f16_f64, Float16, Float64, float)
RMSPROP_PIECE(f16_f16, Float16, Float16, float)

using Piece = void (*)(const Work&, int64_t, int64_t, int64_t);

// [parameter's type][state's type]; null: refused before it comes here (kernels/cpu.py).
constexpr Piece kPieces[4][4] = {
    {f32_f32, f32_f64, nullptr, nullptr},
    {f64_f32, f64_f64, nullptr, nullptr},
    {bf16_f32, bf16_f64, bf16_bf16, nullptr},
    {f16_f32, f16_f64, nullptr, f16_f16},
};

struct Works {
  Work* works;
  int64_t count;
};

// Calls each(work, tensor, first, last) for the tensors under [begin, end) of the elements of all works in a row.
template <class Each>
void walk(const Works& all, int64_t begin, int64_t end, Each each) {
  for (int64_t w = 0; w < all.count && begin < end; ++w) {
    const Work& work = all.works[w];
    if (work.count == 0 || work.end[work.count - 1] <= begin) continue;
    int64_t i = std::upper_bound(work.end, work.end + work.count, begin) - work.end;
    for (; i < work.count && begin < end; ++i) {
      if (work.size[i] <= 0) continue;
      const int64_t start = work.end[i] - work.size[i];
      const int64_t stop = std::min(end, work.end[i]);
      each(work, i, begin - start, stop - start);
      begin = stop;
    }
  }
}

void region(int64_t begin, int64_t end, void* context) {
  walk(*static_cast<const Works*>(context), begin, end,
       [](const Work& work, int64_t i, int64_t first, int64_t last) {
         kPieces[work.param_type][work.state_type](work, i, first, last);
       });
}

// Running sums of the sizes; the number of elements in all.
int64_t lay_out(const Works& all) {
  int64_t total = 0;
  for (int64_t w = 0; w < all.count; ++w) {
    for (int64_t i = 0; i < all.works[w].count; ++i) {
      total += std::max<int64_t>(all.works[w].size[i], 0);
      all.works[w].end[i] = total;
    }
  }
  return total;
}

// Counts the step of every tensor that has a gradient: t ← t + 1, and [4] 1 − αᵗ.
template <class T>
void count_steps(const Work& work) {
  double last = -1, correction = 1;
  for (int64_t i = 0; i < work.count; ++i) {
    if (work.size[i] < 0) continue;
    T t;
    std::memcpy(&t, work.step[i], sizeof(t));
    t += 1;
    std::memcpy(work.step[i], &t, sizeof(t));
    if (work.bias_correction && double(t) != last) {
      last = double(t);
      correction = 1 - std::pow(work.alpha, last);
    }
    work.correction[i] = correction;
  }
}

// A forked child has the parent's OpenMP pool without its threads: a region there waits for ever (pytorch#17199).
std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
const int watched = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif

// Three arrays read and two of them written in place, with next to no arithmetic: the memory's own speed.
RMSPROP_CLONES void stream_part(float* p, const float* g, float* v, int64_t count) {
  RMSPROP_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    v[i] = v[i] + g[i];
    p[i] = p[i] - g[i];
  }
}

struct Stream {
  float* p;
  const float* g;
  float* v;
};

}  // namespace

RMSPROP_API int32_t rmsprop_step(Work* works, int64_t count, double found_inf, ParallelFor parallel_for,
                                 int64_t grain) {
  if (found_inf != 0) return 0;
  Works all{works, count};
  const int64_t total = lay_out(all);
  for (int64_t w = 0; w < count; ++w) {
    works[w].step_type == kFloat64 ? count_steps<double>(works[w]) : count_steps<float>(works[w]);
  }
  if (parallel_for == nullptr || total <= grain || forked.load(std::memory_order_relaxed)) {
    region(0, total, &all);
    return 0;
  }
  return parallel_for(0, total, grain, region, &all);
}

// For tests of the index arithmetic: the pieces of [begin, end) as rows of (work, tensor, first, last), without touching
// a tensor. Returns how many there are; writes at most `room` rows.
RMSPROP_API int64_t rmsprop_pieces(Work* works, int64_t count, int64_t begin, int64_t end, int64_t* rows, int64_t room) {
  Works all{works, count};
  lay_out(all);
  int64_t found = 0;
  walk(all, begin, end, [&](const Work& work, int64_t i, int64_t first, int64_t last) {
    if (found < room) {
      const int64_t row[4] = {&work - works, i, first, last};
      std::copy(row, row + 4, rows + 4 * found);
    }
    ++found;
  });
  return found;
}

// For bench.py: what a step would cost if it only moved its memory. Arrays of float32, aligned to 4 bytes.
RMSPROP_API int32_t rmsprop_stream(float* p, const float* g, float* v, int64_t count, ParallelFor parallel_for,
                                   int64_t grain) {
  Stream stream{p, g, v};
  const Body part = [](int64_t begin, int64_t end, void* context) {
    const Stream& s = *static_cast<const Stream*>(context);
    stream_part(s.p + begin, s.g + begin, s.v + begin, end - begin);
  };
  if (parallel_for != nullptr && count > grain) return parallel_for(0, count, grain, part, &stream);
  part(0, count, &stream);
  return 0;
}
