// Products of the matrices of a chunk, out = left right + factor · add, in three ways: operands as they are, in vector
// registers; bfloat16 in vector registers (AVX512-BF16); bfloat16 in tile registers (AMX). The last two pack their
// operands in pairs of numbers that are multiplied and added together. An operand packed in three parts, which hold all
// bits of a float, loses nothing; packed in one part it is rounded.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "tiles.h"

namespace taipan {

// Which entries of the left operand are 0, or of the result are not needed.
enum class Where {
  kAll,
  kLower,        // left(i, k) is 0 for k > i
  kUpper,        // left(i, k) is 0 for k < i
  kResultLower,  // out(i, j) is wanted for j ≤ i only
};

template <class T>
struct Addend {
  const T* at;  // null: nothing is added
  Index row;
  T factor;
};

// The same for all ways. Sizes are (m, k) (k, n). An operand is set from a matrix (`rows`) or from its transpose
// (`columns`). Rows are read in whole vectors: beyond the sizes they hold 0. n is a multiple of the vector width; `out`
// has memory for a multiple of 16 rows. A plain operand points into its source, which must live until the product.
template <class T>
struct PlainProduct {
  struct Left {
    const T* at = nullptr;
    Index row = 0, k = 0;
    Left(Scratch&, Index, Index) {}
    void rows(Index, Index, const T* from, Index from_row) { at = from, row = from_row, k = 1; }
    void columns(Index, Index, const T* from, Index from_row) { at = from, row = 1, k = from_row; }
  };

  struct Right {
    const T* at = nullptr;
    Index k = 0;
    Right(Scratch& scratch, Index count, Index n) : memory_(scratch.take<T>(count * round_up(n, kLanes<T>))) {}
    void rows(Index, Index, const T* from, Index from_row) { at = from, k = from_row; }
    void columns(Index count, Index n, const T* from, Index from_row) {
      at = memory_, k = round_up(n, kLanes<T>);
      transpose(n, count, from, from_row, memory_, k);
    }

   private:
    T* memory_;
  };

  template <Where where = Where::kAll>
  static void run(Index m, Index n, Index k, const Left& left, const Right& right, T* out, Index out_row,
                  const Addend<T>& add = {}) {
    for_tiles<T>(m, n, [&]<int R, int W>(Index i, Index j) {
      if (where == Where::kResultLower && j > i + R - 1) return;
      const Index first = where == Where::kUpper ? i : 0, end = where == Where::kLower ? std::min(k, i + R) : k;
      Tile<T, R, W> tile;
      if (add.at == nullptr)
        tile.clear();
      else
        tile.take(add.at + i * add.row + j, add.row, add.factor);
      tile.multiply(end - first, left.at + i * left.row + first * left.k, left.row, left.k, right.at + first * right.k + j,
                    right.k);
      tile.put(out + i * out_row + j, out_row);
    });
  }
};

// No registers to set up.
struct NoSession {};

// The products of a kernel: `Rounded` may round its operands to bfloat16, the others may not. In `ExactLeft` the right
// operand fits bfloat16 exactly, in `ExactRight` the left one. Every thread keeps a session alive meanwhile.
template <class T>
struct PlainProducts {
  static constexpr const char* kName = sizeof(T) == sizeof(float) ? "vectors of float32" : "vectors of float64";
  using Rounded = PlainProduct<T>;
  using ExactLeft = PlainProduct<T>;
  using ExactRight = PlainProduct<T>;
  using Session = NoSession;
};

#if defined(__AVX512BF16__)
constexpr Index kPairLanes = 32;  // bfloat16 in a vector, and terms that a tile sums at once

// Two vectors as bfloat16, one after the other; subnormal numbers become 0.
inline __m512i after(Vector<float> first, Vector<float> second) {
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
}

// Two vectors as bfloat16, interleaved.
inline __m512i beside(Vector<float> first, Vector<float> second) {
  alignas(64) static constexpr std::uint16_t kOrder[kPairLanes] = {
      0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), after(first, second));
}

// Calls f(part, a, b) for the parts of two vectors. The first 8 bits, the next 8 and the last 8 of a float are three
// numbers that bfloat16 holds, and their sum is the float.
template <int Parts, class F>
inline void for_parts(Vector<float> a, Vector<float> b, F&& f) {
  const auto upper = [](Vector<float> v) {
    return reinterpret_cast<Vector<float>>(reinterpret_cast<Bits>(v) & 0xffff0000u);
  };
  for (int part = 0; part + 1 < Parts; ++part) {
    const Vector<float> a_part = upper(a), b_part = upper(b);
    f(part, a_part, b_part);
    a -= a_part;
    b -= b_part;
  }
  f(Parts - 1, a, b);
}

