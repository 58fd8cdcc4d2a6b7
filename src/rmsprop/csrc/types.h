// Element types: the representation of numbers in memory, and their conversion to and from the arithmetic's type.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// One binary for AVX-512, AVX2 and plain x86-64, from which the loader chooses (glibc's ifunc). One version elsewhere.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(RMSPROP_ONE_TARGET)
#define RMSPROP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define RMSPROP_TWO_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))  // for rare combinations
#define RMSPROP_FUSED 1  // the default clone, for processors from before 2013, calls the C library's fma
#else
#define RMSPROP_CLONES
#define RMSPROP_TWO_CLONES
#if defined(__FMA__) || defined(__aarch64__) || defined(_M_ARM64)
#define RMSPROP_FUSED 1
#else
#define RMSPROP_FUSED 0
#endif
#endif

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

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define RMSPROP_LITTLE_ENDIAN 0
#else
#define RMSPROP_LITTLE_ENDIAN 1
#endif

namespace {

template <class To, class From>
RMSPROP_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Returns a·b + c rounded once, on every processor. Without an fma instruction it is computed in double, where the
// product is exact, and the sum is rounded to odd, so that rounding to float again is correct (S. Boldo, G. Melquiond,
// Emulation of FMA and correctly rounded sums, 2008). The overload for double rounds twice.
RMSPROP_INLINE float fused(float a, float b, float c) {
#if RMSPROP_FUSED
  return std::fma(a, b, c);
#else
  const double product = double(a) * double(b), sum = product + double(c);
  const double part = sum - product;
  const double lost = (product - (sum - part)) + (double(c) - part);
  const uint64_t u = bits<uint64_t>(sum);
  const uint64_t away = uint64_t(0) - uint64_t((lost > 0) != (sum > 0));  // 0: the exact sum is larger in size; else -1
  const uint64_t even = uint64_t((lost < 0) | (lost > 0)) & ~u & 1u;
  return float(bits<double>(u + ((even ^ away) - away)));
#endif
}

RMSPROP_INLINE double fused(double a, double b, double c) { return a * b + c; }

// Returns a if the condition holds, else b, without a branch, which would prevent vectorization.
RMSPROP_INLINE uint32_t pick(bool condition, uint32_t a, uint32_t b) { return b ^ ((a ^ b) & (0u - uint32_t(condition))); }

// Returns all ones if a > b, else 0, for numbers below 2³¹. Without a comparison, whose mask may have another width.
RMSPROP_INLINE uint32_t above(uint32_t a, uint32_t b) { return uint32_t(int32_t(b - a) >> 31); }

// Element types, with conversions to a wider number and back (rounded once, to nearest even, NaN kept). Memory is read by
// memcpy, since storage may be unaligned.
struct Float32 {
  using Bits = float;
  using Word = uint32_t;
  static constexpr Word kInfinity = 0x7f800000u;
  static RMSPROP_INLINE float widen(Bits x) { return x; }
  static RMSPROP_INLINE Bits narrow(float x) { return x; }
};

struct Float64 {
  using Bits = double;
  using Word = uint64_t;
  static constexpr Word kInfinity = 0x7ff0000000000000u;
  static RMSPROP_INLINE double widen(Bits x) { return x; }
  static RMSPROP_INLINE Bits narrow(double x) { return x; }
};

struct BFloat16 {
  using Bits = uint16_t;
  using Word = uint16_t;
  static constexpr uint32_t kNearest = 0x8000u;  // but for ties
  static constexpr Word kInfinity = 0x7f80u;
  static constexpr float kRestScale = 1;
  static RMSPROP_INLINE float widen(Bits x) { return bits<float>(uint32_t(x) << 16); }
  static RMSPROP_INLINE Bits narrow(float x) {
    const uint32_t u = bits<uint32_t>(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t nan = (u >> 16) | 0x40u;
    return Bits(pick((u & 0x7fffffffu) > 0x7f800000u, nan, rounded));
  }
  // Rounds to one of the two neighbors: random bits are added to the dropped bits, and the carry decides. Infinity has
  // nothing to drop. x is a result of arithmetic, so NaN is quiet, and stays NaN without its lowest bits.
  static RMSPROP_INLINE Bits narrow(float x, uint32_t random) {
    const uint32_t added = x == x ? random & 0xffffu : 0;
    return Bits((bits<uint32_t>(x) + added) >> 16);
  }
};

// Conversions produce no float32 subnormals, which a process may flush to 0.
// Source: Fabian Giesen, half_to_float_fast5 and float_to_half_fast3_rtne (public domain).
struct Float16 {
  using Bits = uint16_t;
  using Word = uint16_t;
  static constexpr Word kInfinity = 0x7c00u;
  static constexpr float kRestScale = 2048;  // the smallest float16, 2⁻²⁴, is above the remainders of small parameters
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
  static RMSPROP_INLINE Bits narrow(float x, uint32_t random) {
    const uint32_t sign = bits<uint32_t>(x) & 0x80000000u;
    const uint32_t u = bits<uint32_t>(x) ^ sign;
    const uint32_t normal = ((u + (random & 0x1fffu)) >> 13) - ((127u - 15u) << 10);
    // below 2⁻¹⁴ neighbors are 2⁻²⁴ apart: smaller numbers drop more bits
    const uint32_t exponent = u >> 23;
    const uint32_t wanted = 126u - exponent;
    const uint32_t dropped = wanted < 14u || wanted > 126u ? 14u : wanted > 31u ? 31u : wanted;
    const uint32_t fraction = (u & 0x7fffffu) | 0x800000u;
    const uint32_t units = (fraction + (random & ((1u << dropped) - 1u))) >> dropped;
    const uint32_t subnormal = pick(exponent < 95u, 0u, units);
    const uint32_t h = pick(exponent < 113u, subnormal, pick(normal > 0x7c00u, 0x7c00u, normal));
    return Bits(pick(exponent == 255u, narrow(x), h | sign >> 16));
  }
};

// The byte of square_avg: 6 bits of exponent, 2 of fraction, no sign. Its codes are in reference.py. Numbers below 2⁻⁴⁹
// become normal ones, an octave below, so that neither way has a branch or a float32 subnormal.
struct Float8 {
  using Bits = uint8_t;
  static constexpr uint32_t kNearest = 1u << 20;
  static RMSPROP_INLINE float widen(Bits x) {
    const uint32_t code = x;
    const float u = bits<float>((code + 308u + (above(code, 253u) & 458u)) << 21);
    const float low = (u + u) - 0x1p-49f;
    return low < u ? low : u;
  }
  // Rounds to one of the two neighbors by the lowest 21 random bits, the largest number at most.
  static RMSPROP_INLINE Bits narrow(float x, uint32_t random) {
    const float raised = fused(x, 0.5f, 0x1p-50f);
    const uint32_t u = bits<uint32_t>(raised > x ? raised : x);
    const uint32_t code = ((u + (random & 0x1fffffu)) >> 21) - 308u;
    const uint32_t held = code < 253u ? code : 253u;
    const uint32_t top = x > std::numeric_limits<float>::max() ? 254u : held;
    return Bits(x == x ? top : 255u);
  }
};

// Returns the random bits of an element: the same as in kernels/rounding.py, kernels/triton_kernel.py and reference.py.
// Source: the finalizer `lowbias32` of C. Wellons, with a second key added between its multiplications.
RMSPROP_INLINE uint32_t mix(uint32_t x, uint32_t key) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x += key;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// The bits of the state's slots (reference.state_bits): grad_avg has those mixed again, square_avg those of the parameter
// with swapped halves, momentum_buffer both.
RMSPROP_INLINE uint32_t mixed_again(uint32_t x) {
  x = (x ^ x >> 15) * 0x2c1b3c6du;
  return x ^ x >> 12;
}

RMSPROP_INLINE uint32_t swapped(uint32_t x) { return x >> 16 | x << 16; }

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

template <class T>
RMSPROP_INLINE void put(char* to, int64_t i, typename T::Bits x) {
  std::memcpy(to + i * int64_t(sizeof(x)), &x, sizeof(x));
}

}  // namespace
