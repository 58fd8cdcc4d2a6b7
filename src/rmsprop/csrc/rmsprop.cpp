// The step on a CPU: the nine lines (lines.h) in one pass over memory, one parallel region over all tensors.
//
// Plain C++17 behind a C interface. It needs no headers of torch or Python and links no library. It builds anywhere in
// seconds, is called through ctypes, and runs on torch's own threads through a function pointer.
//
// Compile with -ffp-contract=off. Every instruction set, split over threads and tail of a loop then rounds in the same
// way, and the same inputs give the same bits. Fused multiply-adds are explicit: `fused`.
// Never compile with -ffast-math: it is wrong for NaN, and switches the whole process to flush-to-zero.
#include "rmsprop.h"
#include "lines.h"
#include "norms.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace {

// One function for each pair of types and rounding, since the attribute does not apply to templates. A full state has the
// type of P or a wider one.
#define RMSPROP_ONE(clones, name, P, S, A, extra, write)                             \
  clones(void name(const Work& work, int64_t i, int64_t begin, int64_t end) {        \
    chosen<P, S, A, extra, write>(work, i, begin, end);                              \
  })
#define RMSPROP_PIECE(clones, name, P, T, A)                                         \
  RMSPROP_ONE(RMSPROP_CLONES, name, P, Full<T>, A, kPlain, kNearest)                 \
  RMSPROP_ONE(clones, name##_walled, P, Full<T>, A, kWalled, kNearest)               \
  RMSPROP_ONE(clones, name##_clipped, P, Full<T>, A, kClipped, kNearest)             \
  RMSPROP_ONE(clones, name##_capped, P, Full<T>, A, kCapped, kNearest)
#define RMSPROP_HALF(clones, name, P, S)                                             \
  RMSPROP_ONE(clones, name##_stochastic, P, S, float, kCapped, kStochastic)          \
  RMSPROP_ONE(clones, name##_compensated, P, S, float, kCapped, kCompensated)        \
  RMSPROP_ONE(clones, name##_both, P, S, float, kCapped, kBoth)
RMSPROP_PIECE(RMSPROP_CLONES, f32_f32, Float32, Float32, float)
RMSPROP_PIECE(RMSPROP_TWO_CLONES, f32_f64, Float32, Float64, float)
RMSPROP_PIECE(RMSPROP_TWO_CLONES, f64_f32, Float64, Float32, double)
RMSPROP_PIECE(RMSPROP_CLONES, f64_f64, Float64, Float64, double)
RMSPROP_PIECE(RMSPROP_CLONES, bf16_f32, BFloat16, Float32, float)
RMSPROP_PIECE(RMSPROP_TWO_CLONES, bf16_f64, BFloat16, Float64, float)
RMSPROP_PIECE(RMSPROP_TWO_CLONES, bf16_bf16, BFloat16, BFloat16, float)
RMSPROP_PIECE(RMSPROP_CLONES, f16_f32, Float16, Float32, float)
RMSPROP_PIECE(RMSPROP_TWO_CLONES, f16_f64, Float16, Float64, float)
RMSPROP_PIECE(RMSPROP_TWO_CLONES, f16_f16, Float16, Float16, float)
RMSPROP_HALF(RMSPROP_CLONES, bf16_f32, BFloat16, Full<Float32>)
RMSPROP_HALF(RMSPROP_TWO_CLONES, bf16_bf16, BFloat16, Full<BFloat16>)
RMSPROP_HALF(RMSPROP_CLONES, f16_f32, Float16, Full<Float32>)
RMSPROP_HALF(RMSPROP_TWO_CLONES, f16_f16, Float16, Full<Float16>)

// A narrowed state has few functions: with all of Extra or none, and for half precision with either rounding.
#define RMSPROP_NARROWED(name, P, T)                                                             \
  RMSPROP_ONE(RMSPROP_TWO_CLONES, name##_drawn, P, Narrowed<T>, float, kCapped, kStochastic)     \
  RMSPROP_ONE(RMSPROP_TWO_CLONES, name##_remembered, P, Narrowed<T>, float, kCapped, kBoth)
RMSPROP_ONE(RMSPROP_CLONES, f32_n16, Float32, Narrowed<BFloat16>, float, kPlain, kNearest)
RMSPROP_ONE(RMSPROP_CLONES, f32_n8, Float32, Narrowed<Float8>, float, kPlain, kNearest)
RMSPROP_ONE(RMSPROP_TWO_CLONES, f32_n16_capped, Float32, Narrowed<BFloat16>, float, kCapped, kNearest)
RMSPROP_ONE(RMSPROP_TWO_CLONES, f32_n8_capped, Float32, Narrowed<Float8>, float, kCapped, kNearest)
RMSPROP_ONE(RMSPROP_CLONES, bf16_n16_stochastic, BFloat16, Narrowed<BFloat16>, float, kPlain, kStochastic)
RMSPROP_ONE(RMSPROP_CLONES, bf16_n8_stochastic, BFloat16, Narrowed<Float8>, float, kPlain, kStochastic)
RMSPROP_NARROWED(bf16_n16, BFloat16, BFloat16)
RMSPROP_NARROWED(bf16_n8, BFloat16, Float8)
RMSPROP_NARROWED(f16_n16, Float16, BFloat16)
RMSPROP_NARROWED(f16_n8, Float16, Float8)

using Piece = void (*)(const Work&, int64_t, int64_t, int64_t);

// [parameter's type][state's type]; null: refused by kernels/cpu.py.
#define RMSPROP_TABLE(name, end)                                              \
  constexpr Piece name[4][4] = {                                              \
      {f32_f32##end, f32_f64##end, nullptr, nullptr},                         \
      {f64_f32##end, f64_f64##end, nullptr, nullptr},                         \
      {bf16_f32##end, bf16_f64##end, bf16_bf16##end, nullptr},                \
      {f16_f32##end, f16_f64##end, nullptr, f16_f16##end},                    \
  };
RMSPROP_TABLE(kPieces, )
RMSPROP_TABLE(kWalledPieces, _walled)
RMSPROP_TABLE(kClippedPieces, _clipped)
RMSPROP_TABLE(kCappedPieces, _capped)

// [parameter's type][average's type]
constexpr Piece kAverages[4][4] = {
    {average_f32_f32, average_f32_f64, nullptr, nullptr},
    {average_f64_f32, average_f64_f64, nullptr, nullptr},
    {average_bf16_f32, average_bf16_f64, average_bf16_bf16, nullptr},
    {average_f16_f32, average_f16_f64, nullptr, average_f16_f16},
};

// [rounding other than to nearest][float16, not bfloat16][state of the parameter's own type]
#define RMSPROP_HALVES(end) {{bf16_f32##end, bf16_bf16##end}, {f16_f32##end, f16_f16##end}}
constexpr Piece kHalves[3][2][2] = {RMSPROP_HALVES(_stochastic), RMSPROP_HALVES(_compensated), RMSPROP_HALVES(_both)};

// [bfloat16, not float32][float8, not bfloat16]
constexpr Piece kNarrowedPlain[2][2] = {{f32_n16, f32_n8}, {bf16_n16_stochastic, bf16_n8_stochastic}};

// [float8, not bfloat16]
constexpr Piece kNarrowedFloat[2] = {f32_n16_capped, f32_n8_capped};

// [float16, not bfloat16][compensated][float8, not bfloat16]
constexpr Piece kNarrowed[2][2][2] = {{{bf16_n16_drawn, bf16_n8_drawn}, {bf16_n16_remembered, bf16_n8_remembered}},
                                      {{f16_n16_drawn, f16_n8_drawn}, {f16_n16_remembered, f16_n8_remembered}}};

Piece narrowed_piece(const Work& work, bool plain) {
  const bool is_float8 = work.state_type == kFloat8, compensated = work.compensation != nullptr;
  if (work.param_type == kFloat32) return plain ? kNarrowedPlain[0][is_float8] : kNarrowedFloat[is_float8];
  if (work.param_type == kBFloat16 && plain && work.stochastic && !compensated) return kNarrowedPlain[1][is_float8];
  return kNarrowed[work.param_type == kFloat16][compensated][is_float8];
}

Piece piece_for(const Work& work, int64_t i) {
  const Extra extra = extra_for(work, i);
  if (work.narrowed) return narrowed_piece(work, extra == kPlain);
  if (work.compensation != nullptr || work.stochastic) {
    const int write = work.compensation == nullptr ? 0 : work.stochastic ? 2 : 1;
    return kHalves[write][work.param_type == kFloat16][work.state_type == work.param_type];
  }
  return (extra == kPlain     ? kPieces
          : extra == kWalled  ? kWalledPieces
          : extra == kClipped ? kClippedPieces
                              : kCappedPieces)[work.param_type][work.state_type];
}

// Calls each(work, tensor, first, last) for the tensors in [begin, end) of the concatenated elements of all works.
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
  const Works& all = *static_cast<const Works*>(context);
  const Modes own(all.modes);
  walk(all, begin, end,
       [](const Work& work, int64_t i, int64_t first, int64_t last) {
         const Piece piece = piece_for(work, i);
         if (work.ema == nullptr || work.ema_weight[i] < 0) return piece(work, i, first, last);
         for (int64_t next; first < last; first = next) {
           next = std::min(first + kAveraged, last);
           piece(work, i, first, next);
           kAverages[work.param_type][work.ema_type](work, i, first, next);
         }
       });
}

// Computes the running sums of the sizes. Returns the total number of elements.
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

// Increments the step of every tensor that has a gradient, and computes 1 − αᵗ of [4], 1 − d of [10] and the random keys.
template <class T>
void count_steps(const Work& work) {
  double last = -1, correction = 1, share = 0;
  for (int64_t i = 0; i < work.count; ++i) {
    if (work.size[i] < 0) continue;
    T t;
    std::memcpy(&t, work.step[i], sizeof(t));
    t += 1;
    std::memcpy(work.step[i], &t, sizeof(t));
    if (double(t) != last) {
      last = double(t);
      if (work.bias_correction) correction = 1 - std::pow(work.alpha, last);
      if (work.ema != nullptr) share = share_at(work, int64_t(t));
    }
    work.correction[i] = correction;
    if (work.ema != nullptr) work.ema_weight[i] = share;
    if (work.stochastic || work.narrowed) {
      const uint64_t own = work.random_key[i], count = uint64_t(t);
      work.key[2 * i] = mix(uint32_t(own) + uint32_t(count) * 0x9e3779b9u, uint32_t(count >> 32));
      work.key[2 * i + 1] = mix(uint32_t(own >> 32) ^ work.key[2 * i], 0);
    }
  }
}

// Returns whether one of the elements [begin, end) is NaN or infinite.
template <class P>
RMSPROP_INLINE bool any_unfinite(const char* g, int64_t begin, int64_t end) {
  using Word = typename P::Word;
  constexpr int64_t size = sizeof(Word), page = 4096, line = 64, block = 4 * line / size;
  Word bad = 0;
  while (begin < end) {
    const int64_t stop = std::min(end, begin + block);
    // prefetching a page ahead, a core reads 14 GB/s instead of 11
    for (int64_t byte = 0; byte < 4 * line; byte += line) RMSPROP_PREFETCH_READ(g + begin * size + page + byte);
    for (int64_t i = begin; i < stop; ++i) {
      Word x;
      std::memcpy(&x, g + i * size, sizeof(x));
      bad |= Word((x & P::kInfinity) == P::kInfinity);
    }
    begin = stop;
  }
  return bad != 0;
}

#define RMSPROP_LOOK(name, P) \
  RMSPROP_CLONES(bool name(const char* g, int64_t begin, int64_t end) { return any_unfinite<P>(g, begin, end); })
RMSPROP_LOOK(unfinite_f32, Float32)
RMSPROP_LOOK(unfinite_f64, Float64)
RMSPROP_LOOK(unfinite_bf16, BFloat16)
RMSPROP_LOOK(unfinite_f16, Float16)

constexpr bool (*kLooks[4])(const char*, int64_t, int64_t) = {unfinite_f32, unfinite_f64, unfinite_bf16, unfinite_f16};

// The data that the threads of one scan share.
struct Look {
  Works all;
  std::atomic<int64_t> found;  // the first tensor so far, counted over all works
};

void look(int64_t begin, int64_t end, void* context) {
  Look& shared = *static_cast<Look*>(context);
  walk(shared.all, begin, end, [&](const Work& work, int64_t i, int64_t first, int64_t last) {
    const char* g = static_cast<const char*>(work.grad[i]);
    if (!kLooks[work.param_type](g, first, last)) return;
    int64_t place = i;
    for (const Work* w = shared.all.works; w != &work; ++w) place += w->count;
    int64_t known = shared.found.load();
    while (place < known && !shared.found.compare_exchange_weak(known, place)) {
    }
  });
}

// A forked child has the parent's OpenMP pool without its threads, so a parallel region hangs (pytorch#17199).
std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
const int watched = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif

// Reads three arrays and writes two of them in place, with almost no arithmetic: the speed of memory.
RMSPROP_INLINE void streamed(float* p, const float* g, float* v, int64_t count) {
  RMSPROP_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    v[i] = v[i] + g[i];
    p[i] = p[i] - g[i];
  }
}

RMSPROP_CLONES(void stream_part(float* p, const float* g, float* v, int64_t count) { streamed(p, g, v, count); })

struct Stream {
  float* p;
  const float* g;
  float* v;
};

}  // namespace

RMSPROP_API int32_t rmsprop_interface() { return kInterface; }

RMSPROP_API int32_t rmsprop_step(Work* works, int64_t count, double found_inf, ParallelFor parallel_for,
                                 int64_t grain) {
  if (found_inf != 0) return 0;
  Works all{works, count, modes()};
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

RMSPROP_API int32_t rmsprop_norms(Work* works, int64_t count, double* total, ParallelFor parallel_for,
                                  int64_t grain) {
  Sums shared{{works, count, modes()}, nullptr};
  int64_t blocks = 0;
  for (int64_t w = 0; w < count; ++w) {
    for (int64_t i = 0; i < works[w].count; ++i) {
      if (works[w].coefficient != nullptr) {
        blocks += blocks_of(works[w], i);
        works[w].correction[i] = works[w].coefficient[2 * i] = works[w].coefficient[2 * i + 1] = 1;
      }
      works[w].end[i] = blocks;
    }
  }
  constexpr int64_t few = 512;
  double own[few];
  shared.sum = blocks <= few ? own : static_cast<double*>(std::malloc(size_t(blocks) * sizeof(double)));
  if (shared.sum == nullptr) return -2;
  int32_t failed = 0;
  if (parallel_for == nullptr || blocks * kSummed <= grain || forked.load(std::memory_order_relaxed)) {
    sum_blocks(0, blocks, &shared);
  } else {
    failed = parallel_for(0, blocks, std::max<int64_t>(grain / kSummed, 1), sum_blocks, &shared);
  }
  const bool finite = !failed && bound_norms(shared.all, shared.sum, total);
  if (shared.sum != own) std::free(shared.sum);
  return failed ? -2 : !finite;
}

RMSPROP_API int64_t rmsprop_unfinite(Work* works, int64_t count, ParallelFor parallel_for, int64_t grain) {
  constexpr int64_t none = std::numeric_limits<int64_t>::max();
  Look shared{{works, count}, {none}};
  const int64_t total = lay_out(shared.all);
  if (parallel_for == nullptr || total <= grain || forked.load(std::memory_order_relaxed)) {
    look(0, total, &shared);
  } else if (parallel_for(0, total, grain, look, &shared)) {
    return -2;
  }
  return shared.found == none ? -1 : shared.found.load();
}

// For tests of the index arithmetic: writes the pieces of [begin, end) as rows of (work, tensor, first, last), without
// accessing a tensor. Returns the number of pieces; writes at most `room` rows.
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

// For benchmarks: the cost of a step that only moves memory. Arrays of float32, aligned to 4 bytes.
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
