// The kernel's interface, in plain C, mirrored field by field in kernels/native.py.
#pragma once
#include <cstdint>

// Raised with every change of a structure or function here or in plan.h: kernels/native.py refuses another number.
constexpr int32_t kInterface = 2;

// Element types, in the order of kernels/native.py SLOT_TYPES. kFloat8 is for square_avg of a narrowed state alone.
enum Type : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16, kFloat8 };

// The position of ε in [6], in the order of spec.py EPS_MODES.
enum EpsMode : int32_t { kOutside, kInside, kBoth, kFloor };

// The warm-up of the decay in [10], in the order of spec.py EMA_WARMUPS.
enum Warmup : int32_t { kConstant, kTensorFlow, kTimm };

// Tensors that share a rule, its numbers and their types.
struct Work {
  double lr, alpha, eps, momentum, weight_decay;  // numbers of the step; has_momentum, not momentum, enables [8]
  double scale;                                   // factor of every gradient: 1/loss scale
  double cap;                                     // max_update, M in [7] and [9]; infinity if not given; else [2] too
  double clip_value, clip_norm, clip_global_norm, clip_weights;  // tensors/clipping.py; infinity if not given
  double ema_decay;                               // [10]: spec.py Averaging
  int32_t param_type;  // of gradients and compensation too
  int32_t state_type;  // of square_avg
  int32_t other_type;  // of grad_avg and momentum_buffer: as state_type, or bfloat16 if narrowed
  int32_t ema_type, step_type;
  int32_t eps_mode, centered, has_momentum, nesterov, lr_in_buffer, decoupled, bias_correction, maximize;
  int32_t clip_after_decay, clip_value_last, ema_warmup;
  int32_t stochastic;      // half precision is rounded stochastically, by bits derived from `random_key`
  int32_t narrowed;        // so is the state, which is in bfloat16, or square_avg in float8
  int64_t ema_start, ema_interval;
  int64_t count;           // number of tensors
  const int64_t* size;     // [count] elements of each; -1: it has no gradient and is skipped
  void* const* param;      // [count] addresses; elements are dense, in the same order in all tensors of a parameter
  const void* const* grad;
  void* const* square_avg;
  void* const* grad_avg;   // read only if centered
  void* const* momentum_buffer;
  void* const* ema;        // null: no average of the weights
  void* const* compensation;  // null, or Kahan remainders of the parameters, in their type, times kRestScale
  void* const* step;       // [count] one float32 or float64 each
  int64_t* end;            // [count] scratch: running sum of size, over all works of a call
  double* correction;      // [count] scratch: 1 − αᵗ, or 1
  double* ema_weight;      // [count] scratch, read only with ema: 1 − d of [10], or -1 if this step does not average
  double* coefficient;     // [2·count] scratch, null without norms: two factors that bound a gradient's norms
  const uint64_t* random_key;  // [count] read only if stochastic or narrowed: spec.py random_key
  uint32_t* key;           // [2·count] scratch, if random_key is read: keys of the random bits of this step
};

// torch_parallel_for (torch/csrc/stable/c/shim.h), passed by address, so that no threading library is linked.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

#if defined(_WIN32)
#define RMSPROP_API extern "C" __declspec(dllexport)
#else
#define RMSPROP_API extern "C" __attribute__((visibility("default")))
#endif

// Returns kInterface.
RMSPROP_API int32_t rmsprop_interface();

// Advances every tensor of every work by one step, in place; gradients are only read. Returns 0.
//
// found_inf: if not 0 (it may be a sum over devices, or NaN), nothing is written and no step is counted.
// parallel_for: may be null. grain: minimum number of elements per thread.
RMSPROP_API int32_t rmsprop_step(Work* works, int64_t count, double found_inf, ParallelFor parallel_for, int64_t grain);

// Writes the coefficients of clip_norm and clip_global_norm, before rmsprop_step, and nothing else.
//
// total: the norm over the gradients of all works with clip_global_norm, before it bounds them; unchanged without any.
// Returns 0: all gradients are finite; 1: one may not be; -2: the threads failed. A norm is the same number for any number of
// threads and instruction set.
RMSPROP_API int32_t rmsprop_norms(Work* works, int64_t count, double* total, ParallelFor parallel_for, int64_t grain);

// Returns the index over all works of the first tensor whose gradient holds NaN or infinity; -1: none; -2: the threads
// failed. Writes only scratch.
RMSPROP_API int64_t rmsprop_unfinite(Work* works, int64_t count, ParallelFor parallel_for, int64_t grain);
