// Validates everything that a step reads and writes, in a few nanoseconds per tensor, against about 50 for each lookup
// from Python.
//
// A plan identifies no object by its address: each tensor is looked up where the full step would look it up, and
// validated in full. So a plan holds no reference, and an address that now belongs to another object does no harm.
#include "plan.h"

#include <algorithm>

namespace {

template <class T>
T at(const void* object, int64_t bytes) {
  return *reinterpret_cast<const T*>(static_cast<const char*>(object) + bytes);
}

// Returns torch's handle of a Python tensor. kernels/native.py has checked that it follows the object's header.
void* handle(const Host& host, void* object) { return static_cast<char*>(object) + host.header; }

// The memory, shape and strides of a tensor.
struct View {
  char* data;
  int64_t dim;
  const int64_t *sizes, *strides;
  bool inference;
};

// Returns whether a Python object is a plain dense tensor of a dtype on the device. index: of the device, or -1.
bool plain(const Host& host, void* object, int32_t dtype, int32_t index, View& view) {
  void* const type = at<void*>(object, host.type);
  if (type != host.tensor && type != host.parameter) return false;
  void* const tensor = handle(host, object);
  const uint64_t keys = at<uint64_t>(at<void*>(tensor, 0), host.keys);
  if (keys != host.plain && keys != host.inference) return false;
  view.inference = keys == host.inference;
  int32_t code = -1;
  if (host.dtype(tensor, &code) || code != dtype) return false;
  if (index >= 0 && (host.device_index(tensor, &code) || code != index)) return false;
  return !host.dim(tensor, &view.dim) && !host.sizes(tensor, const_cast<int64_t**>(&view.sizes)) &&
         !host.strides(tensor, const_cast<int64_t**>(&view.strides)) &&
         !host.data(tensor, reinterpret_cast<void**>(&view.data));
}

int64_t elements(const View& view) {
  int64_t count = 1;
  for (int64_t i = 0; i < view.dim; ++i) count *= view.sizes[i];
  return count;
}

// Returns whether a layout has no gaps and no shared elements, in some order of its dimensions.
bool dense(const View& view, int64_t count) {
  if (count == 0) return true;
  int64_t expected = 1, i = view.dim - 1;
  for (; i >= 0; --i) {
    if (view.sizes[i] == 1) continue;
    if (view.strides[i] != expected) break;
    expected *= view.sizes[i];
  }
  if (i < 0) return true;
  for (expected = 1; expected < count;) {  // each pass takes the dimension whose stride is next
    for (i = 0; i < view.dim && (view.sizes[i] == 1 || view.strides[i] != expected); ++i) {
    }
    if (i == view.dim) return false;
    expected *= view.sizes[i];
  }
  return true;
}

bool same_layout(const View& a, const View& b, int64_t count) {
  if (a.dim != b.dim) return false;
  for (int64_t i = 0; i < a.dim; ++i) {
    if (a.sizes[i] != b.sizes[i]) return false;
    if (a.strides[i] != b.strides[i] && a.sizes[i] != 1 && count != 0) return false;
  }
  return true;
}

int64_t width(int32_t type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : type == kFloat8 ? 1 : 2; }

// The addresses of one parameter's tensors, null for missing ones, and the number of elements.
struct Row {
  char* data[kTensors];
  int64_t size;
  bool inference;
};

constexpr Typed kTypeOf[kTensors] = {kOfParam, kOfParam, kOfSquareAvg, kOfOthers, kOfOthers, kOfStep, kOfParam, kOfEma};

// Returns whether the objects of one parameter may be stepped together. object: [kTensors], null for missing ones.
bool fits(const Host& host, void* const* object, const int32_t* kinds, Row& row) {
  View param, view;
  if (!plain(host, object[kParam], kinds[kOfParam], kinds[kTypes], param)) return false;
  row.size = elements(param);
  row.inference = param.inference;
  if (!dense(param, row.size)) return false;
  for (int k = 0; k < kTensors; ++k) {
    row.data[k] = nullptr;
    if (object[k] == nullptr) continue;
    if (k == kParam) {
      view = param;
    } else if (!plain(host, object[k], kinds[kTypeOf[k]], kinds[kTypes], view)) {
      return false;
    }
    if (k == kStep ? elements(view) != 1 : !same_layout(param, view, row.size)) return false;
    if (view.data == nullptr && (row.size != 0 || k == kStep)) return false;  // a zero tensor without memory
    row.data[k] = view.data;
  }
  return true;
}

// Appends the memory that a row writes. types: by Typed.
Span* note(char* const* data, int64_t size, const int32_t* types, Span* span) {
  for (int k = 0; k < kTensors; ++k) {
    const int64_t count = k == kStep ? 1 : size;
    if (k == kGrad || data[k] == nullptr || count == 0) continue;
    const uint64_t begin = reinterpret_cast<uint64_t>(data[k]);
    *span++ = {begin, begin + uint64_t(count * width(types[kTypeOf[k]]))};
  }
  return span;
}

// Sorts the spans. Returns whether none overlap.
bool apart(Span* first, Span* last) {
  std::sort(first, last, [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (Span* s = first; s != last && s + 1 != last; ++s) {
    if (s[1].begin < s->end) return false;
  }
  return true;
}

// Whether [begin, begin + bytes) is apart from the sorted spans.
bool clear(const Span* first, const Span* last, const void* data, int64_t bytes) {
  const uint64_t begin = reinterpret_cast<uint64_t>(data), end = begin + uint64_t(bytes);
  const Span* next = std::lower_bound(first, last, end, [](const Span& s, uint64_t e) { return s.begin < e; });
  return next == first || next[-1].end <= begin;
}

// Finds the entry of each parameter in the state, which holds the entries in the order in which they were made.
bool find_entries(const Plan& plan, void* keys, void* state) {
  const Host& host = *plan.host;
  int64_t position = 0;
  void *key = nullptr, *value = nullptr;
  for (int64_t i = 0; i < plan.items; ++i) {
    if (!host.dict_next(state, &position, &key, &value)) return false;
    const int64_t place = plan.item[i];
    if (place < 0) continue;
    if (key != host.list_item(keys, place) || at<void*>(value, host.type) != host.dict) return false;
    if (host.dict_size(value) != plan.entry_size[i]) return false;
    plan.entry[place] = value;
  }
  return true;
}

// Collects the current objects of a row of a work. Returns false if the state holds something else.
bool gather(const Plan& plan, const Work& work, void* params, void* gradient, int64_t place, void** object) {
  const Host& host = *plan.host;
  const bool kept[kTensors] = {true, true, true, work.grad_avg != nullptr, work.momentum_buffer != nullptr, true,
                               work.compensation != nullptr, work.ema != nullptr};
  object[kParam] = host.list_item(params, place);
  object[kGrad] = gradient;
  for (int k = kSquareAvg; k < kTensors; ++k) {
    object[k] = nullptr;
    if (!kept[k]) continue;
    object[k] = host.dict_item(plan.entry[place], plan.slot_names[k]);
    if (object[k] == nullptr) return false;
    const int64_t own = place * kTensors + k;
    if (plan.spread_slot != nullptr && plan.spread_slot[own] != nullptr) {
      if (object[k] != plan.spread_slot[own]) return false;
      object[k] = plan.spread_shard[own];
    }
  }
  return true;
}

// Stores the current address of one tensor. Returns whether it changed.
bool put(const void* const* addresses, int64_t i, void* address) {
  if (addresses == nullptr || addresses[i] == address) return false;
  const_cast<const void**>(addresses)[i] = address;
  return true;
}

// Returns whether written memory does not overlap, with itself or the gradients. `span` then holds it, sorted.
bool all_apart(Plan& plan) {
  Span* last = plan.span;
  for (int64_t w = 0; w < plan.works; ++w) {
    const Work& work = plan.work[w];
    const int32_t types[kTypes] = {work.param_type, work.state_type, work.other_type, work.step_type, work.ema_type};
    for (int64_t i = 0; i < work.count; ++i) {
      if (work.size[i] < 0) continue;
      const auto address = [i](auto* of) { return of == nullptr ? nullptr : static_cast<char*>(of[i]); };
      char* const data[kTensors] = {address(work.param),           nullptr,
                                    address(work.square_avg),      address(work.grad_avg),
                                    address(work.momentum_buffer), address(work.step),
                                    address(work.compensation),    address(work.ema)};
      last = note(data, work.size[i], types, last);
    }
  }
  plan.spans = last - plan.span;
  if (!apart(plan.span, last)) return false;
  for (int64_t w = 0; w < plan.works; ++w) {
    const Work& work = plan.work[w];
    for (int64_t i = 0; i < work.count; ++i) {
      if (work.size[i] < 0) {
        put(work.grad, i, nullptr);  // so that the next gradient's address counts as changed
      } else if (work.size[i] > 0 && work.grad[i] != work.param[i] &&
                 !clear(plan.span, last, work.grad[i], work.size[i] * width(work.param_type))) {
        return false;
      }
    }
  }
  return true;
}

// Appends the slots of a row to a list, which keeps them alive when another thread replaces them. Returns false if memory
// runs out.
bool hold(const Host& host, void* const* object, void* list) {
  for (int k = kSquareAvg; k < kTensors; ++k) {
    if (object[k] != nullptr && host.list_append(list, object[k])) return false;
  }
  return true;
}

// Returns whether the works are still valid, and stores the current sizes and addresses. left: whether the caller
// steps.
bool same(Plan& plan, void* params, void* keys, void* gradients, void* state, bool left) {
  const Host& host = *plan.host;
  plan.active = plan.inferred = 0;
  if (host.list_size(params) != plan.params || host.list_size(keys) != plan.params) return false;
  if (host.list_size(gradients) != plan.params || !find_entries(plan, keys, state)) return false;
  for (int64_t i = 0; i < plan.idle; ++i) {
    if (host.list_item(gradients, plan.idle_place[i]) != host.none) return false;
  }
  bool moved = !plan.apart;
  plan.apart = 0;  // until moved memory is checked for overlap
  for (int64_t w = 0; w < plan.works; ++w) {
    Work& work = plan.work[w];
    const int32_t* kinds = plan.kinds + kKinds * w;
    for (int64_t i = 0; i < work.count; ++i) {
      int64_t& size = const_cast<int64_t*>(work.size)[i];
      void* const gradient = host.list_item(gradients, plan.place[w][i]);
      if (gradient == host.none) {
        size = -1;
        continue;
      }
      void* object[kTensors];
      Row row;
      if (!gather(plan, work, params, gradient, plan.place[w][i], object) || !fits(host, object, kinds, row)) return false;
      if (left && !hold(host, object, plan.stepping)) return false;
      moved |= size != row.size;
      size = row.size;
      ++plan.active;
      plan.inferred += row.inference;
      moved |= put(work.param, i, row.data[kParam]) | put(work.square_avg, i, row.data[kSquareAvg]) |
               put(work.grad_avg, i, row.data[kGradAvg]) | put(work.momentum_buffer, i, row.data[kMomentumBuffer]) |
               put(work.step, i, row.data[kStep]) | put(work.compensation, i, row.data[kCompensation]) |
               put(work.ema, i, row.data[kEma]);
      // a gradient that has not moved does not overlap the memory written in the last step
      if (put(work.grad, i, row.data[kGrad]) && !moved && row.size > 0 && row.data[kGrad] != row.data[kParam]) {
        moved = !clear(plan.span, plan.span + plan.spans, row.data[kGrad], row.size * width(work.param_type));
      }
    }
  }
  if (moved && !all_apart(plan)) return false;
  plan.apart = 1;
  return true;
}

}  // namespace

RMSPROP_API int32_t rmsprop_again(Plan* plan, void* params, void* keys, void* gradients, void* state) {
  const Host& host = *plan->host;
  const bool left = plan->elements > plan->serial_limit;
  if (!same(*plan, params, keys, gradients, state, left)) return kMoved;
  if (left) return kSame;
  double norm = plan->norm;
  const int32_t unclear = plan->normed ? rmsprop_norms(plan->work, plan->works, &norm, nullptr, 0) : 1;
  if (unclear < 0) return kMoved;  // memory ran out: the full step tries again, and raises
  plan->unfinite = plan->guarded && unclear ? rmsprop_unfinite(plan->work, plan->works, nullptr, 0) : -1;
  if (plan->unfinite >= 0) return kStopped;
  plan->norm = norm;
  // Writes are counted here, before the step, since a signal could interrupt between a write and its count.
  for (int64_t w = 0; w < plan->works; ++w) {
    for (int64_t i = 0; i < plan->work[w].count; ++i) {
      if (plan->work[w].size[i] < 0) continue;
      void* const param = handle(host, host.list_item(params, plan->place[w][i]));
      if (at<uint64_t>(at<void*>(param, 0), host.keys) == host.plain) host.bump(static_cast<void* const*>(param));
    }
  }
  rmsprop_step(plan->work, plan->works, 0, nullptr, 0);
  return kStepped;
}

RMSPROP_API int32_t rmsprop_apart(Plan* plan) {
  plan->apart = all_apart(*plan);
  return int32_t(plan->apart);
}

RMSPROP_API int32_t rmsprop_plain(const Host* host, void* const* lists, int64_t count, const int32_t* kinds,
                                  const int32_t* types, Span* span) {
  for (int k = 0; k < kTensors; ++k) {
    if (lists[k] != nullptr && host->list_size(lists[k]) != count) return 0;
  }
  const auto row = [&](int64_t i, Row& found) {
    void* object[kTensors];
    for (int k = 0; k < kTensors; ++k) object[k] = lists[k] == nullptr ? nullptr : host->list_item(lists[k], i);
    return fits(*host, object, kinds, found);
  };
  Row found;
  Span* last = span;
  for (int64_t i = 0; i < count; ++i) {
    if (!row(i, found)) return 0;
    last = note(found.data, found.size, types, last);
  }
  if (!apart(span, last)) return 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!row(i, found)) return 0;
    const bool other = found.size > 0 && found.data[kGrad] != found.data[kParam];
    if (other && !clear(span, last, found.data[kGrad], found.size * width(types[kOfParam]))) return 0;
  }
  return 1;
}
