// Products of a matrix with one vector or several, reading its rows in memory order: in Real, bfloat16, int8 or int4.
//
// One vector takes row after row, so memory is read from end to end. Several vectors take tiles of rows. All sums are in
// T, whatever the format of the weights. A product is one sum in the order of the columns, so its bits depend neither on
// how many vectors there are nor on the tile it stands in.
#pragma once

#include <algorithm>

#include "int4.h"
#include "interface.h"
#include "narrow.h"

namespace taipan {

template <class T>
inline Vector<T> load_some(const T* p, Index n) {
  if (n >= kLanes<T>) return load(p);
  Vector<T> v{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
}

template <class T>
inline void store_some(T* p, Vector<T> v, Index n) {
  if (n >= kLanes<T>)
    store(p, v);
  else
    std::memcpy(p, &v, n * sizeof(T));
}

template <class T>
inline T sigmoid_of(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

constexpr int kMany = 4;      // vectors at once
constexpr Index kPanel = 16;  // rows that are multiplied with all vectors before the next ones are read
// Rows of a tile: its sums leave room in 32 registers, or in 16.
constexpr int kRows = kBytes == 64 ? 4 : 2;

// left · right + total, fused where the processor can: left to the compiler, one shape of a loop is and another is not
// (GCC on Zen 2 and 3), and a row would get other bits alone than beside others.
template <class T>
inline Vector<T> add_product(Vector<T> total, Vector<T> left, Vector<T> right) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return reinterpret_cast<Vector<T>>(_mm512_fmadd_ps(reinterpret_cast<__m512>(left), reinterpret_cast<__m512>(right),
                                                       reinterpret_cast<__m512>(total)));
  else
    return reinterpret_cast<Vector<T>>(_mm512_fmadd_pd(reinterpret_cast<__m512d>(left), reinterpret_cast<__m512d>(right),
                                                       reinterpret_cast<__m512d>(total)));
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<T, float>)
    return reinterpret_cast<Vector<T>>(_mm256_fmadd_ps(reinterpret_cast<__m256>(left), reinterpret_cast<__m256>(right),
                                                       reinterpret_cast<__m256>(total)));
  else
    return reinterpret_cast<Vector<T>>(_mm256_fmadd_pd(reinterpret_cast<__m256d>(left), reinterpret_cast<__m256d>(right),
                                                       reinterpret_cast<__m256d>(total)));
#else
  return total + left * right;
#endif
}

// Rows to prefetch while several vectors take the present ones: the same rows one panel further, from `first` on. This
// keeps memory busy with the last vectors as well. One vector needs none, but `Along`.
struct Ahead {
  Index first = 0, rows = 0;

  template <class W>
  [[gnu::always_inline]] void fetch(const W* w, Index columns, Index k) const {
    for (Index row = first; row < first + rows; ++row) __builtin_prefetch(w + (kPanel + row) * columns + k, 0, 2);
  }
};

// What one vector fetches while it takes a row: the memory a few rows further on, which the processor does not foresee well
// by itself but with AVX-512, where fetching past the caches undoes what it does. Not measured with shorter registers.
struct Along {
  static constexpr Index kFetched = kBytes == 32 ? 1024 : 0;  // bytes ahead

