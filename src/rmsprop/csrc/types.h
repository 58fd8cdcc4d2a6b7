// Element types: how a number lies in memory, how it is read, and how it is rounded back.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#define RMSPROP_INLINE inline __attribute__((always_inline))
#define RMSPROP_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define RMSPROP_INLINE inline __attribute__((always_inline))
#define RMSPROP_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define RMSPROP_INLINE __forceinline
#define RMSPROP_INDEPENDENT __pragma(loop(ivdep))
#else
#define RMSPROP_INLINE inline
#define RMSPROP_INDEPENDENT
#endif

namespace {

template <class To, class From>
RMSPROP_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Bits of a where the condition holds, else of b: no branch, which would keep a loop from being vectorised.
RMSPROP_INLINE uint32_t pick(bool condition, uint32_t a, uint32_t b) { return b ^ ((a ^ b) & (0u - uint32_t(condition))); }

// Element types: how they lie in memory, and how they become a number and are rounded back (once, to nearest even,
// NaN kept). Memory is read by memcpy: storage may be unaligned.
struct Float32 {
  using Bits = float;
  static RMSPROP_INLINE float widen(Bits x) { return x; }
  static RMSPROP_INLINE Bits narrow(float x) { return x; }
};

struct Float64 {
  using Bits = double;
  static RMSPROP_INLINE double widen(Bits x) { return x; }
  static RMSPROP_INLINE Bits narrow(double x) { return x; }
};

struct BFloat16 {
  using Bits = uint16_t;
  static RMSPROP_INLINE float widen(Bits x) { return bits<float>(uint32_t(x) << 16); }
  static RMSPROP_INLINE Bits narrow(float x) {
    const uint32_t u = bits<uint32_t>(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t nan = (u >> 16) | 0x40u;
    return Bits(pick((u & 0x7fffffffu) > 0x7f800000u, nan, rounded));
  }
};

// No float32 subnormals on the way: they would vanish where a process flushes them.
// Source: Fabian Giesen, half_to_float_fast5 and float_to_half_fast3_rtne (public domain).
struct Float16 {
  using Bits = uint16_t;
  static RMSPROP_INLINE float widen(Bits x) {
    const uint32_t magnitude = (uint32_t(x) & 0x7fffu) << 13;
    const uint32_t exponent = magnitude & 0x0f800000u;
    const uint32_t normal = magnitude + ((127u - 15u) << 23);
    const uint32_t infinite = magnitude + ((255u - 31u) << 23);
    const uint32_t subnormal = bits<uint32_t>(bits<float>(normal + (1u << 23)) - bits<float>(113u << 23));
    const uint32_t u = pick(exponent == 0x0f800000u, infinite, pick(exponent == 0, subnormal, normal));
    return bits<float>(u | (uint32_t(x) & 0x8000u) << 16);
  }
  static RMSPROP_INLINE Bits narrow(float x) {
    const uint32_t sign = bits<uint32_t>(x) & 0x80000000u;
    const uint32_t u = bits<uint32_t>(x) ^ sign;
    const uint32_t magic = ((127u - 15u) + (23u - 10u) + 1u) << 23;
    const uint32_t normal = (u - ((127u - 15u) << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bits<uint32_t>(bits<float>(u) + bits<float>(magic)) - magic;
    const uint32_t special = pick(u > 0x7f800000u, 0x7e00u, 0x7c00u);
    const uint32_t h = pick(u >= (127u + 16u) << 23, special, pick(u < 113u << 23, subnormal, normal));
    return Bits(h | sign >> 16);
  }
};

template <class T>
RMSPROP_INLINE auto load(const char* from, int64_t i) {
  typename T::Bits x;
  std::memcpy(&x, from + i * int64_t(sizeof(x)), sizeof(x));
  return T::widen(x);
}

template <class T, class A>
RMSPROP_INLINE void store(char* to, int64_t i, A a) {
  const typename T::Bits x = T::narrow(decltype(T::widen({}))(a));
  std::memcpy(to + i * int64_t(sizeof(x)), &x, sizeof(x));
}

}  // namespace
