// Repeats recorded calls of the kernel, for tests/tools/emulated.py: usage emulated CALLS RESULTS. It needs no Python, so it
// runs under user-mode emulation of another processor. Work has the same layout on every 64-bit Linux.
#include "rmsprop.h"

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

namespace {

constexpr int kPointers = 15;  // of Work, from `size` on: the order of FIELDS in emulated.py

std::FILE* input;
std::FILE* output;
std::deque<std::vector<char>> memory;  // of one call, in the order of the file

template <class T>
T read() {
  T value;
  if (std::fread(&value, sizeof(value), 1, input) != 1) std::exit(2);
  return value;
}

void* read_memory() {
  const int64_t size = read<int64_t>();
  memory.emplace_back(size + 64);  // a kernel that writes behind its elements is not what this tests
  if (std::fread(memory.back().data(), 1, size, input) != size_t(size)) std::exit(2);
  memory.back().resize(size);
  return memory.back().data();
}

void read_pointers(Work& work, std::deque<std::vector<void*>>& tables) {
  void* field[kPointers];
  for (int i = 0; i < kPointers; ++i) {
    const int64_t tensors = read<int64_t>();  // -1: null; 0: one array; else an array of addresses
    if (tensors == -1) {
      field[i] = nullptr;
    } else if (tensors == 0) {
      field[i] = read_memory();
    } else {
      tables.emplace_back();
      for (int64_t j = 0; j < tensors; ++j) tables.back().push_back(read_memory());
      field[i] = tables.back().data();
    }
  }
  static_assert(offsetof(Work, size) + sizeof(field) == sizeof(Work), "the pointers are the end of Work");
  std::memcpy(reinterpret_cast<char*>(&work) + offsetof(Work, size), field, sizeof(field));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  input = std::fopen(arguments[1], "rb");
  output = std::fopen(arguments[2], "wb");
  if (input == nullptr || output == nullptr) return 2;
  for (int64_t calls = read<int64_t>(); calls > 0; --calls) {
    const int64_t norms = read<int64_t>();
    std::vector<Work> works(read<int64_t>());
    memory.clear();
    std::deque<std::vector<void*>> tables;
    for (Work& work : works) {
      work = read<Work>();
      read_pointers(work, tables);
    }
    double total = -1;
    const int64_t code = norms ? rmsprop_norms(works.data(), int64_t(works.size()), &total, nullptr, 1 << 15)
                               : rmsprop_step(works.data(), int64_t(works.size()), 0, nullptr, 1 << 15);
    std::fwrite(&code, sizeof(code), 1, output);
    std::fwrite(&total, sizeof(total), 1, output);
    for (const auto& part : memory) std::fwrite(part.data(), 1, part.size(), output);
  }
  return std::fclose(output) == 0 ? 0 : 2;
}
