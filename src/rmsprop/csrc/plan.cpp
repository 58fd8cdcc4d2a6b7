// Is the plan still true? One look per step, in a few nanoseconds per tensor: from Python each question costs fifty.
//
// Nothing is remembered by address alone: the plan's owner holds a reference to every object whose address is compared
// here, so an address cannot have been given to another. Gradients are not held, and are looked at in full.
#include "plan.h"

#include <cstring>

namespace {

// torch's handle of a Python tensor: kernels/native.py has seen that it stands behind the object's header.
void* handle(const Host& host, void* object) { return static_cast<char*>(object) + host.header; }

// Whether a tensor is dense on the CPU with that dtype and shape; its first element's address. `before`: where it was
// last time, for a tensor whose identity is known: memory that stayed did not change its device.
bool found(const Host& host, void* tensor, int32_t dtype, int64_t dim, const int64_t* shape, int64_t size,
           const void* before, void** data) {
  int32_t code = -1;
  int64_t d = -1;
  int64_t *sizes = nullptr, *strides = nullptr;
  if (before == nullptr || host.data(tensor, data) || *data != before) {
    if (host.layout(tensor, &code) || code != host.strided) return false;
    if (host.device_type(tensor, &code) || code != host.cpu) return false;
    if (host.data(tensor, data)) return false;
  }
  if (host.dtype(tensor, &code) || code != dtype) return false;
  if (host.dim(tensor, &d) || d != dim) return false;
  if (host.sizes(tensor, &sizes) || host.strides(tensor, &strides)) return false;
  for (int64_t i = 0; i < dim; ++i) {
    if (sizes[i] != shape[i]) return false;
    if (strides[i] != shape[dim + i] && sizes[i] != 1 && size != 0) return false;
  }
  return size == 0 || *data != nullptr;  // null: a tensor that is zero without memory
}

bool same_groups(const Plan& plan) {
  const Host& host = *plan.host;
  for (int64_t g = 0; g < plan.groups; ++g) {
    const Group& group = plan.group[g];
    if (host.list_size(group.params) != group.count) return false;
    for (int64_t i = 0; i < group.count; ++i) {
      if (host.list_item(group.params, i) != group.param[i]) return false;
    }
  }
  return true;
}

bool same_state(const Plan& plan) {
  const Host& host = *plan.host;
  int64_t position = 0;
  void *key = nullptr, *value = nullptr;
  for (int64_t i = 0; i < plan.items; ++i) {
    if (!host.dict_next(plan.state, &position, &key, &value)) return false;
    if (key != plan.keys[i] || value != plan.values[i]) return false;
  }
  return true;
}

// Notes where one tensor's memory is today.
void put(void* const* addresses, int64_t i, void* address) { const_cast<void**>(addresses)[i] = address; }

}  // namespace

RMSPROP_API int32_t rmsprop_again(Plan* plan, void* gradients, int64_t* active) {
  const Host& host = *plan->host;
  *active = 0;
  if (!same_groups(*plan) || !same_state(*plan)) return kMoved;
  for (int64_t i = 0; i < plan->idle; ++i) {
    if (host.list_item(gradients, plan->idle_places[i]) != host.none) return kMoved;
  }
  for (int64_t w = 0; w < plan->works; ++w) {
    Work& work = plan->work[w];
    const int32_t* dtypes = plan->dtypes + 3 * w;
    void* const* to[kSlots] = {work.step, work.square_avg, work.grad_avg, work.momentum_buffer, work.compensation};
    const int32_t kept[kSlots] = {dtypes[2], dtypes[1], dtypes[1], dtypes[1], dtypes[0]};
    for (int64_t i = 0; i < work.count; ++i) {
      const Row& row = plan->rows[w][i];
      void* data = nullptr;
      void* gradient = host.list_item(gradients, plan->places[w][i]);
      if (gradient == host.none) {
        const_cast<int64_t*>(work.size)[i] = -1;
        continue;
      }
      const_cast<int64_t*>(work.size)[i] = row.size;
      ++*active;
      if (!found(host, handle(host, row.param), dtypes[0], row.dim, row.shape, row.size, work.param[i], &data)) return kMoved;
      put(work.param, i, data);
      char* const begin = static_cast<char*>(data);
      const int64_t bytes = row.size * (work.param_type == kFloat64 ? 8 : work.param_type == kFloat32 ? 4 : 2);
      if (!found(host, handle(host, gradient), dtypes[0], row.dim, row.shape, row.size, nullptr, &data)) return kMoved;
      put(const_cast<void* const*>(work.grad), i, data);
      char* const other = static_cast<char*>(data);
      if (other != begin && other < begin + bytes && begin < other + bytes) return kMoved;  // they overlap, shifted
      for (int k = 0; k < kSlots; ++k) {
        if (row.slot[k] == nullptr) continue;
        if (host.dict_item(row.entry, plan->slot_names[k]) != row.slot[k]) return kMoved;
        const bool step = k == 0;
        if (!found(host, handle(host, row.slot[k]), kept[k], step ? 0 : row.dim, row.shape, step ? 1 : row.size,
                   to[k][i], &data)) {
          return kMoved;
        }
        put(to[k], i, data);
      }
    }
  }
  if (plan->elements > plan->grain) return kSame;
  plan->unfinite = plan->guarded ? rmsprop_unfinite(plan->work, plan->works, nullptr, 0) : -1;
  if (plan->unfinite >= 0) return kStopped;
  return rmsprop_step(plan->work, plan->works, 0, nullptr, 0) == 0 ? kStepped : kMoved;
}
