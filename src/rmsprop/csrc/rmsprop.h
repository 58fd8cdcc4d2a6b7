// What the kernel is given: plain C, mirrored field by field in kernels/native.py.
#pragma once
#include <cstdint>

// Element types, in the order of kernels/native.py TYPES.
enum Type : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Where ε stands in [6], in the order of spec.py EPS_MODES.
enum EpsMode : int32_t { kOutside, kInside, kBoth, kFloor };

// Tensors that share a rule, its numbers and their types.
struct Work {
  double lr, alpha, eps, momentum, weight_decay;  // today's numbers; [8] runs where has_momentum says so
  double scale;                                   // every gradient is multiplied by it: 1/loss scale · clip coefficient
  double cap;                                     // max_update: bounds [2], [7] and [9]; infinity where there is none
  int32_t param_type, state_type, step_type;
  int32_t eps_mode, centered, has_momentum, nesterov, lr_in_buffer, decoupled, bias_correction, maximize;
  int32_t stochastic;      // half precision is rounded by random bits, which follow from `random_key`
  int64_t count;           // tensors
  const int64_t* size;     // [count] elements of each; -1: it has no gradient today and is left alone
  void* const* param;      // [count] addresses; each tensor's elements lie dense, in one order for all of its slots
  const void* const* grad;
  void* const* square_avg;
  void* const* grad_avg;   // read only if centered
  void* const* momentum_buffer;
  void* const* compensation;  // null, or what the rounding of the parameter left over, in its type (times kRestScale)
  void* const* step;       // [count] one float32 or float64 each
  int64_t* end;            // [count] scratch: running sum of size, over all works of a call
  double* correction;      // [count] scratch: 1 − αᵗ, or 1
  const uint64_t* random_key;  // [count] read only if stochastic: spec.py random_key
  uint32_t* key;           // [2·count] scratch, if stochastic: of the words of this step
};

// torch_parallel_for (torch/csrc/stable/c/shim.h), handed in by address: no library of threads is linked.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

#if defined(_WIN32)
#define RMSPROP_API extern "C" __declspec(dllexport)
#else
#define RMSPROP_API extern "C" __attribute__((visibility("default")))
#endif

// Advances every tensor of every work by one step, in place; gradients are only read. Returns 0.
//
// found_inf: if it is not 0 (it may be a sum over devices, or NaN) nothing is written and no step is counted.
// parallel_for: may be null. grain: elements that one thread should have at least.
RMSPROP_API int32_t rmsprop_step(Work* works, int64_t count, double found_inf, ParallelFor parallel_for, int64_t grain);

// The first tensor, in the order of the works, whose gradient holds NaN or infinity, counted over all works; -1: none.
// -2: the threads failed. Writes nothing but scratch.
RMSPROP_API int64_t rmsprop_unfinite(Work* works, int64_t count, ParallelFor parallel_for, int64_t grain);
