// Vectors of the width this machine has, in the vector extension that GCC and Clang share.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace taipan {

using Index = std::ptrdiff_t;

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(kBytes)));
  typedef float Unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef std::int32_t Integer __attribute__((vector_size(kBytes)));
};

template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(kBytes)));
  typedef double Unaligned __attribute__((vector_size(kBytes), aligned(8), may_alias));
  typedef std::int64_t Integer __attribute__((vector_size(kBytes)));
};

template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
constexpr int kLanes = kBytes / sizeof(T);

template <class T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

template <class T>
inline Vector<T> splat(T value) {
  return value - Vector<T>{};
}

// By halves: loses less, and additions do not wait for each other.
template <class T, int Bytes = kBytes, class V>
inline T sum(V v) {
  if constexpr (Bytes == sizeof(T)) {
    return v[0];
  } else {
    typedef T Half __attribute__((vector_size(Bytes / 2)));
    Half half[2];
    std::memcpy(&half, &v, sizeof half);
    return sum<T, Bytes / 2>(half[0] + half[1]);
  }
}

// v after rounding: prevents fusing a product with the next addition.
template <class T>
inline Vector<T> rounded(Vector<T> v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// Keeps v in a register: the compiler would load it again for every use, which takes longer than the use.
template <class V>
inline V held(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

inline Index round_up(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }

// e^x for x in [-87, 88], to about 2 units in the last place; NaN for NaN. Reduces by ln 2 in two parts; the polynomial
// is that of Cephes (Moshier 1992).
[[gnu::always_inline]] inline Vector<float> exponential_in_range(Vector<float> x) {
  using V = Vector<float>;
  using I = Simd<float>::Integer;
  const V magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer, which is then in the low bits
  const V shifted = x * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return reinterpret_cast<V>(reinterpret_cast<I>(p) + (reinterpret_cast<I>(shifted) << 23));
}

template <class T>
inline Vector<T> at_least(T low, Vector<T> x) {
  return splat(low) > x ? splat(low) : x;
}

template <class T>
inline Vector<T> at_most(T high, Vector<T> x) {
  return splat(high) < x ? splat(high) : x;
}

// e^x; 0 below the smallest normal number.
[[gnu::always_inline]] inline Vector<float> exponential(Vector<float> x) {
  const Vector<float> value = exponential_in_range(at_most(88.0f, at_least(-87.0f, x)));
  return x < splat(-87.0f) ? Vector<float>{} : value;
}

// The same for x ≤ 0 (or NaN).
[[gnu::always_inline]] inline Vector<float> exponential_of_negative(Vector<float> x) {
  const Vector<float> value = exponential_in_range(at_least(-87.0f, x));
  return x < splat(-87.0f) ? Vector<float>{} : value;
}

inline Vector<double> exponential(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

inline Vector<double> exponential_of_negative(Vector<double> x) { return exponential(x); }

inline Vector<float> sigmoid(Vector<float> x) {
  return 1.0f / (1.0f + exponential_in_range(at_most(87.0f, at_least(-87.0f, -x))));
}

inline Vector<double> sigmoid(Vector<double> x) { return 1.0 / (1.0 + exponential(-x)); }

// Memory of one thread, kept for the next call: fresh pages cost more than the work on them.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Start over with a Layout(*this, arguments…), whose constructor takes the memory; nothing if there is none.
  template <class Layout, class... Arguments>
  std::optional<Layout> lay_out(const Arguments&... arguments) {
    counting_ = true;
    used_ = 0;
    Layout(*this, arguments...);
    counting_ = false;
    if (!reserve(used_)) return std::nullopt;
    return std::optional<Layout>(std::in_place, *this, arguments...);
  }

  // Start over with room for `bytes`; false if there is no memory.
  bool reserve(std::size_t bytes) {
    used_ = 0;
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(memory_);
      memory_ = static_cast<char*>(std::aligned_alloc(64, bytes));
      size_ = memory_ == nullptr ? 0 : bytes;
    }
    return memory_ != nullptr;
  }

  // The next `count` elements, at a multiple of 64 bytes.
  template <class T>
  T* take(Index count) {
    T* p = counting_ ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += bytes<T>(count);
    return p;
  }

  template <class T>
  static std::size_t bytes(Index count) {
    return (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  char* memory_ = nullptr;
  std::size_t size_ = 0;
  std::size_t used_ = 0;
  bool counting_ = false;
};

inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// Results of every exported function.
enum Status : int { kOk = 0, kNoMemory = 1, kUnsupported = 2, kOutOfRange = 3 };

}  // namespace taipan
