// Products of small matrices in the cache: tiles of the result in registers; the caller says what happens to a finished
// tile.
#pragma once

#include <utility>

#include "narrow.h"

namespace taipan {

// Rows and vectors of a tile: its accumulators leave room in 16 registers (32 with AVX-512).
constexpr int kTileRows = 6;
constexpr int kTileVectors = kBytes == 64 ? 4 : 2;

template <class T, int R, int W>
struct Tile {
  Vector<T> v[R][W];

  // += Σ_k a(r, k) b(k, ·), where a(r, k) = a[r · a_row + k · a_k] and b(k, ·) = b[k · b_k …].
  void multiply(Index count, const T* a, Index a_row, Index a_k, const T* b, Index b_k) {
    for (Index k = 0; k < count; ++k) {
      Vector<T> right[W];
      for (int w = 0; w < W; ++w) right[w] = load(b + w * kLanes<T>);
      for (int r = 0; r < R; ++r) {
        const T left = a[r * a_row];
        for (int w = 0; w < W; ++w) v[r][w] += left * right[w];
      }
      a += a_k;
      b += b_k;
    }
  }

#if defined(__AVX512BF16__)
  // The same for bfloat16 with sums in fp32, two k at once: a(r, 2k) and a(r, 2k + 1) lie beside each other, and so do
  // b(2k, ·) and b(2k + 1, ·), lane by lane. Numbers below the smallest normal one count as 0.
  void multiply_pairs(Index pairs, const Bfloat16* a, Index a_row, Index a_pair, const Bfloat16* b, Index b_pair) {
    static_assert(std::is_same_v<T, float>);
    Vector<T> sum[R][W];  // of its own, or each step would go through memory
    std::memcpy(&sum, &v, sizeof v);
    for (Index k = 0; k < pairs; ++k) {
      __m512bh right[W];
      for (int w = 0; w < W; ++w) std::memcpy(&right[w], b + w * 2 * kLanes<T>, sizeof right[w]);
      for (int r = 0; r < R; ++r) {
        std::int32_t pair;
        std::memcpy(&pair, a + r * a_row, sizeof pair);
        const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        for (int w = 0; w < W; ++w) sum[r][w] = _mm512_dpbf16_ps(sum[r][w], left, right[w]);
      }
      a += a_pair;
      b += b_pair;
    }
    std::memcpy(&v, &sum, sizeof v);
  }
#endif

  void clear() {
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w) v[r][w] = Vector<T>{};
  }

  // = factor · c
  void take(const T* c, Index c_row, T factor) {
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w) v[r][w] = factor * load(c + r * c_row + w * kLanes<T>);
  }

  void scale(T factor) {
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w) v[r][w] *= factor;
  }

  void scale_rows(const T* factor) {
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w) v[r][w] *= factor[r];
  }

  // c += the tile: many sums of few terms each lose less than one of all.
  void add_to(T* c, Index c_row) const {
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w) {
        T* at = c + r * c_row + w * kLanes<T>;
        store(at, load(at) + v[r][w]);
      }
  }

  template <class X>
  void put(X* c, Index c_row) const {
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w) narrow(c + r * c_row + w * kLanes<T>, v[r][w]);
  }
};

template <class T, int W, class F>
inline void tile_column(Index rows, Index column, F& f) {
  Index row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) f.template operator()<kTileRows, W>(row, column);
  static_assert(kTileRows == 6);
  switch (rows - row) {
    case 5: f.template operator()<5, W>(row, column); break;
    case 4: f.template operator()<4, W>(row, column); break;
    case 3: f.template operator()<3, W>(row, column); break;
    case 2: f.template operator()<2, W>(row, column); break;
    case 1: f.template operator()<1, W>(row, column); break;
    default: break;
  }
}

// Calls f<R, W>(row, column) for the tiles of a (rows, columns) matrix; columns are a multiple of the vector width.
template <class T, class F>
inline void for_tiles(Index rows, Index columns, F&& f) {
  Index column = 0;
  for (; column + kTileVectors * kLanes<T> <= columns; column += kTileVectors * kLanes<T>)
    tile_column<T, kTileVectors>(rows, column, f);
  for (; column < columns; column += kLanes<T>) tile_column<T, 1>(rows, column, f);
}

// Of each pair of blocks of `Step` lanes of (a, b) the first, or the second (`Odd`).
template <int Step, int Odd, class V, int... Lane>
inline V half_of(V a, V b, std::integer_sequence<int, Lane...>) {
  constexpr int kCount = sizeof...(Lane);
  return __builtin_shufflevector(a, b, (Lane / Step % 2 == 0 ? Lane + Odd * Step : kCount + Lane - Step + Odd * Step)...);
}

template <class T, int Step = 1>
inline void transpose_square(Vector<T>* v) {
  if constexpr (Step < kLanes<T>) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>();
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i / Step % 2 != 0) continue;
      const Vector<T> first = v[i], second = v[i + Step];
      v[i] = half_of<Step, 0>(first, second, lanes);
      v[i + Step] = half_of<Step, 1>(first, second, lanes);
    }
    transpose_square<T, 2 * Step>(v);
  }
}

// to(j, i) = from(i, j), and 0 up to a whole vector of rows. Rows of `from` are read in whole vectors.
template <class T>
inline void transpose(Index rows, Index columns, const T* from, Index from_row, T* to, Index to_row) {
  for (Index i = 0; i < rows; i += kLanes<T>)
    for (Index j = 0; j < columns; j += kLanes<T>) {
      Vector<T> v[kLanes<T>];
      for (int n = 0; n < kLanes<T>; ++n) v[n] = i + n < rows ? load(from + (i + n) * from_row + j) : Vector<T>{};
      transpose_square<T>(v);
      for (int n = 0; n < kLanes<T> && j + n < columns; ++n) store(to + (j + n) * to_row + i, v[n]);
    }
}

// Of counts that four vectors divide.
template <class T>
inline T dot(Index count, const T* a, const T* b) {
  Vector<T> total[4] = {};
  for (Index i = 0; i < count; i += 4 * kLanes<T>)
    for (int n = 0; n < 4; ++n) total[n] += load(a + i + n * kLanes<T>) * load(b + i + n * kLanes<T>);
  return sum<T>((total[0] + total[1]) + (total[2] + total[3]));
}

}  // namespace taipan