  template <class W>
  [[gnu::always_inline]] void fetch(const W* w, Index, Index k) const {
    if constexpr (kFetched > 0) __builtin_prefetch(reinterpret_cast<const char*>(w + k) + kFetched, 0, 0);
  }
};

// Whether a line of memory begins with a row's column k.
template <class W>
inline bool begins_line(Index k) {
  return k * sizeof(W) % 64 == 0;
}

// The first n weights, n less than a vector, and zeros.
template <class T, class W>
inline Vector<T> widen_some(const W* w, Index n) {
  W some[kLanes<T>] = {};
  std::memcpy(some, w, n * sizeof(W));
  return widen<T>(static_cast<const W*>(some));
}

// out(c, r) = sum of total(r, c), each as `sum` adds it. The sixteen of a tile are added together where that is quicker.
template <class T, int R, int C>
inline void sum_all(const Vector<T> (&total)[R][C], T (&out)[C][R]) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && R == 4 && C == 4) {
    const auto halves = [](Vector<float> a, Vector<float> b) {  // lanes i and i + 8 of both
      const auto first = reinterpret_cast<__m512>(a), second = reinterpret_cast<__m512>(b);
      return _mm512_mask_blend_ps(0xff00, first, second) + _mm512_shuffle_f32x4(first, second, 0x4e);
    };
    __m512 row[4];  // a quarter is a column
    for (int r = 0; r < 4; ++r) {
      const __m512 first = halves(total[r][0], total[r][1]), second = halves(total[r][2], total[r][3]);
      row[r] = _mm512_shuffle_f32x4(first, second, 0x88) + _mm512_shuffle_f32x4(first, second, 0xdd);
    }
    const auto pairs = [](__m512 a, __m512 b) {
      const auto first = reinterpret_cast<__m512d>(a), second = reinterpret_cast<__m512d>(b);
      return reinterpret_cast<__m512>(_mm512_unpacklo_pd(first, second)) +
             reinterpret_cast<__m512>(_mm512_unpackhi_pd(first, second));
    };
    const __m512 low = pairs(row[0], row[1]), high = pairs(row[2], row[3]);
    _mm512_storeu_ps(&out[0][0], _mm512_shuffle_ps(low, high, 0x88) + _mm512_shuffle_ps(low, high, 0xdd));
    return;
  }
#endif
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[c][r] = sum<T>(total[r][c]);
}

// out(c, r) = Σ_k w(r, k) x(c, k)
template <class T, class W, int R, int C, class Fetched = Ahead>
inline void dots(Index count, const W* w, const T* x, Index x_row, T (&out)[C][R], const Fetched& ahead = {}) {
  Vector<T> total[R][C];
  for (auto& row : total)
    for (auto& one : row) one = Vector<T>{};
  Index k = 0;
  for (; k + kLanes<T> <= count; k += kLanes<T>) {
    if (begins_line<W>(k)) ahead.fetch(w, count, k);
    Vector<T> left[R];
    for (int r = 0; r < R; ++r) {
      left[r] = widen<T>(w + r * count + k);
      if constexpr (C > 1) left[r] = held(left[r]);
    }
    for (int c = 0; c < C; ++c) {
      const Vector<T> right = held(load(x + c * x_row + k));
      for (int r = 0; r < R; ++r) total[r][c] = add_product<T>(total[r][c], left[r], right);
    }
  }
  if (k < count)  // the rest as a vector, too: of single numbers compilers round some products and others not
    for (int r = 0; r < R; ++r) {
      const Vector<T> left = widen_some<T>(w + r * count + k, count - k);
      for (int c = 0; c < C; ++c)
        total[r][c] = add_product<T>(total[r][c], left, load_some(x + c * x_row + k, count - k));
    }
  sum_all(total, out);
}

// Where a product goes: out(c, row), or added to it.
template <class T>
struct Target {
  T* out;
  Index out_row;
  bool add;

  template <int R, int C>
  void put(const float* scale, Index row, Index column, const T (&value)[C][R]) const {  // scale of each row, or null
    if constexpr (R * sizeof(T) >= 16) {
      typedef T Rows __attribute__((vector_size(R * sizeof(T))));
      Rows scales{};
      if (scale != nullptr)
        for (int r = 0; r < R; ++r) scales[r] = scale[row + r];
      for (int c = 0; c < C; ++c) {
        T* place = out + (column + c) * out_row + row;
        Rows scaled, before;
        std::memcpy(&scaled, value[c], sizeof scaled);
        if (scale != nullptr) scaled = held(scaled * scales);  // rounded before it is added
        if (add) {
          std::memcpy(&before, place, sizeof before);
          scaled += before;
        }
        std::memcpy(place, &scaled, sizeof scaled);
      }
    } else {
      for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) {
          T* place = out + (column + c) * out_row + row + r;
          const T scaled = held(scale == nullptr ? value[c][r] : value[c][r] * scale[row + r]);
          *place = add ? *place + scaled : scaled;
        }
    }
  }
};

