// Matrices in the cache as operands of products whose results stay in registers: as they are, or as pairs of bfloat16
// (AVX512-BF16). A matrix (rows, row) may be the left operand by its rows or by its columns, or the right one.
#pragma once

#include <algorithm>

#include "products.h"

namespace taipan {

template <class T>
struct PlainMatrix {
  static constexpr bool kRounds = false;
  static constexpr Index kTogether = 1;  // terms of a sum that are read at once: sums begin at a multiple
  T* at;
  Index row;
  PlainMatrix(Scratch& scratch, Index rows, Index row) : at(scratch.take<T>(rows * row)), row(row) {}

  // Row i, times a factor, filled up with zeros.
  template <class W>
  void set(Index i, Index width, const W* from, T factor) const {
    T* to = at + i * row;
    widen_row(width, from, to);
    std::fill(to + width, to + row, T(0));
    for (Index e = 0; e < row; e += kLanes<T>) store(to + e, factor * load(to + e));
  }
  void clear(Index begin, Index end) const { std::fill(at + begin * row, at + end * row, T(0)); }
  void set_transposed(const PlainMatrix& of, Index rows, Index columns) const {
    transpose(rows, columns, of.at, of.row, at, row);
  }

  // A finished tile; two rows of a vector.
  template <int R, int V>
  void put(const Tile<T, R, V>& tile, Index i, Index c) const {
    tile.put(at + i * row + c, row);
  }
  void put_two(Index i, Index c, Vector<T> first, Vector<T> second) const {
    store(at + i * row + c, first);
    store(at + (i + 1) * row + c, second);
  }
  // Numbers in full precision at the same places, which may be those of the matrix itself.
  T* wide(Scratch&, Index) const { return at; }
  // To be called between setting rows [begin, end) and using them by columns or on the right.
  void pair_up(Index, Index, Index, Index) const {}

  // tile(r, ·) += Σ_k left(i + r, k) right(k, c + ·), k in [begin, end); and with left(k, i + r).
  template <int R, int V>
  static void multiply_rows(Tile<T, R, V>& tile, Index begin, Index end, const PlainMatrix& left, Index i,
                            const PlainMatrix& right, Index c) {
    tile.multiply(end - begin, left.at + i * left.row + begin, left.row, 1, right.at + begin * right.row + c, right.row);
  }
  template <int R, int V>
  static void multiply_columns(Tile<T, R, V>& tile, Index begin, Index end, const PlainMatrix& left, Index i,
                               const PlainMatrix& right, Index c) {
    tile.multiply(end - begin, left.at + begin * left.row + i, 1, left.row, right.at + begin * right.row + c, right.row);
  }
};

#if defined(__AVX512BF16__)
// Numbers are rounded to bfloat16 where they enter a matrix; rows are multiples of 16. Held twice: by rows, where pairs of
// terms lie beside each other, and two rows interleaved.
struct PairMatrix {
  static constexpr bool kRounds = true;
  static constexpr Index kTogether = 2;
  Bfloat16 *flat, *pairs;
  Index row;
  PairMatrix(Scratch& scratch, Index rows, Index row)
      : flat(scratch.take<Bfloat16>(rows * row + kPairLanes)),  // whole vectors are read
        pairs(scratch.take<Bfloat16>(round_up(rows, 2) * row)), row(row) {}

  // A factor has to be 1: it would be rounded.
  void set(Index i, Index width, const Bfloat16* from, float) const {
    Bfloat16* to = flat + i * row;
    Index e = 0;
    for (; e + kPairLanes <= width; e += kPairLanes) _mm512_storeu_si512(to + e, _mm512_loadu_si512(from + e));
    std::copy(from + e, from + width, to + e);  // a call, which takes longer than the copies before it
    std::fill(to + width, to + row, Bfloat16(0));
  }
  void clear(Index begin, Index end) const { std::fill(flat + begin * row, flat + end * row, Bfloat16(0)); }
  // Pairs of columns become pairs of rows: numbers of 32 bits.
  void set_transposed(const PairMatrix& of, Index rows, Index) const {
    transpose(rows, of.row / 2, reinterpret_cast<const float*>(of.flat), of.row / 2, reinterpret_cast<float*>(pairs), row);
  }

  template <int R, int V>
  void put(const Tile<float, R, V>& tile, Index i, Index c) const {
    tile.put(flat + i * row + c, row);
  }
  void put_two(Index i, Index c, Vector<float> first, Vector<float> second) const {
    _mm512_storeu_si512(pairs + i * row + 2 * c, beside(first, second));
  }
  float* wide(Scratch& scratch, Index rows) const { return scratch.take<float>(rows * row); }
  void pair_up(Index begin, Index end, Index left, Index right) const {
    for (Index i = begin; i < end; i += 2)
      for (Index c = left; c < right; c += 16) {
        const auto half = [&](Index r) {
          return r < end ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(flat + r * row + c)))
                         : _mm512_setzero_si512();
        };
        _mm512_storeu_si512(pairs + i * row + 2 * c, _mm512_or_si512(half(i), _mm512_slli_epi32(half(i + 1), 16)));
      }
  }

  template <int R, int V>
  static void multiply_rows(Tile<float, R, V>& tile, Index begin, Index end, const PairMatrix& left, Index i,
                            const PairMatrix& right, Index c) {
    tile.multiply_pairs((end - begin + 1) / 2, left.flat + i * left.row + begin, left.row, 2,
                        right.pairs + begin * right.row + 2 * c, 2 * right.row);
  }
  template <int R, int V>
  static void multiply_columns(Tile<float, R, V>& tile, Index begin, Index end, const PairMatrix& left, Index i,
                               const PairMatrix& right, Index c) {
    tile.multiply_pairs((end - begin + 1) / 2, left.pairs + begin * left.row + 2 * i, 2, 2 * left.row,
                        right.pairs + begin * right.row + 2 * c, 2 * right.row);
  }
};

template <class T, class W>
using MatrixFor = std::conditional_t<std::is_same_v<T, float> && std::is_same_v<W, Bfloat16>, PairMatrix, PlainMatrix<T>>;
#else
template <class T, class W>
using MatrixFor = PlainMatrix<T>;
#endif

}  // namespace taipan
