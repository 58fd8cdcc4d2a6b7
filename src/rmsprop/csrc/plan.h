// A plan: the locations of an optimizer's tensors in the last step, and the means to validate them in the next.
// Plain C, mirrored field by field in kernels/native.py.
#pragma once
#include "rmsprop.h"

// Functions of the running interpreter and of torch's C interface (aoti_torch/c/shim.h), passed by address.
// Python objects are addresses. The caller holds the GIL, and holds references for the length of a call.
struct Host {
  int64_t (*list_size)(void* list);
  void* (*list_item)(void* list, int64_t i);
  int32_t (*list_append)(void* list, void* object);
  int64_t (*dict_size)(void* dict);
  int32_t (*dict_next)(void* dict, int64_t* position, void** key, void** value);
  void* (*dict_item)(void* dict, void* key);
  int32_t (*device_index)(void* tensor, int32_t* index);
  int32_t (*dtype)(void* tensor, int32_t* dtype);
  int32_t (*dim)(void* tensor, int64_t* dim);
  int32_t (*sizes)(void* tensor, int64_t** sizes);
  int32_t (*strides)(void* tensor, int64_t** strides);
  int32_t (*data)(void* tensor, void** data);
  void (*bump)(void* const* tensor);  // torch::autograd::impl::bump_version; null: the caller counts writes
  int64_t type;        // offset of the type in a Python object
  int64_t header;      // offset of torch's own tensor in a Python tensor
  int64_t keys;        // offset of the dispatch keys in a TensorImpl
  void* none;
  void* dict;          // the exact type of a state entry
  void* tensor;        // the two types of a plain tensor
  void* parameter;
  uint64_t plain;      // dispatch keys of a dense tensor on the device: not a lazy view, a subclass or sparse
  uint64_t inference;  // the same for one made under torch.inference_mode
};

// The tensors of one parameter, in the order of Bucket.lists() in bucket.py.
enum Kept { kParam, kGrad, kSquareAvg, kGradAvg, kMomentumBuffer, kStep, kCompensation, kEma, kTensors };

// The types of a bucket: of parameters, gradients and compensation; of square_avg; of grad_avg and momentum_buffer; of
// steps; of ema. kKinds: with the device's index behind them.
enum Typed { kOfParam, kOfSquareAvg, kOfOthers, kOfStep, kOfEma, kTypes, kKinds };

// Written memory [begin, end).
struct Span {
  uint64_t begin, end;
};

struct Plan {
  const Host* host;
  int64_t params;               // of all groups
  int64_t items;                // of the state that are checked
  const int64_t* item;          // [items] index of the entry's parameter; -1: none
  const int64_t* entry_size;    // [items] number of names in the entry
  void** entry;                 // [params] scratch
  void* slot_names[kTensors];
  int64_t works;
  Work* work;
  const int32_t* kinds;         // [works][kKinds] torch's dtypes by Typed; the device's index, or -1
  const int64_t* const* place;  // [works][work.count] index of the row's parameter
  void* const* spread_slot;     // [params][kTensors] or null: a slot that is a DTensor (shards.py), and
  void* const* spread_shard;    // the shard that replaces it
  int64_t elements;             // in all works
  int64_t serial_limit;         // of more elements the caller steps, on several threads; -1: always
  int64_t idle;                 // parameters without state
  const int64_t* idle_place;    // [idle]
  Span* span;                   // [7 * rows] scratch: written memory, sorted
  void* stepping;               // a list, which receives the slots that the caller steps
  int64_t spans;
  int64_t apart;                // whether written memory did not overlap, with itself or the gradients
  int64_t normed;               // whether a work has coefficients of norms
  double norm;                  // the last total of rmsprop_norms
  int64_t guarded;              // whether a gradient that is not finite stops the step
  int64_t unfinite;             // result of rmsprop_unfinite
  int64_t active;               // number of parameters that have a gradient
  int64_t inferred;             // number of those made under torch.inference_mode
};

// Results of rmsprop_again.
enum Again : int32_t {
  kMoved = 0,    // the plan is not valid: nothing was written
  kSame = 1,     // the plan is valid: the caller counts the writes and calls rmsprop_step, without the GIL
  kStepped = 2,  // the plan is valid, the writes are counted and the step is done
  kStopped = 3,  // the plan is valid, but the gradient `unfinite` stops the step: nothing was written
};

// Validates the plan, stores the current addresses in the works, and steps at once if the works hold few elements.
// params, gradients: Python lists of the stepped tensors of all groups in order, and of their gradients or None.
// keys: the same parameters as the groups list them. state: a dict.
RMSPROP_API int32_t rmsprop_again(Plan* plan, void* params, void* keys, void* gradients, void* state);

// Returns 1 if the memory that the works write does not overlap, with itself or the gradients, else 0.
RMSPROP_API int32_t rmsprop_apart(Plan* plan);

// Returns 1 if all tensors of a bucket are plain, of these kinds, in one dense layout per parameter, and do not overlap,
// else 0.
// lists: [kTensors] Python lists of `count` tensors, or null. kinds: as in a plan. types: [kTypes] each a Type.
// span: [7 * count] scratch.
RMSPROP_API int32_t rmsprop_plain(const Host* host, void* const* lists, int64_t count, const int32_t* kinds,
                                  const int32_t* types, Span* span);