// Rows of W times vectors of T: any length, each weight widened when used.
template <class T, class W>
struct Plain {
  const W* weight;
  Index columns;
  const T* x;
  Index x_row;

  // The product of a row with the first vector.
  T one(Index row) const {
    T out[1][1];
    taipan::dots(columns, weight + row * columns, x, x_row, out, Along{});
    return out[0][0];
  }

  template <int R, int C>
  void dots(Index row, Index column, T (&out)[C][R], const Ahead& ahead) const {
    taipan::dots(columns, weight + row * columns, x + column * x_row, x_row, out, ahead);
  }
};

// Rows of bfloat16 times vectors in pairs: a word holds two weights. Masking the lower half gives the upper weight as a
// float, shifting up gives the lower one.
struct Pairs {
  typedef std::uint32_t Words __attribute__((vector_size(kBytes)));
  static constexpr Index kBoth = 2 * kLanes<float>;
  const std::uint16_t* weight;
  Index columns;
  float* x;

  static bool fits(Index columns) { return columns % kBoth == 0; }

  // Of every kBoth values first the even ones, then the odd ones.
  Pairs(const void* weight, Index columns, const float* from, Index from_row, Index count, float* room)
      : weight(static_cast<const std::uint16_t*>(weight)), columns(columns), x(room) {
    for (Index c = 0; c < count; ++c)
      for (Index k = 0; k < columns; k += kBoth) part(from + c * from_row + k, x + c * columns + k);
  }

  static void part(const float* from, float* to) {
#if defined(__AVX512F__)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 first = _mm512_loadu_ps(from), second = _mm512_loadu_ps(from + 16);
    _mm512_storeu_ps(to, _mm512_permutex2var_ps(first, even, second));
    _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(first, odd, second));
#else
    for (Index lane = 0; lane < kLanes<float>; ++lane) {
      to[lane] = from[2 * lane];
      to[kLanes<float> + lane] = from[2 * lane + 1];
    }
#endif
  }

  float one(Index row) const {
    float out[1][1];
    dots(row, 0, out, Along{});
    return out[0][0];
  }

  template <int R, int C, class Fetched>
  void dots(Index row, Index column, float (&out)[C][R], const Fetched& ahead) const {
    const std::uint16_t* w = weight + row * columns;
    const float* of = x + column * columns;
    Vector<float> total[R][C];
    for (auto& row : total)
      for (auto& one : row) one = Vector<float>{};
    for (Index k = 0; k < columns; k += kBoth) {
      if (begins_line<std::uint16_t>(k)) ahead.fetch(w, columns, k);
      Vector<float> even[R], odd[R];
      for (int r = 0; r < R; ++r) {
        Words words;
        std::memcpy(&words, w + r * columns + k, sizeof words);
        words = held(words);
        even[r] = reinterpret_cast<Vector<float>>(words << 16);
        odd[r] = reinterpret_cast<Vector<float>>(words & 0xffff0000u);
      }
      for (int c = 0; c < C; ++c) {
        const Vector<float> first = held(load(of + c * columns + k));
        const Vector<float> second = held(load(of + c * columns + k + kLanes<float>));
        for (int r = 0; r < R; ++r) {
          if constexpr (kBytes == 32) {  // one addition for both: with two, one after the other, a row takes as long as memory
            total[r][c] += add_product<float>(even[r] * first, odd[r], second);
          } else {
            total[r][c] = add_product<float>(total[r][c], even[r], first);
            total[r][c] = add_product<float>(total[r][c], odd[r], second);
          }
        }
      }
    }
    sum_all(total, out);
  }
};

// Rows of weights W times vectors X, one step of a Kind at a time: the Kind knows how many columns a step has, how it is
// read and added, how many columns fit a sum, and the unit of a vector.
template <class Kind, class W, class X>
struct Stepped {
  static constexpr Index kLine = 64 / sizeof(W);  // columns of a line of memory
  const W* weight;
  Index columns;
  X* x;