// Blocks of 16 vectors transposed as numbers of 32 bits: (rows, pairs along them) to (pairs, rows).
inline void transpose_pairs(__m512i* v) { transpose_square<float>(reinterpret_cast<Vector<float>*>(v)); }

// (m, k) by rows, filled up with 0 to a multiple of 32 columns.
template <int Parts>
class PackedLeft {
 public:
  Index row = 0;  // elements from one to the next
  PackedLeft(Scratch& scratch, Index m, Index k)
      : size_(round_up(m, 16) * round_up(k, kPairLanes)), memory_(scratch.take<Bfloat16>(Parts * size_)) {}

  const Bfloat16* part(int number) const { return memory_ + number * size_; }

  void rows(Index m, Index k, const float* from, Index from_row) {
    row = round_up(k, kPairLanes);
    for (Index i = 0; i < m; ++i)
      for (Index c = 0; c < k; c += kPairLanes) {
        const float* at = from + i * from_row + c;
        for_parts<Parts>(load(at), c + 16 < k ? load(at + 16) : Vector<float>{},
                         [&](int part, Vector<float> a, Vector<float> b) { put(part, i, c, after(a, b)); });
      }
  }

  void columns(Index m, Index k, const float* from, Index from_row) {
    row = round_up(k, kPairLanes);
    for (Index c = 0; c < k; c += kPairLanes)
      for (Index i = 0; i < m; i += 16) {
        __m512i pairs[Parts][16];
        for (Index n = 0; n < 16; ++n) {
          const float* at = from + (c + 2 * n) * from_row + i;
          for_parts<Parts>(c + 2 * n < k ? load(at) : Vector<float>{},
                           c + 2 * n + 1 < k ? load(at + from_row) : Vector<float>{},
                           [&](int part, Vector<float> a, Vector<float> b) { pairs[part][n] = beside(a, b); });
        }
        for (int part = 0; part < Parts; ++part) {
          transpose_pairs(pairs[part]);
          for (Index n = 0; n < 16; ++n) put(part, i + n, c, pairs[part][n]);
        }
      }
  }

 private:
  Index size_;
  Bfloat16* memory_;
  void put(int part, Index i, Index k, __m512i v) { _mm512_storeu_si512(memory_ + part * size_ + i * row + k, v); }
};

// (k, n) by pairs of rows, filled up with 0 to a multiple of 32 rows.
template <int Parts>
class PackedRight {
 public:
  Index pair = 0;  // elements from a pair of rows to the next
  PackedRight(Scratch& scratch, Index k, Index n)
      : size_(round_up(k, kPairLanes) * round_up(n, 16)), memory_(scratch.take<Bfloat16>(Parts * size_)) {}

  const Bfloat16* part(int number) const { return memory_ + number * size_; }

  void rows(Index k, Index n, const float* from, Index from_row) {
    pair = 2 * n;
    for (Index c = 0; c < round_up(k, kPairLanes); c += 2)
      for (Index j = 0; j < n; j += 16) {
        const float* at = from + c * from_row + j;
        for_parts<Parts>(c < k ? load(at) : Vector<float>{}, c + 1 < k ? load(at + from_row) : Vector<float>{},
                         [&](int part, Vector<float> a, Vector<float> b) { put(part, c, j, beside(a, b)); });
      }
  }

  void columns(Index k, Index n, const float* from, Index from_row) {
    pair = 2 * round_up(n, 16);
    for (Index j = 0; j < n; j += 16)
      for (Index c = 0; c < k; c += kPairLanes) {
        __m512i pairs[Parts][16];
        for (Index r = 0; r < 16; ++r) {
          const float* at = from + (j + r) * from_row + c;
          const Vector<float> first = j + r < n ? load(at) : Vector<float>{};
          for_parts<Parts>(first, j + r < n && c + 16 < k ? load(at + 16) : Vector<float>{},
                           [&](int part, Vector<float> a, Vector<float> b) { pairs[part][r] = after(a, b); });
        }
        for (int part = 0; part < Parts; ++part) {
          transpose_pairs(pairs[part]);
          for (Index r = 0; r < 16; ++r) put(part, c + 2 * r, j, pairs[part][r]);
        }
      }
  }

