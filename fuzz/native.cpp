// Fuzzes the kernel's plans and works with an optimizer made of bytes, whose lists, dicts and tensors change between
// steps.
//
// Built for libFuzzer with AddressSanitizer and UndefinedBehaviorSanitizer (make fuzz-native), without Python and torch.
// The host's functions read the structures below. The memory of each tensor is a block of its size or a part of a
// shared one. This judge determines byte by byte what may be stepped:
//
// - `rmsprop_again` steps only tensors that are plain, dense, of one layout, and disjoint; else it writes nothing.
// - It never changes gradients, and parameters without a gradient.
// - A step that is split into any ranges gives the same bits as one that is not.
#include "plan.h"

#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <vector>

namespace {

using Provider = FuzzedDataProvider;

[[noreturn]] void fault(const char* said) {
  std::fprintf(stderr, "fault: %s\n", said);
  std::abort();
}

// --- stand-ins for Python and torch ---------------------------------------------------------------

constexpr uint64_t kPlain = 0x11, kInference = 0x10, kLazy = 0x31;
char tensor_type, parameter_type, subclass_type, dict_type, userdict_type, none_object;

struct Impl {
  uint64_t keys = kPlain;
  int32_t dtype = 0, device = 0;
  int64_t dim = 0, sizes[5] = {}, strides[5] = {};
  char* data = nullptr;
  int64_t bumped = 0;
};

struct Tensor {
  void* type = &tensor_type;
  Impl* impl;  // the target of host.header
  Impl held;
  Tensor() : impl(&held) {}
};

struct Dict {
  void* type = &dict_type;
  std::vector<std::pair<void*, void*>> items;
};

using List = std::vector<void*>;

Impl& of(void* handle) { return **static_cast<Impl**>(handle); }

const Host kHost = {
    [](void* list) { return int64_t(static_cast<List*>(list)->size()); },
    [](void* list, int64_t i) {
      if (i < 0 || i >= int64_t(static_cast<List*>(list)->size())) fault("an index beyond its list");
      return (*static_cast<List*>(list))[size_t(i)];
    },
    [](void* list, void* object) { static_cast<List*>(list)->push_back(object); return 0; },
    [](void* dict) { return int64_t(static_cast<Dict*>(dict)->items.size()); },
    [](void* dict, int64_t* position, void** key, void** value) {
      const auto& items = static_cast<Dict*>(dict)->items;
      if (*position >= int64_t(items.size())) return 0;
      *key = items[size_t(*position)].first, *value = items[size_t((*position)++)].second;
      return 1;
    },
    [](void* dict, void* key) -> void* {
      if (*static_cast<void**>(dict) != &dict_type) fault("a lookup in what is not a dict");
      for (const auto& item : static_cast<Dict*>(dict)->items) {
        if (item.first == key) return item.second;
      }
      return nullptr;
    },
    [](void* tensor, int32_t* index) { *index = of(tensor).device; return 0; },
    [](void* tensor, int32_t* dtype) { *dtype = of(tensor).dtype; return 0; },
    [](void* tensor, int64_t* dim) { *dim = of(tensor).dim; return 0; },
    [](void* tensor, int64_t** sizes) { *sizes = of(tensor).sizes; return 0; },
    [](void* tensor, int64_t** strides) { *strides = of(tensor).strides; return 0; },
    [](void* tensor, void** data) { *data = of(tensor).data; return 0; },
    [](void* const* tensor) { ++of(const_cast<void**>(tensor)).bumped; },
    0, int64_t(offsetof(Tensor, impl)), int64_t(offsetof(Impl, keys)),
    &none_object, &dict_type, &tensor_type, &parameter_type, kPlain, kInference,
};

int64_t width(int32_t type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : type == kFloat8 ? 1 : 2; }

// --- an optimizer ---------------------------------------------------------------------------------

struct World {
  Provider& draw;
  std::vector<std::unique_ptr<char[]>> blocks;
  std::vector<size_t> lengths;
  std::vector<std::unique_ptr<Tensor>> tensors;
  std::vector<std::unique_ptr<Dict>> dicts;
  Dict state;
  List params, keys, gradients;
  char names[kTensors] = {};

