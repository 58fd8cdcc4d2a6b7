// What surrounds the nine lines: norms of gradients and the factors that bound them before, [10] after; what a region shares.
#pragma once
#include "lines.h"

#include <algorithm>

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace {

// A thread's floating-point modes: flushing of subnormals (torch.set_flush_denormal) and rounding. Threads of a pool keep
// the modes of their creation, so a region sets its caller's. Otherwise results would depend on the threads.
#if defined(__SSE2__) || defined(_M_X64)
constexpr uint64_t kModes = 0xe040;
uint64_t modes() { return _mm_getcsr(); }
void set_modes(uint64_t word) { _mm_setcsr(uint32_t(word)); }
#elif defined(__aarch64__)
constexpr uint64_t kModes = 0x1c80000;
uint64_t modes() {
  uint64_t word;
  __asm__ volatile("mrs %0, fpcr" : "=r"(word));
  return word;
}
void set_modes(uint64_t word) { __asm__ volatile("msr fpcr, %0" ::"r"(word)); }
#else
constexpr uint64_t kModes = 0;
uint64_t modes() { return 0; }
void set_modes(uint64_t) {}
#endif

class Modes {
 public:
  explicit Modes(uint64_t wanted) : before_(modes()), other_((before_ ^ wanted) & kModes) {
    if (other_) set_modes(before_ ^ other_);
  }
  ~Modes() {
    if (other_) set_modes(before_);
  }
  Modes(const Modes&) = delete;
  Modes& operator=(const Modes&) = delete;

 private:
  const uint64_t before_, other_;
};

struct Works {
  Work* works;
  int64_t count;
  uint64_t modes = 0;  // the caller's
};

// Elements whose squares are summed at once. The sums of blocks do not depend on the threads that make them.
constexpr int64_t kSummed = 4096;

// Returns the sum of squares of the gradients [begin, end), as the step would take them, in an order of its own.
template <class P, class A>
RMSPROP_INLINE double squares(const Numbers<A>& n, const char* p, const char* g, int64_t begin, int64_t end) {
  constexpr int64_t lanes = 32;  // for every instruction set
  double sum[lanes] = {};
  constexpr int64_t page = 4096, line = 64, size = sizeof(typename P::Bits);
  const A scale = n.scale, early = n.early, value = n.value;
  const char* const pull = early != 0 ? p : g;  // parameters are not read in vain
  const auto one = [&](int64_t i) {
    const double x = double(prepared(load<P>(g, i) * scale, load<P>(pull, i), early, value));
    return x * x;
  };
  for (; begin + lanes <= end; begin += lanes) {
    for (int64_t byte = 0; byte < lanes * size; byte += line) RMSPROP_PREFETCH_READ(g + begin * size + page + byte);
    RMSPROP_INDEPENDENT
    for (int64_t j = 0; j < lanes; ++j) sum[j] += one(begin + j);
  }
  for (int64_t j = 0; begin + j < end && !RMSPROP_BROKEN(11); ++j) sum[j] += one(begin + j);
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sum[j] += sum[j + half];
  }
  return sum[0];
}

#define RMSPROP_SQUARES(name, P, A)                                                                            \
  RMSPROP_CLONES(double name(const Work& work, int64_t i, int64_t begin, int64_t end) {                        \
    return squares<P, A>(Numbers<A>().of(work, i), static_cast<const char*>(work.param[i]),                    \
                         static_cast<const char*>(work.grad[i]), begin, end);                                  \
  })
RMSPROP_SQUARES(squares_f32, Float32, float)
RMSPROP_SQUARES(squares_f64, Float64, double)
RMSPROP_SQUARES(squares_bf16, BFloat16, float)
RMSPROP_SQUARES(squares_f16, Float16, float)

constexpr double (*kSquares[4])(const Work&, int64_t, int64_t, int64_t) = {squares_f32, squares_f64, squares_bf16,
                                                                          squares_f16};

// Elements that are stepped before they are averaged, so that [10] finds the parameter in the nearest cache.
constexpr int64_t kAveraged = 512;

