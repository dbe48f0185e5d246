// Products of small matrices that lie in the cache: tiles of the result in registers, what is done with a finished tile
// left to the caller.
#pragma once

#include "simd.h"

namespace taipan {

// Rows and vectors of a tile: as many accumulators as leave room in 16 (32 with AVX-512) registers.
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

  void clear() {
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w) v[r][w] = Vector<T>{};
  }

  // = factor · c
  void take(const T* c, Index c_row, T factor) {
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w) v[r][w] = factor * load(c + r * c_row + w * kLanes<T>);
  }

  void scale_rows(const T* factor) {
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w) v[r][w] *= factor[r];
  }

  void put(T* c, Index c_row) const {
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w) store(c + r * c_row + w * kLanes<T>, v[r][w]);
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

// to(j, i) = from(i, j).
template <class T>
inline void transpose(Index rows, Index columns, const T* from, Index from_row, T* to, Index to_row) {
  constexpr Index kBlock = 8;
  for (Index i0 = 0; i0 < rows; i0 += kBlock)
    for (Index j0 = 0; j0 < columns; j0 += kBlock) {
      const Index i1 = i0 + kBlock < rows ? i0 + kBlock : rows, j1 = j0 + kBlock < columns ? j0 + kBlock : columns;
      for (Index j = j0; j < j1; ++j)
        for (Index i = i0; i < i1; ++i) to[j * to_row + i] = from[i * from_row + j];
    }
}

template <class T>
inline T dot(Index count, const T* a, const T* b) {
  Vector<T> total{};
  for (Index i = 0; i < count; i += kLanes<T>) total += load(a + i) * load(b + i);
  return sum<T>(total);
}

}  // namespace taipan