  explicit World(Provider& draw) : draw(draw) {}

  char* block(size_t bytes) {
    blocks.emplace_back(new char[bytes ? bytes : 1]);
    lengths.push_back(bytes ? bytes : 1);
    for (size_t i = 0; i < lengths.back(); ++i) blocks.back()[i] = char(0x30 + (i * 7 + blocks.size()) % 13);
    return blocks.back().get();
  }

  // Returns a tensor with its own memory, or, rarely, a part of another's.
  Tensor* tensor(int32_t dtype, const std::vector<int64_t>& shape, bool odd) {
    tensors.push_back(std::make_unique<Tensor>());
    Tensor& made = *tensors.back();
    Impl& impl = made.held;
    impl.dtype = dtype, impl.dim = int64_t(shape.size());
    std::vector<size_t> order(shape.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = order.size() - 1 - i;
    if (odd && order.size() > 1 && draw.ConsumeBool()) std::swap(order.front(), order[draw.ConsumeIntegralInRange<size_t>(1, order.size() - 1)]);
    int64_t stride = odd && draw.ConsumeIntegralInRange(0, 7) == 0 ? 2 : 1, count = 1;
    for (size_t i : order) {
      impl.sizes[i] = shape[i], impl.strides[i] = stride;
      stride *= std::max<int64_t>(shape[i], 1), count *= shape[i];
    }
    if (odd && !shape.empty() && draw.ConsumeIntegralInRange(0, 7) == 0) impl.strides[0] = 0;
    int64_t extent = count ? 1 : 0;
    for (size_t i = 0; i < shape.size() && count; ++i) extent += (impl.sizes[i] - 1) * impl.strides[i];
    const size_t bytes = size_t(extent * width(dtype));
    if (odd && !blocks.empty() && draw.ConsumeIntegralInRange(0, 5) == 0) {
      const size_t other = draw.ConsumeIntegralInRange<size_t>(0, blocks.size() - 1);
      if (lengths[other] >= bytes && bytes) {
        const size_t steps = (lengths[other] - bytes) / size_t(width(dtype));
        impl.data = blocks[other].get() + size_t(width(dtype)) * draw.ConsumeIntegralInRange<size_t>(0, steps);
        return &made;
      }
    }
    impl.data = count == 0 && draw.ConsumeBool() ? nullptr : block(bytes);
    if (odd) {
      const int what = draw.ConsumeIntegralInRange(0, 31);
      if (what == 0) impl.keys = kLazy;
      if (what == 1) impl.keys = kInference;
      if (what == 2) made.type = &subclass_type;
      if (what == 3) made.type = &parameter_type;
      if (what == 4) impl.dtype = draw.ConsumeIntegralInRange(0, 4);
      if (what == 5) impl.device = 1;
      if (what == 6) impl.data = nullptr;
    }
    return &made;
  }

  // Returns a tensor of the same shape and strides, with its own memory.
  Tensor* like(const Impl& other, int32_t dtype) {
    tensors.push_back(std::make_unique<Tensor>());
    Impl& impl = tensors.back()->held;
    impl = other;
    impl.keys = kPlain, impl.dtype = dtype, impl.device = 0, impl.bumped = 0;
    int64_t extent = 1, count = 1;
    for (int64_t d = 0; d < impl.dim; ++d) {
      count *= impl.sizes[d];
      extent += (impl.sizes[d] - 1) * impl.strides[d];
    }
    impl.data = block(count ? size_t(extent * width(dtype)) : 0);
    return tensors.back().get();
  }
};

struct Kind {
  int32_t param, state, other, step, narrowed;

