// The kernel's parallel region under ThreadSanitizer: steps of every type and way to round, cut up over std::threads, end
// in the bits that one thread computes, and no two threads touch one byte of which one is written.
//
// Usage: threads THREADS [race]. With `race` the ranges overlap on purpose: the sanitizer must see it, or it sees nothing.
// torch's own pool is OpenMP, which the sanitizer does not know; so the region is handed to threads that it knows.
#include "rmsprop.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

namespace {

int threads = 2;
int64_t overlap = 0;

int32_t parallel_for(int64_t begin, int64_t end, int64_t, Body body, void* context) {
  std::vector<std::thread> running;
  const int64_t size = end - begin;
  for (int i = 0; i < threads; ++i) {
    const int64_t first = begin + size * i / threads, last = begin + size * (i + 1) / threads;
    running.emplace_back([=] { body(first, std::min(end, last + (i + 1 < threads ? overlap : 0)), context); });
  }
  for (std::thread& thread : running) thread.join();
  return 0;
}

int64_t width(int32_t type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : type == kFloat8 ? 1 : 2; }

// A tensor's bytes: small numbers, none of them NaN, in any of the types.
std::vector<char> numbers(int64_t count, int32_t type, uint32_t seed, bool positive) {
  std::vector<char> bytes(size_t(count * width(type)));
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const double x = (double(seed >> 8) / (1 << 24) - (positive ? 0.0 : 0.5)) / 8;
    const float narrow = float(x);
    uint32_t word;
    std::memcpy(&word, &narrow, 4);
    char* to = bytes.data() + i * width(type);
    if (type == kFloat64) std::memcpy(to, &x, 8);
    if (type == kFloat32) std::memcpy(to, &narrow, 4);
    if (type == kFloat8) *to = char(150 + (seed >> 26));
    if (type == kBFloat16) { const uint16_t half = uint16_t(word >> 16); std::memcpy(to, &half, 2); }
    if (type == kFloat16) { const uint16_t half = uint16_t((word >> 16 & 0x8000) | (0x2c00 + (seed >> 24))); std::memcpy(to, &half, 2); }
  }
  return bytes;
}

// Works of one tensor type, with everything that a step writes in one place, so that runs compare.
struct Case {
  std::vector<std::vector<char>> bytes;  // per tensor: param, square_avg, grad_avg, momentum_buffer, compensation, step
  std::vector<std::vector<char>> grads;
  std::vector<int64_t> size, end;
  std::vector<void*> address[6];
  std::vector<const void*> grad;
  std::vector<double> correction;
  std::vector<uint64_t> stream;
  std::vector<uint32_t> key;
  Work work{};

  Case(int32_t param, int32_t state, bool narrowed, bool stochastic, bool compensated, double cap) {
    const int64_t sizes[] = {1, 1000, -1, 33, 0, 4097, 7, 2500};
    size.assign(std::begin(sizes), std::end(sizes));
    const size_t count = size.size();
    grad.resize(count), end.resize(count), correction.resize(count), stream.resize(count), key.resize(2 * count);
    grads.resize(count);
    for (auto& addresses : address) addresses.resize(count);
    const int32_t other = narrowed ? int32_t(kBFloat16) : state;
    const int32_t types[6] = {param, state, other, other, param, kFloat32};
    for (size_t i = 0; i < count; ++i) {
      stream[i] = 0x9e3779b97f4a7c15u * (i + 1);
      const int64_t elements = size[i] < 0 ? 5 : size[i];
      grads[i] = numbers(elements, param, uint32_t(99 + i), false);
      grad[i] = grads[i].data();
      for (int k = 0; k < 6; ++k) {
        bytes.push_back(k == 5 ? std::vector<char>(4, 0) : numbers(elements, types[k], uint32_t(7 * i + k), k == 1));
        if (k == 2 || k == 4) std::fill(bytes.back().begin(), bytes.back().end(), 0);
      }
    }
    for (size_t i = 0; i < count; ++i) {
      for (int k = 0; k < 6; ++k) address[k][i] = bytes[6 * i + size_t(k)].data();
    }
    work.lr = 1e-2, work.alpha = 0.9, work.eps = 1e-8, work.momentum = 0.9, work.weight_decay = 1e-4, work.scale = 0.5;
    work.cap = cap, work.param_type = param, work.state_type = state, work.other_type = other, work.step_type = kFloat32;
    work.centered = work.has_momentum = work.bias_correction = 1, work.stochastic = stochastic;
    work.narrowed = narrowed;
    work.clip_value = work.clip_norm = work.clip_global_norm = work.clip_weights = std::numeric_limits<double>::infinity();
    work.count = int64_t(count), work.size = size.data(), work.param = address[0].data(), work.grad = grad.data();
    work.square_avg = address[1].data(), work.grad_avg = address[2].data(), work.momentum_buffer = address[3].data();
    work.compensation = compensated ? address[4].data() : nullptr, work.step = address[5].data();
    work.end = end.data(), work.correction = correction.data(), work.random_key = stream.data(), work.key = key.data();
  }
};

}  // namespace

int main(int argc, char** argv) {
  threads = argc > 1 ? std::atoi(argv[1]) : 2;
  overlap = argc > 2 ? 64 : 0;
  const int32_t kinds[][3] = {  // of the parameter and the state, and whether it is narrowed
      {kFloat32, kFloat32, 0},  {kFloat32, kFloat64, 0},  {kFloat64, kFloat32, 0},  {kFloat64, kFloat64, 0},
      {kBFloat16, kFloat32, 0}, {kBFloat16, kBFloat16, 0}, {kFloat16, kFloat32, 0}, {kFloat16, kFloat16, 0},
      {kFloat32, kBFloat16, 1}, {kFloat32, kFloat8, 1},   {kBFloat16, kBFloat16, 1}, {kBFloat16, kFloat8, 1},
      {kFloat16, kBFloat16, 1}, {kFloat16, kFloat8, 1}};
  int wrong = 0;
  for (const auto& kind : kinds) {
    for (int way = 0; way < (kind[0] >= kBFloat16 ? 5 : 2); ++way) {
      const double cap = way == 1 ? 3.0 : std::numeric_limits<double>::infinity();
      const bool stochastic = way == 2 || way == 4, compensated = way >= 3;
      std::unique_ptr<Case> cases[2];
      for (int cut = 0; cut < 2; ++cut) {
        cases[cut] = std::make_unique<Case>(kind[0], kind[1], kind[2] != 0, stochastic, compensated, cap);
        for (int t = 0; t < 3; ++t) {
          Work& work = cases[cut]->work;
          if (rmsprop_unfinite(&work, 1, cut ? parallel_for : nullptr, 1) != -1) ++wrong;
          if (rmsprop_step(&work, 1, 0.0, cut ? parallel_for : nullptr, 1) != 0) ++wrong;
        }
      }
      if (!overlap && cases[0]->bytes != cases[1]->bytes) {
        std::printf("types %d and %d, way %d: %d threads end elsewhere\n", kind[0], kind[1], way, threads);
        ++wrong;
      }
    }
  }
  std::printf("%d threads: %d faults\n", threads, wrong);
  return wrong != 0;
}
