// A plan: where the tensors of an optimizer were last time, and the means to validate everything today.
// Plain C, mirrored field by field in kernels/native.py.
#pragma once
#include "rmsprop.h"

// Functions of the running interpreter and of torch's C interface (aoti_torch/c/shim.h), handed in by address.
// Python objects are addresses; the caller holds the GIL, and references for the length of a call alone.
struct Host {
  int64_t (*list_size)(void* list);
  void* (*list_item)(void* list, int64_t i);
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
  int64_t type;        // bytes of a Python object before the address of its type
  int64_t header;      // and before torch's own tensor in a Python tensor
  int64_t keys;        // bytes of a TensorImpl before its set of dispatch keys
  void* none;
  void* dict;          // the type that a state entry must be, no subclass
  void* tensor;        // the two types of a plain tensor
  void* parameter;
  uint64_t plain;      // the dispatch keys of a dense tensor on the device: no lazy view, no subclass, not sparse
  uint64_t inference;  // and of one that was made under torch.inference_mode
};

// What one parameter brings, in the order of Bucket.lists() in bucket.py.
enum Kept { kParam, kGrad, kSquareAvg, kGradAvg, kMomentumBuffer, kStep, kCompensation, kTensors };

// Written memory [begin, end).
struct Span {
  uint64_t begin, end;
};

struct Plan {
  const Host* host;
  int64_t params;               // of all groups
  int64_t items;                // of the state that are looked at
  const int64_t* item;          // [items] which parameter's entry that is; -1: none's
  const int64_t* entry_size;    // [items] names in it
  void** entry;                 // [params] scratch
  void* slot_names[kTensors];
  int64_t works;
  Work* work;
  const int32_t* kinds;         // [works][4] torch's dtypes of parameter, state and step; the device's index, or -1
  const int64_t* const* place;  // [works][work.count] which of the parameters is the row's
  void* const* spread_slot;     // [params][kTensors] or null: a slot that is spread over processes (shards.py), and
  void* const* spread_shard;    // the tensor that stands in its place
  int64_t elements;             // in all works
  int64_t grain;                // elements that one thread should have at least; -1: the caller steps
  int64_t idle;                 // parameters without state
  const int64_t* idle_place;    // [idle]
  Span* span;                   // [6 * rows] scratch: what is written, sorted
  int64_t spans;
  int64_t apart;                // whether all that is written was apart, and apart from the gradients
  int64_t guarded;              // whether a gradient that is not finite stops the step
  int64_t unfinite;             // which: rmsprop_unfinite
  int64_t active;               // parameters that have a gradient today
  int64_t inferred;             // of those, made under torch.inference_mode
};

// What rmsprop_again returns.
enum Again : int32_t {
  kMoved = 0,    // something differs: nothing was written
  kSame = 1,     // all is as it was: the caller counts the writes and calls rmsprop_step, without the GIL
  kStepped = 2,  // all is as it was, the writes are counted and the step is done
  kStopped = 3,  // all is as it was, but the gradient `unfinite` stops the step: nothing was written
};

// Validates everything there is today, notes today's addresses in the works, and steps there and then if the works hold
// few elements.
// params, gradients: Python lists of the stepped tensors of all groups in order, and of each its gradient or None.
// keys: the same parameters as they stand in the groups. state: a dict.
RMSPROP_API int32_t rmsprop_again(Plan* plan, void* params, void* keys, void* gradients, void* state);

// Whether all that the works write is apart in memory, and apart from the gradients; by the addresses in them: 1 or 0.
RMSPROP_API int32_t rmsprop_apart(Plan* plan);

// Whether all tensors of a bucket are plain, of those kinds, in one dense layout each, and apart in memory: 1 or 0.
// lists: [kTensors] Python lists of `count` tensors, or null. kinds: as in a plan. types: ours, of parameters, state and
// steps. span: [6 * count] scratch.
RMSPROP_API int32_t rmsprop_plain(const Host* host, void* const* lists, int64_t count, const int32_t* kinds,
                                  const int32_t* types, Span* span);