  // The type of tensor k of a parameter.
  int32_t of(int k) const {
    if (k == kSquareAvg) return state;
    if (k == kGradAvg || k == kMomentumBuffer) return other;
    return k == kStep ? step : k == kEma ? int32_t(kFloat32) : param;
  }
};

// --- the judge ------------------------------------------------------------------------------------

bool is_plain(const Tensor* x, int32_t dtype) {
  return (x->type == &tensor_type || x->type == &parameter_type) &&
         (x->held.keys == kPlain || x->held.keys == kInference) && x->held.dtype == dtype;
}

int64_t numel(const Impl& x) {
  int64_t count = 1;
  for (int64_t i = 0; i < x.dim; ++i) count *= x.sizes[i];
  return count;
}

// Returns the offset of every element, in row-major order of the indices.
std::vector<int64_t> offsets(const Impl& x) {
  std::vector<int64_t> found = {0};
  for (int64_t d = 0; d < x.dim; ++d) {
    std::vector<int64_t> next;
    for (int64_t base : found) {
      for (int64_t i = 0; i < x.sizes[d]; ++i) next.push_back(base + i * x.strides[d]);
    }
    found.swap(next);
  }
  return found;
}

bool is_dense(const Impl& x) {
  const std::vector<int64_t> places = offsets(x);
  std::vector<char> seen(places.size());
  for (int64_t place : places) {
    if (place < 0 || place >= int64_t(seen.size()) || seen[size_t(place)]++) return false;
  }
  return true;
}

// Returns whether the current tensors may be stepped, checked byte by byte.
bool may_step(const Plan& plan, World& world, const std::vector<std::vector<int64_t>>& places,
              const std::vector<Kind>& kinds) {
  std::map<const char*, int> written;
  std::vector<std::pair<const Tensor*, const Tensor*>> pairs;
  for (int64_t w = 0; w < plan.works; ++w) {
    const Work& work = plan.work[w];
    const Kind kind = kinds[size_t(w)];
    for (int64_t place : places[size_t(w)]) {
      void* const gradient = world.gradients[size_t(place)];
      if (gradient == &none_object) continue;
      const auto* p = static_cast<Tensor*>(world.params[size_t(place)]);
      const auto* g = static_cast<Tensor*>(gradient);
      if (!is_plain(p, kind.param) || !is_plain(g, kind.param) || !is_dense(p->held)) return false;
      Dict* entry = nullptr;
      for (const auto& item : world.state.items) {
        if (item.first == world.keys[size_t(place)]) entry = static_cast<Dict*>(item.second);
      }
      if (entry == nullptr || entry->type != &dict_type) return false;
      for (int64_t i = 0; i < plan.items; ++i) {  // further entries may change the step
        if (plan.item[i] == place && int64_t(entry->items.size()) != plan.entry_size[i]) return false;
      }
      const bool kept[kTensors] = {true, true, true, work.grad_avg != nullptr, work.momentum_buffer != nullptr, true,
                                   work.compensation != nullptr, work.ema != nullptr};
      for (int k = 0; k < kTensors; ++k) {
        if (!kept[k]) continue;
        const Tensor* x = k == kParam ? p : k == kGrad ? g : nullptr;
        for (const auto& item : entry->items) {
          if (k > kGrad && item.first == &world.names[k]) x = static_cast<Tensor*>(item.second);
        }
        if (x == nullptr) return false;
        const int32_t type = kind.of(k);
        if (!is_plain(x, type)) return false;
        const int64_t count = numel(x->held);
        if (k == kStep) {
          if (count != 1 || x->held.data == nullptr) return false;
        } else {
          if (x->held.dim != p->held.dim || (count != 0 && x->held.data == nullptr)) return false;
          for (int64_t d = 0; d < x->held.dim; ++d) {
            if (x->held.sizes[d] != p->held.sizes[d]) return false;
          }
          if (count && offsets(x->held) != offsets(p->held)) return false;
        }
        if (k == kGrad) continue;
        for (int64_t byte = 0; byte < count * width(type); ++byte) {
          if (written[x->held.data + byte]++) return false;
        }
      }
      pairs.emplace_back(p, g);
    }
  }
  for (const auto& [p, g] : pairs) {
    const int64_t count = numel(g->held);
    if (count == 0 || g->held.data == p->held.data) continue;
    for (int64_t byte = 0; byte < count * width(g->held.dtype); ++byte) {
      if (written.count(g->held.data + byte)) return false;
    }
  }
  return true;
}

std::vector<std::vector<char>> remembered(const World& world) {
  std::vector<std::vector<char>> bytes;
  for (size_t i = 0; i < world.blocks.size(); ++i) {
    bytes.emplace_back(world.blocks[i].get(), world.blocks[i].get() + world.lengths[i]);
  }
  return bytes;
}

Provider* cuts = nullptr;

int32_t cut_up(int64_t begin, int64_t end, int64_t, Body body, void* context) {
  while (begin < end) {
    const int64_t stop = cuts->ConsumeIntegralInRange<int64_t>(begin + 1, end);
    body(begin, stop, context);
    begin = stop;
  }
  return 0;
}

double number(Provider& draw) {
  constexpr double values[] = {0, 1e-300, 1e-8, 1e-3, 0.5, 0.9, 0.99, 1e3, 1e300, -0.1};
  return values[draw.ConsumeIntegralInRange<size_t>(0, std::size(values) - 1)];
}

void run(Provider& draw) {
  World world(draw);
  const size_t count = draw.ConsumeIntegralInRange<size_t>(1, 5);
  const bool centered = draw.ConsumeBool(), momentum = draw.ConsumeBool(), average = draw.ConsumeBool();
  std::vector<Kind> kinds, of_param;
  std::vector<std::vector<int64_t>> places;
  std::vector<int64_t> idle, item, entry_size;
  std::vector<std::vector<int64_t>> shapes;
  int way = draw.ConsumeIntegralInRange(0, 3);  // nearest, stochastic, compensated, both
  for (size_t i = 0; i < count; ++i) {
    const int32_t param = draw.ConsumeIntegralInRange(0, 3);
    const bool half = param >= kBFloat16;
    const bool narrowed = param != kFloat64 && draw.ConsumeBool();
    const int32_t full = half && draw.ConsumeBool() ? param : draw.ConsumeIntegralInRange<int32_t>(0, half && way ? 0 : 1);
    const int32_t state = !narrowed ? full : draw.ConsumeBool() ? kFloat8 : kBFloat16;
    Kind kind{param, state, narrowed ? int32_t(kBFloat16) : state, draw.ConsumeBool(), narrowed};
    std::vector<int64_t> shape(draw.ConsumeIntegralInRange<size_t>(0, 3));
    for (int64_t& size : shape) size = draw.ConsumeIntegralInRange<int64_t>(0, 3);
    Tensor* p = world.tensor(param, shape, draw.ConsumeIntegralInRange(0, 9) == 0);
    if (draw.ConsumeBool()) p->type = &parameter_type;
    world.params.push_back(p), world.keys.push_back(p), world.gradients.push_back(&none_object);
    shapes.push_back(shape), of_param.push_back(kind);
    if (draw.ConsumeIntegralInRange(0, 7) == 0) {
      idle.push_back(int64_t(i));
      continue;
    }
    world.dicts.push_back(std::make_unique<Dict>());
    Dict& entry = *world.dicts.back();
    const bool rest = half && way >= 2;
    for (int k = kSquareAvg; k < kTensors; ++k) {
      if ((k == kGradAvg && !centered) || (k == kMomentumBuffer && !momentum) || (k == kCompensation && !rest) || (k == kEma && !average)) continue;
      const int32_t type = kind.of(k);
      Tensor* x = k == kStep ? world.tensor(type, {}, false) : world.like(p->held, type);
      if (k == kStep) std::memset(x->held.data, 0, size_t(width(type)));
      entry.items.emplace_back(&world.names[k], x);
    }
    world.state.items.emplace_back(p, &entry);
    item.push_back(int64_t(i)), entry_size.push_back(int64_t(entry.items.size()));
    size_t w = 0;
    while (w < kinds.size() && std::memcmp(&kinds[w], &kind, sizeof(kind)) != 0) ++w;
    if (w == kinds.size()) kinds.push_back(kind), places.emplace_back();
    places[w].push_back(int64_t(i));
  }
  if (kinds.empty()) return;

  // The works lack addresses, which the plan records.
  const size_t works = kinds.size();
  std::vector<Work> work(works);
  struct Arrays {
    std::vector<int64_t> size, end;
    std::vector<void*> address[kTensors];
    std::vector<double> correction, share;
    std::vector<uint64_t> stream;
    std::vector<uint32_t> key;
  };
  std::vector<Arrays> arrays(works);
  int64_t elements = 0;
  for (size_t w = 0; w < works; ++w) {
    Arrays& a = arrays[w];
    const size_t rows = places[w].size();
    const bool half = kinds[w].param >= kBFloat16;
    a.size.resize(rows), a.end.resize(rows), a.correction.resize(rows), a.stream.assign(rows, 77), a.key.resize(2 * rows), a.share.resize(rows);
    for (auto& address : a.address) address.resize(rows);
    for (size_t i = 0; i < rows; ++i) elements += a.size[i] = numel(static_cast<Tensor*>(world.params[size_t(places[w][i])])->held);
    Work& one = work[w] = Work{};
    one.lr = number(draw), one.alpha = std::fabs(number(draw)), one.eps = std::fabs(number(draw));
    one.momentum = momentum ? 0.9 : 0, one.weight_decay = number(draw), one.scale = 1;
    one.cap = draw.ConsumeBool() ? 3.0 : std::numeric_limits<double>::infinity();
    one.clip_value = one.clip_norm = one.clip_global_norm = one.clip_weights = std::numeric_limits<double>::infinity();
    one.param_type = kinds[w].param, one.state_type = kinds[w].state, one.step_type = kinds[w].step;
    one.other_type = kinds[w].other, one.ema_type = kFloat32, one.narrowed = kinds[w].narrowed;
    one.eps_mode = draw.ConsumeIntegralInRange(0, 3), one.centered = centered, one.has_momentum = momentum;
    one.nesterov = draw.ConsumeBool(), one.lr_in_buffer = draw.ConsumeBool(), one.decoupled = draw.ConsumeBool();
    one.bias_correction = draw.ConsumeBool(), one.maximize = draw.ConsumeBool(), one.stochastic = half && way % 2;
    one.count = int64_t(rows), one.size = a.size.data(), one.end = a.end.data(), one.correction = a.correction.data();
    one.param = a.address[kParam].data(), one.grad = const_cast<const void* const*>(a.address[kGrad].data());
    one.square_avg = a.address[kSquareAvg].data(), one.step = a.address[kStep].data();
    one.grad_avg = centered ? a.address[kGradAvg].data() : nullptr;
    one.momentum_buffer = momentum ? a.address[kMomentumBuffer].data() : nullptr;
    one.compensation = half && way >= 2 ? a.address[kCompensation].data() : nullptr;
    one.random_key = a.stream.data(), one.key = a.key.data();
    one.ema = average ? a.address[kEma].data() : nullptr, one.ema_weight = a.share.data();
    one.ema_decay = 0.9, one.ema_interval = 1;
  }
  std::vector<int32_t> codes;
  std::vector<const int64_t*> place;
  for (size_t w = 0; w < works; ++w) {
    codes.insert(codes.end(), {kinds[w].param, kinds[w].state, kinds[w].other, kinds[w].step, int32_t(kFloat32), draw.ConsumeBool() ? 0 : -1});
    place.push_back(places[w].data());
  }
  std::vector<void*> entry(count);
  std::vector<Span> span(7 * count + 1);
  Plan plan{};
  plan.host = &kHost, plan.params = int64_t(count), plan.items = int64_t(item.size()), plan.item = item.data();
  plan.entry_size = entry_size.data(), plan.entry = entry.data(), plan.works = int64_t(works), plan.work = work.data();
  for (int k = 0; k < kTensors; ++k) plan.slot_names[k] = &world.names[k];
  plan.kinds = codes.data(), plan.place = place.data(), plan.elements = elements;
  plan.serial_limit = draw.ConsumeBool() ? 1000 : -1, plan.idle = int64_t(idle.size()), plan.idle_place = idle.data();
  plan.span = span.data(), plan.guarded = draw.ConsumeBool();

  for (int round = 0; round < 6 && draw.remaining_bytes() > 0; ++round) {
    for (size_t i = 0; i < count; ++i) {
      const int what = draw.ConsumeIntegralInRange(0, 15);
      const Kind kind = of_param[i];
      if (what < 6) {
        auto* p = static_cast<Tensor*>(world.params[i]);
        Tensor* g = what == 0 ? world.tensor(kind.param, shapes[i], true) : world.like(p->held, kind.param);
        world.gradients[i] = g;
      } else if (what == 6) {
        world.gradients[i] = &none_object;
      } else if (what == 7) {
        world.gradients[i] = world.params[i];
      } else if (what == 8) {
        world.params[i] = world.tensor(kind.param, shapes[i], true);  // a shard at a new address, as of a DTensor
      } else if (what == 9) {
        world.keys[i] = world.params[i];
      } else if (what == 10 && !world.dicts.empty()) {
        Dict& one = *world.dicts[draw.ConsumeIntegralInRange<size_t>(0, world.dicts.size() - 1)];
        const int how = draw.ConsumeIntegralInRange(0, 5);
        if (how == 0) one.type = one.type == &dict_type ? &userdict_type : &dict_type;
        if (how == 1 && !one.items.empty()) one.items.pop_back();
        if (how == 2) one.items.emplace_back(&none_object, &world);
        if (how >= 3 && !one.items.empty()) {
          auto& slot = one.items[draw.ConsumeIntegralInRange<size_t>(0, one.items.size() - 1)];
          if (slot.second != &world) {
            const Impl old = static_cast<Tensor*>(slot.second)->held;
            const std::vector<int64_t> shape(old.sizes, old.sizes + old.dim);
            Tensor* x = how == 3 ? world.tensor(old.dtype, shape, true) : world.like(old, old.dtype);
            slot.second = x;
          }
        }
      } else if (what == 11 && world.state.items.size() > 1) {
        std::swap(world.state.items[0], world.state.items[draw.ConsumeIntegralInRange<size_t>(1, world.state.items.size() - 1)]);
      } else if (what == 12 && draw.ConsumeBool()) {
        world.state.items.pop_back();
        if (world.state.items.empty()) return;
      }
    }
    List extra = world.gradients;
    if (draw.ConsumeIntegralInRange(0, 31) == 0) extra.push_back(&none_object);
    const auto before = remembered(world);
    const bool allowed = may_step(plan, world, places, kinds);
    List held;
    plan.stepping = &held;
    const int32_t code = rmsprop_again(&plan, &world.params, &world.keys, &extra, &world.state);
    const size_t steps = size_t(std::count_if(extra.begin(), extra.end(), [](void* g) { return g != &none_object; }));
    if (code == kSame && held.size() < 2 * steps) fault("a tensor that the caller steps is not held");
    if ((code == kStepped || code == kStopped) && !held.empty()) fault("tensors are held without need");
    if (code != kMoved && !allowed) fault("a step of what may not be stepped");
    if (code == kMoved || code == kStopped || code == kSame) {
      if (remembered(world) != before) fault("something was written, and no step was taken");
    }
    if (code == kStepped || code == kSame) {
      // The same step on the initial memory, split into ranges, gives the same bits.
      const auto after = remembered(world);
      if (code == kStepped) {
        for (size_t i = 0; i < before.size(); ++i) std::memcpy(world.blocks[i].get(), before[i].data(), before[i].size());
      }
      cuts = &draw;
      if (rmsprop_step(work.data(), int64_t(works), 0, cut_up, 0) != 0) fault("a step failed");
      if (code == kStepped && remembered(world) != after) fault("a step that is cut up ends elsewhere");
      for (size_t i = 0; i < count; ++i) {
        void* const gradient = world.gradients[i];
        if (gradient != &none_object && gradient != world.params[i]) {
          const Impl& g = static_cast<Tensor*>(gradient)->held;
          for (size_t b = 0; b < before.size(); ++b) {
            char* const first = world.blocks[b].get();
            if (g.data < first || g.data >= first + before[b].size() || numel(g) == 0) continue;
            if (g.data == static_cast<Tensor*>(world.params[i])->held.data) continue;
            const size_t bytes = size_t(numel(g) * width(g.dtype));
            if (std::memcmp(g.data, before[b].data() + (g.data - first), bytes) != 0) fault("a gradient was written");
          }
        }
      }
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Provider draw(data, size);
  run(draw);
  return 0;
}