  float one(Index row) const {
    float out[1][1];
    dots(row, 0, out, Along{});
    return out[0][0];
  }

  template <int R, int C, class Fetched>
  [[gnu::always_inline]] void dots(Index row, Index column, float (&out)[C][R], const Fetched& ahead) const {
    sums(row, column, 0, std::min(Kind::kMost, columns), out, ahead);
    if (columns > Kind::kMost) add_rest(row, column, out, ahead);
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) out[c][r] *= kind().unit_of(column + c);
  }

 private:
  // Of columns [k, end).
  template <int R, int C, class Fetched>
  [[gnu::always_inline]] void sums(Index row, Index column, Index k, Index end, float (&out)[C][R],
                                   const Fetched& ahead) const {
    const W* w = weight + row * columns;
    const X* of = x + column * columns;
    typename Kind::Sums total[R][C];
    for (auto& sums : total)
      for (auto& one : sums) one = typename Kind::Sums{};
    const auto step = [&](Index k) __attribute__((always_inline)) {
      typename Kind::Operand left[R];
      for (int r = 0; r < R; ++r) left[r] = held(Kind::read(w + r * columns + k));
      for (int c = 0; c < C; ++c) {
        auto right = Kind::read(of + c * columns + k);
        if constexpr (R > 1) right = held(right);  // else the instruction that uses it reads it
        for (int r = 0; r < R; ++r) {
          total[r][c] = Kind::add(total[r][c], left[r], right);
          // or GCC has all products of a line first, which no registers hold
          if constexpr (R > 1) total[r][c] = held(total[r][c]);
        }
      }
    };
    for (; k + kLine <= end; k += kLine) {
      ahead.fetch(w, columns, k);
#pragma GCC unroll 4
      for (Index part = 0; part < kLine; part += Kind::kStep) step(k + part);
    }
    for (; k < end; k += Kind::kStep) step(k);
    Vector<float> floats[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) floats[r][c] = Kind::floats(total[r][c]);
    sum_all(floats, out);
  }

  template <int R, int C, class Fetched>
  [[gnu::noinline]] void add_rest(Index row, Index column, float (&out)[C][R], const Fetched& ahead) const {
    for (Index k = Kind::kMost; k < columns; k += Kind::kMost) {
      float more[C][R];
      sums(row, column, k, std::min(k + Kind::kMost, columns), more, ahead);
      for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) out[c][r] += more[c][r];
    }
  }

  const Kind& kind() const { return static_cast<const Kind&>(*this); }
};

#if defined(__AVX512BF16__)
// Rows of bfloat16 times vectors of a bfloat16 model, whose forward also rounds them before every product. Several vectors
// need half the instructions this way. One vector is limited by memory only, but must get what it gets beside others.
struct Rounded : Stepped<Rounded, Bfloat16, Bfloat16> {
  using Sums = __m512;
  using Operand = __m512bh;
  static constexpr Index kStep = 2 * kLanes<float>;
  static constexpr Index kMost = PTRDIFF_MAX;

  static bool fits(Index columns) { return columns % kStep == 0; }

  Rounded(const void* weight, Index columns, const float* from, Index from_row, Index count, float* room)
      : Stepped{static_cast<const Bfloat16*>(weight), columns, reinterpret_cast<Bfloat16*>(room)} {
    for (Index c = 0; c < count; ++c)
      for (Index k = 0; k < columns; k += kLanes<float>) narrow(x + c * columns + k, load(from + c * from_row + k));
  }

