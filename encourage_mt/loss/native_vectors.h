// Vectors for native.cpp: loads and stores, exp, sin and cos, and loops over a row.
//
// Vectors are those of GCC and Clang (`vector_size`), so the code is the same for every instruction set.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int64_t CHUNK = 512;  // elements added up in their own type before float64 takes over

// Sum is a name that depends on T, because GCC ignores a `vector_size` that depends on T for plain double.
template <typename T>
struct Traits;

template <>
struct Traits<float> {
  using Integer = int32_t;
  using Sum = double;
  static constexpr int mantissa = 23, bias = 127, terms = 8, trigonometric_terms = 6;
  static constexpr float round = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, left in the lowest bits
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest = -87.33f;  // exp of less is subnormal, and taken for 0
};

template <>
struct Traits<double> {
  using Integer = int64_t;
  using Sum = double;
  static constexpr int mantissa = 52, bias = 1023, terms = 14, trigonometric_terms = 9;
  static constexpr double round = 6755399441055744.0;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double lowest = -708.39;
};

template <typename T>
struct Simd {
  static constexpr int64_t width = VECTOR_BYTES / sizeof(T);
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef typename Traits<T>::Integer Integers __attribute__((vector_size(VECTOR_BYTES)));
  typedef typename Traits<T>::Sum Doubles __attribute__((vector_size(width * sizeof(double))));

  static Vector fill(T value) { return Vector{} + value; }

  // The first `count` of a vector at `from`; the rest is `padding`.
  static Vector load(const T* from, int64_t count, T padding) {
    Vector vector;
    if (count == width) {
      std::memcpy(&vector, from, VECTOR_BYTES);
    } else {
      vector = fill(padding);
      std::memcpy(&vector, from, count * sizeof(T));
    }
    return vector;
  }

  static void store(T* to, int64_t count, Vector vector) {
    if (count == width) {
      std::memcpy(to, &vector, VECTOR_BYTES);
    } else {
      std::memcpy(to, &vector, count * sizeof(T));
    }
  }

  static double sum(Doubles lanes) {
    double total = 0;
    for (int64_t lane = 0; lane < width; ++lane) total += lanes[lane];
    return total;
  }
};

// 1 / k!
constexpr std::array<double, 20> inverse_factorials() {
  std::array<double, 20> table{};
  double factorial = 1;
  for (int k = 0; k < 20; ++k) {
    factorial *= k > 1 ? k : 1;
    table[k] = 1 / factorial;
  }
  return table;
}
constexpr auto INVERSE_FACTORIALS = inverse_factorials();

// exp(x) of x <= 0, to about a rounding step; 0 for -inf, NaN for NaN.
template <typename T>
inline typename Simd<T>::Vector exponential(typename Simd<T>::Vector x) {
  using Vector = typename Simd<T>::Vector;
  using Integers = typename Simd<T>::Integers;
  const Vector clamped = x < Traits<T>::lowest ? Simd<T>::fill(Traits<T>::lowest) : x;
  const Vector shifted = clamped * T(1.44269504088896340736) + Traits<T>::round;
  const Vector n = shifted - Traits<T>::round;
  const Vector r = (clamped - n * Traits<T>::ln2_high) - n * Traits<T>::ln2_low;
  Vector series = Simd<T>::fill(T(INVERSE_FACTORIALS[Traits<T>::terms - 1]));
  for (int k = Traits<T>::terms - 2; k >= 0; --k) series = series * r + T(INVERSE_FACTORIALS[k]);
  Integers bits;
  std::memcpy(&bits, &shifted, VECTOR_BYTES);
  bits = (bits + Traits<T>::bias) << Traits<T>::mantissa;
  Vector power;
  std::memcpy(&power, &bits, VECTOR_BYTES);
  return x < Traits<T>::lowest ? Vector{} : series * power;
}

// sin(x) (odd = 1) or cos(x) (odd = 0) for 0 <= x <= pi / 4.
template <typename T>
inline typename Simd<T>::Vector trigonometric(typename Simd<T>::Vector x, int odd) {
  const auto square = x * x;
  auto series = Simd<T>::fill(T(0));
  for (int k = Traits<T>::trigonometric_terms - 1; k >= 0; --k) {
    series = T(INVERSE_FACTORIALS[2 * k + odd]) - square * series;
  }
  return odd ? series * x : series;
}

// Calls f(index, count) for each vector of [begin, end); only the last can have a count below the width.
template <typename T, typename F>
inline void each_vector(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t width = Simd<T>::width;
  for (; begin + width <= end; begin += width) f(begin, width);
  if (begin < end) f(begin, end - begin);
}

// The same in chunks; after(begin of chunk) is called after each.
template <typename T, typename F, typename G>
inline void each_chunk(int64_t begin, int64_t end, const F& f, const G& after) {
  for (; begin < end; begin += CHUNK) {
    each_vector<T>(begin, std::min(begin + CHUNK, end), f);
    after(begin);
  }
}

}  // namespace
