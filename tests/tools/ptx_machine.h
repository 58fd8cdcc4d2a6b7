// What PTX instructions do, for ptx_machine.py. A register is raw bits; `as` reads it as a type, `put` writes it.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

inline float widened(uint32_t sign, int exponent, uint32_t mantissa, int digits, int bias) {
  float x;
  if (exponent == 2 * bias + 1) {
    x = mantissa ? NAN : INFINITY;
  } else {
    x = std::ldexp(float(exponent ? mantissa | 1u << digits : mantissa), (exponent ? exponent : 1) - bias - digits);
  }
  return sign ? -x : x;
}

// The nearest of a format with so many digits after the first and such a bias, to even.
inline uint16_t narrowed(float x, int digits, int bias) {
  uint16_t sign = std::signbit(x) ? 0x8000 : 0, special = uint16_t((2 * bias + 1) << digits);
  if (std::isnan(x)) return 0x7fff;
  if (std::isinf(x)) return sign | special;
  if (x == 0) return sign;
  int e = std::ilogb(x);
  if (e < 1 - bias) e = 1 - bias;
  double units = std::nearbyint(std::ldexp(std::fabs(double(x)), digits - e));
  double whole = std::ldexp(1.0, digits);
  if (units >= 2 * whole) units /= 2, e += 1;
  if (e > bias) return sign | special;
  uint16_t field = units < whole ? 0 : uint16_t(e + bias);
  return sign | uint16_t(field << digits) | uint16_t(units < whole ? units : units - whole);
}

struct bf16 {
  uint16_t bits;
  bf16() = default;
  explicit bf16(float x) : bits(narrowed(x, 7, 127)) {}
  operator float() const { return widened(bits >> 15, bits >> 7 & 0xff, bits & 0x7f, 7, 127); }
};

struct f16 {
  uint16_t bits;
  f16() = default;
  explicit f16(float x) : bits(narrowed(x, 10, 15)) {}
  operator float() const { return widened(bits >> 15, bits >> 10 & 0x1f, bits & 0x3ff, 10, 15); }
};

template <class T, class From> T as(From raw) {
  if constexpr (std::is_integral_v<T>) {
    return T(raw);
  } else {
    T x;
    uint64_t wide = uint64_t(raw);
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
}

template <class R, class T> void put(R& r, T x) {
  if constexpr (std::is_integral_v<T>) {
    r = R(x);
  } else {
    uint64_t raw = 0;
    std::memcpy(&raw, &x, sizeof x);
    r = R(raw);
  }
}

template <class T, int I> T half(uint32_t r) { return as<T>(uint16_t(r >> 16 * I)); }

template <class T, int N> T* aligned(uint64_t address) {
  if (address % (N * sizeof(T))) {
    std::fprintf(stderr, "%d values of %zu bytes at %#lx, which is not aligned\n", N, sizeof(T), long(address));
    std::abort();
  }
  return reinterpret_cast<T*>(address);
}

inline float op_fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double op_fma(double a, double b, double c) { return std::fma(a, b, c); }
template <class T> T op_mad(T a, T b, T c) { return T(a * b + c); }
template <class T> T op_sqrt(T x) { return std::sqrt(x); }
template <class T> T op_abs(T x) { return std::fabs(x); }
inline float op_abs_ftz(float x) { return std::fabs(x) < 0x1p-126f ? 0 : std::fabs(x); }
template <class T> T op_neg(T x) { return -x; }
template <class T> T op_not(T x) { return T(~x); }
template <class T> T op_min(T a, T b) { return a < b ? a : b; }
template <class T> T op_max(T a, T b) { return a > b ? a : b; }
template <class T> T op_shl(T x, uint32_t n) { return n < 8 * sizeof(T) ? T(x << n) : T(0); }
template <class T> T op_shr(T x, uint32_t n) {
  return n < 8 * sizeof(T) ? T(x >> n) : std::is_signed_v<T> && x < 0 ? T(-1) : T(0);
}
inline uint32_t op_shf_l_wrap(uint32_t low, uint32_t high, uint32_t n) {
  return uint32_t(((uint64_t(high) << 32 | low) << (n & 31)) >> 32);
}
inline uint32_t op_bfe(uint32_t x, uint32_t from, uint32_t count) { return x >> from & ((1ull << count) - 1); }
inline uint32_t op_prmt(uint32_t a, uint32_t b, uint32_t chosen) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t x = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t c = chosen >> 4 * i & 0xf, byte = bytes >> 8 * (c & 7) & 0xff;
    x |= (c & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
  }
  return x;
}
// Of 1/x the upper half alone: the steps after it make the number exact.
inline double op_rcp_approx_ftz(double x) {
  double y = 1 / x;
  uint64_t raw;
  std::memcpy(&raw, &y, sizeof y);
  return as<double>(raw >> 32 << 32);
}

#define THREAD                                                                                  \
  static void thread(const uint64_t* parameter, uint32_t _ctaid_x, uint32_t _tid_x);            \
  extern "C" void run(const uint64_t* parameter, uint32_t blocks, uint32_t threads, int back) { \
    for (uint32_t b = 0; b < blocks; b++)                                                       \
      for (uint32_t t = 0; t < threads; t++)                                                    \
        thread(parameter, back ? blocks - 1 - b : b, back ? threads - 1 - t : t);               \
  }                                                                                             \
  static void thread(const uint64_t* parameter, uint32_t _ctaid_x, uint32_t _tid_x)
