// A plan: where the tensors of an optimizer were last time, and the means to see that they are still there.
// Plain C, mirrored field by field in kernels/native.py.
#pragma once
#include "rmsprop.h"

// Functions of the running interpreter and of torch's C interface (aoti_torch/c/shim.h), handed in by address.
// Python objects are addresses; the caller holds the GIL and a reference to each.
struct Host {
  int64_t (*list_size)(void* list);
  void* (*list_item)(void* list, int64_t i);
  int32_t (*dict_next)(void* dict, int64_t* position, void** key, void** value);
  void* (*dict_item)(void* dict, void* key);
  int32_t (*layout)(void* tensor, int32_t* layout);
  int32_t (*device_type)(void* tensor, int32_t* device_type);
  int32_t (*dtype)(void* tensor, int32_t* dtype);
  int32_t (*dim)(void* tensor, int64_t* dim);
  int32_t (*sizes)(void* tensor, int64_t** sizes);
  int32_t (*strides)(void* tensor, int64_t** strides);
  int32_t (*data)(void* tensor, void** data);
  int64_t header;  // bytes of a PyObject before torch's own tensor in a Python tensor
  void* none;
  int32_t strided, cpu;
};

constexpr int kSlots = 5;  // step, square_avg, grad_avg, momentum_buffer, compensation

// One parameter: its Python objects and its shape.
struct Row {
  void* param;
  void* entry;          // its dict in optimizer.state; null: it has none, and had no gradient
  void* slot[kSlots];   // null: the rule keeps no such slot
  int64_t dim;
  const int64_t* shape; // sizes, then strides: of the parameter, its gradient and its slots alike
  int64_t size;         // elements
};

struct Group {
  void* params;  // the list in param_groups
  int64_t count;
  void* const* param;
};

struct Plan {
  const Host* host;
  void* state;  // optimizer.state, and its items in order
  int64_t items;
  void* const* keys;
  void* const* values;
  int64_t groups;
  const Group* group;
  void* slot_names[kSlots];
  int64_t works;
  Work* work;
  const Row* const* rows;          // [works][work.count]
  const int32_t* dtypes;           // [works][3] torch's codes: parameter, state, step
  const int64_t* const* places;    // [works][work.count] which of the gradients is the row's
  int64_t elements;                // in all works
  int64_t grain;                   // elements that one thread should have at least
  int64_t idle;                    // parameters without state
  const int64_t* idle_places;      // [idle]
  int64_t guarded;                 // whether a gradient that is not finite stops the step
  int64_t unfinite;                // which: rmsprop_unfinite
};

// What rmsprop_again says.
enum Again : int32_t {
  kMoved = 0,    // something differs: nothing was written
  kSame = 1,     // all is as it was; more than `grain` elements: call rmsprop_step, without the GIL
  kStepped = 2,  // all is as it was, and the step is done
  kStopped = 3,  // all is as it was, but the gradient `unfinite` stops the step: nothing was written
};

// Compares everything the plan knows with what is there today, notes today's addresses in the works, and steps there
// and then if the works hold few elements.
// gradients: a Python list, p.grad of every parameter of every group in order. Holds the GIL throughout.
// Returns an Again; `active` becomes the number of gradients that are not None.
RMSPROP_API int32_t rmsprop_again(Plan* plan, void* gradients, int64_t* active);