  static Operand read(const Bfloat16* p) {
    Operand v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  static Sums add(Sums total, Operand left, Operand right) { return _mm512_dpbf16_ps(total, left, right); }
  static Vector<float> floats(Sums total) { return reinterpret_cast<Vector<float>>(total); }
  float unit_of(Index) const { return 1; }
};
#endif

#if defined(__AVX2__)
// Rows of int8 times vectors rounded to 16 bits (1 / 65534 of their largest value): exact sums with half the instructions,
// where widening to float would take longer than reading memory.
struct Short : Stepped<Short, std::int8_t, std::int16_t> {
#if defined(__AVX512BW__)
  using Integers = __m512i;
#else
  using Integers = __m256i;
#endif
  using Sums = Integers;
  using Operand = Integers;
  static constexpr Index kStep = sizeof(Integers) / 2;
  static constexpr Index kMost = 4096;  // 512 products of 128 · 32767 in a lane fit 32 bits
  float* unit;  // of each vector

  static bool fits(Index columns) { return columns % kStep == 0; }

  Short(const void* weight, Index columns, const float* from, Index from_row, Index count, float* room)
      : Stepped{static_cast<const std::int8_t*>(weight), columns,
                reinterpret_cast<std::int16_t*>(room + round_up(count, 16))},
        unit(room) {
    for (Index c = 0; c < count; ++c) unit[c] = round(columns, from + c * from_row, x + c * columns);
  }

  // x to 16 bits; returns its unit.
  static float round(Index count, const float* x, std::int16_t* to) {
    Vector<float> most{};
    for (Index k = 0; k < count; k += kLanes<float>) {
      const Vector<float> value = load(x + k), size = value < Vector<float>{} ? -value : value;
      most = size > most ? size : most;
    }
    float largest = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) largest = std::max(largest, most[lane]);
    const float unit = largest > 0 ? largest / 32767 : 1;
    const __m256 per_unit = _mm256_set1_ps(1 / unit);
    for (Index k = 0; k < count; k += 16) {
      const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k), per_unit));
      const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + 8), per_unit));
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), both);
    }
    return unit;
  }

#if defined(__AVX512BW__)
  static Integers read(const std::int8_t* w) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
  }

  static Integers read(const std::int16_t* x) { return _mm512_loadu_si512(x); }

  static Integers add(Integers total, Integers left, Integers right) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(total, left, right);
#else
    return _mm512_add_epi32(total, _mm512_madd_epi16(left, right));
#endif
  }

  // To float before lanes are added: their sum does not fit 32 bits.
  static Vector<float> floats(Integers total) { return reinterpret_cast<Vector<float>>(_mm512_cvtepi32_ps(total)); }
#else
  static Integers read(const std::int8_t* w) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }

  static Integers read(const std::int16_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

  static Integers add(Integers total, Integers left, Integers right) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(left, right));
  }

  static Vector<float> floats(Integers total) { return reinterpret_cast<Vector<float>>(_mm256_cvtepi32_ps(total)); }
#endif

  float unit_of(Index vector) const { return unit[vector]; }
};
#endif

// The same vectors with the rows of another matrix of their shape and format.
template <class Rows>
Rows of_matrix(Rows rows, const Matrix& m) {
  rows.weight = static_cast<decltype(rows.weight)>(m.weight);
  if constexpr (std::is_base_of_v<Tiles, Rows>) rows.scale = static_cast<const Bfloat16*>(m.scale);
  return rows;
}

// Of int8: what a row's result is still to be multiplied with.
inline const float* row_scales(const Matrix& m) { return static_cast<const float*>(m.scale); }

// Rows [row, end) of the product with C vectors.
template <int C, class T, class Rows>
inline void rows_with(const Rows& rows, const Matrix& m, Index row, Index end, Index column, const Target<T>& target,
                      const Ahead& ahead) {
  for (; row + kRows <= end; row += kRows) {
    T value[C][kRows];
    rows.dots(row, column, value, ahead);
    target.put(row_scales(m), row, column, value);
  }
  for (; row < end; ++row) {
    T value[C][1];
    rows.dots(row, column, value, Ahead{});
    target.put(row_scales(m), row, column, value);
  }
}