// [10] over the elements [begin, end) of tensor i, which the step has just written: the average of the weights as stored.
template <class P, class S, class A>
RMSPROP_INLINE void average(const Work& work, int64_t i, int64_t begin, int64_t end) {
  const auto* const p = static_cast<const char*>(work.param[i]);
  auto* const e = static_cast<char*>(work.ema[i]);
  const double own = RMSPROP_BROKEN(12) ? 1 - work.ema_weight[i] : work.ema_weight[i];
  // from the nearer of the two: a share of 1 copies, and equal weights stay equal
  const A share = A(own), decay = A(1 - own), from_p = A(own > 0.5), weight = own > 0.5 ? -decay : share;
  while (begin < end) {
    const int64_t stop = std::min(end, begin + kBlock);
    ask_for<S>(e, begin, kAveraged);  // of the next call
    RMSPROP_INDEPENDENT
    for (int64_t k = begin; k < stop; ++k) {
      const A now = load<P>(p, k), old = A(load<S>(e, k)), apart = now - old;
      const A near = fused(weight, apart, from_p != 0 ? now : old);
      store<S>(e, k, apart - apart == 0 ? near : decay * old + share * now);  // inf and NaN as in the equation
    }
    begin = stop;
  }
}

#define RMSPROP_AVERAGE(clones, name, P, S, A) \
  clones(void name(const Work& work, int64_t i, int64_t begin, int64_t end) { average<P, S, A>(work, i, begin, end); })
RMSPROP_AVERAGE(RMSPROP_CLONES, average_f32_f32, Float32, Float32, float)
RMSPROP_AVERAGE(RMSPROP_TWO_CLONES, average_f32_f64, Float32, Float64, float)
RMSPROP_AVERAGE(RMSPROP_TWO_CLONES, average_f64_f32, Float64, Float32, double)
RMSPROP_AVERAGE(RMSPROP_CLONES, average_f64_f64, Float64, Float64, double)
RMSPROP_AVERAGE(RMSPROP_CLONES, average_bf16_f32, BFloat16, Float32, float)
RMSPROP_AVERAGE(RMSPROP_TWO_CLONES, average_bf16_f64, BFloat16, Float64, float)
RMSPROP_AVERAGE(RMSPROP_TWO_CLONES, average_bf16_bf16, BFloat16, BFloat16, float)
RMSPROP_AVERAGE(RMSPROP_CLONES, average_f16_f32, Float16, Float32, float)
RMSPROP_AVERAGE(RMSPROP_TWO_CLONES, average_f16_f64, Float16, Float64, float)
RMSPROP_AVERAGE(RMSPROP_TWO_CLONES, average_f16_f16, Float16, Float16, float)

// Returns 1 − d of [10] at step t, or -1 if the step does not average: spec.py Averaging.
inline double share_at(const Work& work, int64_t t) {
  if (t <= work.ema_start) return 1;
  const int64_t since = t - work.ema_start, k = since / work.ema_interval;
  if (since % work.ema_interval != 0) return -1;
  const double count = double(k);
  if (work.ema_warmup == kTensorFlow) return 1 - std::min(work.ema_decay, (1 + count) / (10 + count));
  if (work.ema_warmup == kTimm) return 1 - std::min(work.ema_decay, 1 - std::pow(count, -2.0 / 3));
  return k > 1 ? 1 - work.ema_decay : 1;
}

// The sums of all blocks of the tensors whose norms are taken, in order; `end` of the works counts blocks.
struct Sums {
  Works all;
  double* sum;
};

int64_t blocks_of(const Work& work, int64_t i) { return (std::max<int64_t>(work.size[i], 0) + kSummed - 1) / kSummed; }

void sum_blocks(int64_t begin, int64_t end, void* context) {
  const Sums& shared = *static_cast<const Sums*>(context);
  const Modes own(shared.all.modes);
  for (int64_t w = 0; w < shared.all.count && begin < end; ++w) {
    const Work& work = shared.all.works[w];
    if (work.coefficient == nullptr || work.count == 0 || work.end[work.count - 1] <= begin) continue;
    int64_t i = std::upper_bound(work.end, work.end + work.count, begin) - work.end;
    for (; i < work.count; ++i) {
      for (const int64_t start = work.end[i] - blocks_of(work, i); begin < std::min(end, work.end[i]); ++begin) {
        const int64_t first = (begin - start) * kSummed;
        shared.sum[begin] = kSquares[work.param_type](work, i, first, std::min(first + kSummed, work.size[i]));
      }
    }
  }
}