 private:
  Index size_;
  Bfloat16* memory_;
  void put(int part, Index k, Index j, __m512i v) {
    _mm512_storeu_si512(memory_ + part * size_ + k / 2 * pair + 2 * j, v);
  }
};

struct PairProduct {
  using Left = PackedLeft<1>;
  using Right = PackedRight<1>;

  template <Where where = Where::kAll>
  static void run(Index m, Index n, Index k, const Left& left, const Right& right, float* out, Index out_row,
                  const Addend<float>& add = {}) {
    for_tiles<float>(m, n, [&]<int R, int W>(Index i, Index j) {
      if (where == Where::kResultLower && j > i + R - 1) return;
      const Index first = where == Where::kUpper ? i / 2 : 0;
      const Index end = ((where == Where::kLower ? std::min(k, i + R) : k) + 1) / 2;
      Tile<float, R, W> tile;
      if (add.at == nullptr)
        tile.clear();
      else
        tile.take(add.at + i * add.row + j, add.row, add.factor);
      tile.multiply_pairs(end - first, left.part(0) + i * left.row + 2 * first, left.row, 2,
                          right.part(0) + first * right.pair + 2 * j, right.pair);
      tile.put(out + i * out_row + j, out_row);
    });
  }
};

// An operand that does not fit bfloat16 costs three products here, more than one product of floats.
struct PairProducts {
  static constexpr const char* kName = "pairs of bfloat16 in vectors (AVX512-BF16)";
  using Rounded = PairProduct;
  using ExactLeft = PlainProduct<float>;
  using ExactRight = PlainProduct<float>;
  using Session = NoSession;
};
#endif

#if defined(TAIPAN_TILES)
template <int LeftParts, int RightParts>
struct TileProduct {
  using Left = PackedLeft<LeftParts>;
  using Right = PackedRight<RightParts>;

  template <Where where = Where::kAll>
  static void run(Index m, Index n, Index k, const Left& left, const Right& right, float* out, Index out_row,
                  const Addend<float>& add = {}) {
    if (add.at != nullptr && (add.at != out || add.factor != 1))
      for (Index i = 0; i < m; ++i)
        for (Index j = 0; j < n; j += 16) store(out + i * out_row + j, add.factor * load(add.at + i * add.row + j));
    const Index terms = round_up(k, kPairLanes);
    for (Index i = 0; i < m; i += 32)
      for (Index j = 0; j < n; j += 32) {
        if (where == Where::kResultLower && j > i + 31) continue;
        const Index first = where == Where::kUpper ? i : 0, end = where == Where::kLower ? std::min(terms, i + 32) : terms;
        const auto block = [&]<int R, int W>() {
          TileBlock<R, W> sums;
          if (add.at == nullptr)
            sums.clear();
          else
            sums.load(out + i * out_row + j, out_row);
          for (int a = LeftParts - 1; a >= 0; --a)  // the smallest first
            for (int b = RightParts - 1; b >= 0; --b)
              sums.multiply((end - first) / kPairLanes, left.part(a) + i * left.row + first, left.row,
                            right.part(b) + first / 2 * right.pair + 2 * j, right.pair);
          sums.store(out + i * out_row + j, out_row);
        };
        const bool tall = m - i > 16, wide = n - j > 16;
        if (tall && wide)
          block.template operator()<2, 2>();
        else if (tall)
          block.template operator()<2, 1>();
        else if (wide)
          block.template operator()<1, 2>();
        else
          block.template operator()<1, 1>();
      }
  }
};

struct TileProducts {
  static constexpr const char* kName = "tiles of bfloat16 (AMX)";
  using Rounded = TileProduct<1, 1>;
  using ExactLeft = TileProduct<3, 1>;
  using ExactRight = TileProduct<1, 3>;
  using Session = TileSession;
};
#endif

// Calls f<Products>() with the fastest products here for tokens of type X in memory.
template <class T, class X, class F>
inline int with_products(F&& f) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<X, Bfloat16>) {
#if defined(TAIPAN_TILES)
    if (tiles_granted()) return f.template operator()<TileProducts>();
#endif
    return f.template operator()<PairProducts>();
  }
#endif
  return f.template operator()<PlainProducts<T>>();
}

}  // namespace taipan
