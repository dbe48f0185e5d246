// Numbers that are narrower in memory than in the registers: bfloat16 (as the upper half of a float, in 16 bits) and
// int8. Widening loses nothing; narrowing to bfloat16 rounds to nearest, ties to even, as PyTorch does.
#pragma once

#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace taipan {

using Bfloat16 = std::uint16_t;

template <class T, class W>
struct Widening {
  typedef W Narrow __attribute__((vector_size(kLanes<T> * sizeof(W))));
  typedef std::int32_t Integer __attribute__((vector_size(kLanes<T> * 4)));
  typedef float Single __attribute__((vector_size(kLanes<T> * 4)));
};

// The conversion of the vector extension; GCC's code for it is three to ten times slower than necessary.
template <class T, class W>
inline typename Widening<T, W>::Integer to_integers(const W* p) {
  typename Widening<T, W>::Narrow narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  return __builtin_convertvector(narrow, typename Widening<T, W>::Integer);
}

#if defined(__AVX512F__)
template <>
inline Widening<float, Bfloat16>::Integer to_integers<float>(const Bfloat16* p) {
  return reinterpret_cast<Widening<float, Bfloat16>::Integer>(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}

template <>
inline Widening<float, std::int8_t>::Integer to_integers<float>(const std::int8_t* p) {
  return reinterpret_cast<Widening<float, std::int8_t>::Integer>(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(__AVX2__)
template <>
inline Widening<float, Bfloat16>::Integer to_integers<float>(const Bfloat16* p) {
  return reinterpret_cast<Widening<float, Bfloat16>::Integer>(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

template <>
inline Widening<float, std::int8_t>::Integer to_integers<float>(const std::int8_t* p) {
  return reinterpret_cast<Widening<float, std::int8_t>::Integer>(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#endif

// A vector of T from W in memory.
template <class T, class W>
inline Vector<T> widen(const W* p) {
  if constexpr (std::is_same_v<T, W>)
    return load(p);
  else if constexpr (std::is_same_v<W, std::int8_t>)
    return __builtin_convertvector(to_integers<T>(p), Vector<T>);
  else
    return __builtin_convertvector(reinterpret_cast<typename Widening<T, W>::Single>(to_integers<T>(p) << 16),
                                   Vector<T>);
}

template <class T, class W>
inline T widen_one(W value) {
  if constexpr (std::is_same_v<W, Bfloat16>) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
    float single;
    std::memcpy(&single, &bits, sizeof single);
    return single;
  } else {
    return value;
  }
}

template <class T, class W>
inline void widen_row(Index count, const W* from, T* to) {
  Index k = 0;
  for (; k + kLanes<T> <= count; k += kLanes<T>) store(to + k, widen<T>(from + k));
  for (; k < count; ++k) to[k] = widen_one<T>(from[k]);
}

// The upper 16 bits are the bfloat16; NaN stays NaN.
inline std::uint32_t rounded_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return x != x ? bits | 0x400000u : bits + 0x7fff + (bits >> 16 & 1);
}

// x, rounded to bfloat16.
template <class T>
inline T to_bfloat16(T x) {
  const std::uint32_t bits = rounded_bits(static_cast<float>(x)) & 0xffff0000u;
  float rounded;
  std::memcpy(&rounded, &bits, sizeof rounded);
  return rounded;
}

template <class W, class T>
inline W narrow_one(T value) {
  if constexpr (std::is_same_v<W, Bfloat16>)
    return static_cast<Bfloat16>(rounded_bits(value) >> 16);
  else
    return value;
}

typedef std::uint32_t Bits __attribute__((vector_size(kBytes)));

inline Bits rounded_bits(Vector<float> v) {
  const Bits bits = reinterpret_cast<Bits>(v);
  return v != v ? bits | 0x400000u : bits + 0x7fff + (bits >> 16 & 1);
}

// x of every lane, rounded to bfloat16.
inline Vector<float> to_bfloat16(Vector<float> v) {
  return reinterpret_cast<Vector<float>>(rounded_bits(v) & 0xffff0000u);
}

inline Vector<double> to_bfloat16(Vector<double> v) {
  for (int lane = 0; lane < kLanes<double>; ++lane) v[lane] = to_bfloat16<double>(v[lane]);
  return v;
}

// A vector of T to W in memory.
template <class T>
inline void narrow(T* p, Vector<T> v) {
  store(p, v);
}

inline void narrow(Bfloat16* p, Vector<float> v) {
  const Bits rounded = rounded_bits(v);
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(rounded >> 16)));
#elif defined(__AVX2__)
  const __m256i upper = reinterpret_cast<__m256i>(rounded >> 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  const auto short_ = __builtin_convertvector(rounded >> 16, typename Widening<float, Bfloat16>::Narrow);
  std::memcpy(p, &short_, sizeof short_);
#endif
}

// Two vectors to bfloat16 in memory, interleaved lane by lane.
inline void narrow_pairs(Bfloat16* p, Vector<float> first, Vector<float> second) {
  const Bits pairs = rounded_bits(first) >> 16 | (rounded_bits(second) & 0xffff0000u);
  std::memcpy(p, &pairs, sizeof pairs);
}

// Calls f<X>() with the type in memory of the wide tensors of a call: Real, or bfloat16 if Real is float.
template <class Real, class F>
inline int with_element(Index narrow, F&& f) {
  if constexpr (std::is_same_v<Real, float>)
    if (narrow) return f.template operator()<Bfloat16>();
  return f.template operator()<Real>();
}

}  // namespace taipan