// Returns the norm of a float64 gradient whose squares overflow or vanish.
double scaled_norm(const Work& work, int64_t i) {
  const Numbers<double> n = Numbers<double>().of(work, i);
  const auto* p = static_cast<const double*>(work.param[i]);
  const auto* g = static_cast<const double*>(work.grad[i]);
  const auto one = [&](int64_t k) { return prepared(g[k] * n.scale, n.early != 0 ? p[k] : 0, n.early, n.value); };
  double largest = 0, sum = 0;
  for (int64_t k = 0; k < work.size[i]; ++k) {
    const double x = std::fabs(one(k));
    largest = x > largest || x != x ? x : largest;
  }
  if (largest == 0 || largest - largest != 0) return largest;
  for (int64_t k = 0; k < work.size[i]; ++k) sum += (one(k) / largest) * (one(k) / largest);
  return largest * std::sqrt(sum);
}

// Whether a sum of squares has neither overflowed nor lost digits. False for NaN.
bool safe(double sum) { return sum > 1e-280 && sum < 1e300; }

// Multiplies a tensor's two factors so that a norm keeps its bound. A norm of NaN makes NaN of the gradient.
void bound(double norm, double limit, double* factors) {
  if (norm <= limit) return;
  const double held = std::max(limit / norm, kSmallest);  // in two, since the arithmetic's type has fewer numbers
  const double rest = limit / held / norm;
  factors[1] *= factors[0] == 1 ? rest : held * rest;
  factors[0] = factors[0] == 1 ? held : factors[0];
}

// Calls each(work, tensor) for the tensors whose norms are taken; `together`: those of the global norm.
template <class Each>
void normed(const Works& all, bool together, Each each) {
  for (int64_t w = 0; w < all.count; ++w) {
    const Work& work = all.works[w];
    if (work.coefficient == nullptr || (together && std::isinf(work.clip_global_norm))) continue;
    for (int64_t i = 0; i < work.count; ++i) {
      if (work.size[i] >= 0) each(work, i);
    }
  }
}

// Turns the blocks' sums into factors. Returns whether they show that all gradients are finite.
bool bound_norms(const Works& all, double* sum, double* total) {
  bool finite = true;
  for (int64_t w = 0; w < all.count; ++w) {  // gradients that no norm shows
    const Work& work = all.works[w];
    finite = finite && work.coefficient != nullptr && (work.clip_value_last || std::isinf(work.clip_value));
  }
  double largest = -1, squares = 0, together = 0;
  const double* next = sum;
  normed(all, false, [&](const Work& work, int64_t i) {
    double own = 0;
    for (int64_t k = blocks_of(work, i); k > 0; --k) own += *next++;
    double norm = safe(own) || work.param_type != kFloat64 ? std::sqrt(own) : scaled_norm(work, i);
    finite = finite && norm - norm == 0;
    bound(norm, work.clip_norm, work.coefficient + 2 * i);
    if (std::isinf(work.clip_global_norm)) return;
    norm = norm > work.clip_norm ? work.clip_norm : norm;
    work.correction[i] = norm;
    largest = norm > largest || norm != norm ? norm : largest;
    squares += norm * norm;
  });
  if (largest == -1) return finite;  // no global norm
  *total = std::sqrt(squares);
  if (!safe(squares) && largest != 0 && largest - largest == 0) {
    normed(all, true, [&](const Work& work, int64_t i) {
      together += (work.correction[i] / largest) * (work.correction[i] / largest);
    });
    *total = largest * std::sqrt(together);
  }
  normed(all, true, [&](const Work& work, int64_t i) { bound(*total, work.clip_global_norm, work.coefficient + 2 * i); });
  return finite;
}

}  // namespace