// A tile of int4 times C vectors, of whose results those of `rows` rows count.
template <int C, class T, class Rows>
inline void tile_with(const Rows& tiles, Index row, Index rows, Index column, const Target<T>& target) {
  T value[C][kTile];
  tiles.products(row / kTile, column, value);
  for (int c = 0; c < C; ++c)
    for (Index r = 0; r < rows; ++r) {
      T* place = target.out + (column + c) * target.out_row + row + r;
      *place = target.add ? *place + value[c][r] : value[c][r];
    }
}

// Rows [row, end) of the product of a matrix of int4 with `count` vectors; `row` begins a tile.
template <class T, class Rows>
  requires std::is_base_of_v<Tiles, Rows>
void product_of(const Rows& tiles, const Matrix&, Index row, Index end, Index count, const Target<T>& target) {
  for (; row < end; row += kTile) {
    const Index rows = std::min(kTile, end - row);
    for (Index column = 0; column < count; column += kMany) {
      switch (count - column) {
        case 1: tile_with<1>(tiles, row, rows, column, target); break;
        case 2: tile_with<2>(tiles, row, rows, column, target); break;
        case 3: tile_with<3>(tiles, row, rows, column, target); break;
        default: tile_with<kMany>(tiles, row, rows, column, target); break;
      }
    }
  }
}

// Rows [row, end) of the product with `count` vectors. kMany vectors at a time stay in the first cache while they take a
// panel of rows; the next vectors find the panel in the second cache.
template <class T, class Rows>
void product_of(const Rows& rows, const Matrix& m, Index row, Index end, Index count, const Target<T>& target) {
  if (count == 1) {
    for (; row < end; ++row) {
      const T value[1][1] = {{rows.one(row)}};
      target.put(row_scales(m), row, 0, value);
    }
    return;
  }
  const Index passes = (count + kMany - 1) / kMany, fetched = (kRows + passes - 1) / passes;
  for (; row < end; row += kPanel) {
    const Index until = std::min(row + kPanel, end);
    Ahead ahead{0, fetched};
    for (Index column = 0; column < count; column += kMany) {
      switch (count - column) {
        case 1: rows_with<1>(rows, m, row, until, column, target, ahead); break;
        case 2: rows_with<2>(rows, m, row, until, column, target, ahead); break;
        case 3: rows_with<3>(rows, m, row, until, column, target, ahead); break;
        default: rows_with<kMany>(rows, m, row, until, column, target, ahead); break;
      }
      ahead.first += ahead.rows;
      ahead.rows = std::min(fetched, kRows - ahead.first);
    }
  }
}

// Floats needed for a copy of a product's vectors in the layout of its rows.
inline Index room_of(Index count, Index columns) {
  return count * round_up(columns, kGroup) + round_up(count, 16);
}

// Calls f(rows) with the rows of a matrix for `count` vectors x(c, ·), which may be rounded to bfloat16 if `rounds`;
// `room` has as many floats as room_of says.
template <class T, class W, class F>
void with_rows(const Matrix& m, const T* x, Index x_row, Index count, [[maybe_unused]] bool rounds, T* room, F&& f) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<W, std::uint16_t> && std::is_same_v<T, float>)
    if (rounds && Rounded::fits(m.columns)) return f(Rounded(m.weight, m.columns, x, x_row, count, room));
#endif
  if constexpr (std::is_same_v<W, std::uint16_t> && std::is_same_v<T, float>)
    if (Pairs::fits(m.columns)) return f(Pairs(m.weight, m.columns, x, x_row, count, room));
#if defined(__AVX2__)
  if constexpr (std::is_same_v<W, std::int8_t> && std::is_same_v<T, float>)
    if (Short::fits(m.columns)) return f(Short(m.weight, m.columns, x, x_row, count, room));
#endif
  f(Plain<T, W>{static_cast<const W*>(m.weight), m.columns, x, x_row});
}

// The same of a matrix of int4.
template <class T, class F>
void with_tiles(const Matrix& m, const T* x, Index x_row, [[maybe_unused]] Index count, [[maybe_unused]] T* room, F&& f) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    f(ShortTiles(m, x, x_row, count, room));
  else
#endif
    f(PlainTiles<T>(m, x, x_row));
}

}  // namespace taipan
