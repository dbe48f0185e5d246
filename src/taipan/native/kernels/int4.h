// Weights in 4 bits, 16 rows together, and their products with one vector or several.
//
// A tile is 16 rows, the last one of a matrix filled up. Of a group of 64 columns it has a scale (bfloat16) for each row
// and 8 blocks of 64 bytes, four bytes for each row. Byte i of a row in block b has column 8 b + i in its lower half and
// 8 b + 4 + i in its upper half: the number of a level. A weight is its level times the scale of its group.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "interface.h"
#include "narrow.h"

namespace taipan {

constexpr Index kTile = 16;
constexpr Index kGroup = 64;
constexpr Index kBlock = 64;              // bytes
constexpr Index kBlockColumns = 8;
constexpr Index kGroupBytes = kGroup / kBlockColumns * kBlock;

// Closer together where a normal distribution has more weights; those of llama.cpp's iq4_nl.
constexpr std::int8_t kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct Tiles {
  const std::uint8_t* weight;
  const Bfloat16* scale;
  Index columns, groups;

  explicit Tiles(const Matrix& m)
      : weight(static_cast<const std::uint8_t*>(m.weight)),
        scale(static_cast<const Bfloat16*>(m.scale)),
        columns(m.columns),
        groups((m.columns + kGroup - 1) / kGroup) {}

  const std::uint8_t* bytes(Index tile, Index group) const { return weight + (tile * groups + group) * kGroupBytes; }
  const Bfloat16* scales(Index tile, Index group) const { return scale + (tile * groups + group) * kTile; }
  Index columns_of(Index group) const { return std::min(kGroup, columns - group * kGroup); }

  // The level of a row in a group's column k.
  static std::int8_t level(const std::uint8_t* bytes, Index row, Index k) {
    const std::uint8_t both = bytes[k / kBlockColumns * kBlock + 4 * row + k % 4];
    return kLevels[k % kBlockColumns < 4 ? both & 15 : both >> 4];
  }
};

// The weights of a row.
template <class T>
void unpack_row(const Tiles& tiles, Index row, T* to) {
  for (Index g = 0; g < tiles.groups; ++g) {
    const std::uint8_t* bytes = tiles.bytes(row / kTile, g);
    const T scale = widen_one<T>(tiles.scales(row / kTile, g)[row % kTile]);
    for (Index k = 0; k < tiles.columns_of(g); ++k)
      to[g * kGroup + k] = static_cast<T>(Tiles::level(bytes, row % kTile, k)) * scale;
  }
}

// Times vectors of T, each weight widened when used.
template <class T>
struct PlainTiles : Tiles {
  const T* x;
  Index x_row;

  PlainTiles(const Matrix& m, const T* x, Index x_row) : Tiles(m), x(x), x_row(x_row) {}

  // A tile times C vectors.
  template <int C>
  void products(Index tile, Index column, T (&out)[C][kTile]) const {
    for (auto& of : out) std::fill(of, of + kTile, T(0));
    for (Index g = 0; g < groups; ++g) {
      const std::uint8_t* packed = bytes(tile, g);
      T total[C][kTile] = {};
      for (Index k = 0; k < columns_of(g); ++k) {
        T level[kTile];
        for (Index r = 0; r < kTile; ++r) level[r] = static_cast<T>(Tiles::level(packed, r, k));
        for (int c = 0; c < C; ++c) {
          const T value = x[(column + c) * x_row + g * kGroup + k];
          for (Index r = 0; r < kTile; ++r) total[c][r] += level[r] * value;
        }
      }
      for (int c = 0; c < C; ++c)
        for (Index r = 0; r < kTile; ++r) out[c][r] += widen_one<T>(scales(tile, g)[r]) * total[c][r];
    }
  }
};

#if defined(__AVX2__)
inline std::int32_t word_at(const char* from) {
  std::int32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// Sums of products in 16 lanes, of which each has a row.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
struct Lanes {
  static constexpr const char* kName = "AVX512-VNNI";
  using Integers = __m512i;
  // Levels are counted from -128 on, as the instruction wants one side without a sign.
  static constexpr int kBelow = 128;

  struct Table {
    __m512i levels;
    Table() {
      alignas(16) std::uint8_t each[16];
      for (int n = 0; n < 16; ++n) each[n] = static_cast<std::uint8_t>(kLevels[n] + kBelow);
      levels = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(each)));
    }
  };

  // A block's numbers of a vector: as the instruction takes 8 bits, x = 128 h + l; of its 8 columns h, then l.
  static void keep(__m256i x, char* to) {
    const __m256i high = _mm256_srai_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(64)), 7);
    const __m256i words = _mm256_packs_epi32(high, _mm256_sub_epi32(x, _mm256_slli_epi32(high, 7)));
    const __m256i bytes = _mm256_packs_epi16(words, words);  // four of each in either half
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
  }

  // Of a group with one vector: two sums of each part, which do not wait for each other.
  struct Products {
    Integers high[2], low[2];

    explicit Products(std::int32_t from)
        : high{_mm512_setzero_si512(), _mm512_setzero_si512()}, low{_mm512_set1_epi32(from), _mm512_setzero_si512()} {}

    Integers total() const {
      const __m512i of_high = _mm512_add_epi32(high[0], high[1]);
      return _mm512_add_epi32(_mm512_slli_epi32(of_high, 7), _mm512_add_epi32(low[0], low[1]));
    }
  };

  // A block with C vectors, the numbers of the next one `x_row` bytes further on.
  template <int C>
  static void add(const Table& table, const std::uint8_t* block, const char* x, Index x_row,
                  std::array<Products, C>& products) {
    const __m512i both = _mm512_loadu_si512(block), mask = _mm512_set1_epi8(15);
    const __m512i lower = _mm512_shuffle_epi8(table.levels, _mm512_and_si512(both, mask));
    const __m512i upper = _mm512_shuffle_epi8(table.levels, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
    for (int c = 0; c < C; ++c) {
      const auto four = [&](int n) { return _mm512_set1_epi32(word_at(x + c * x_row + 4 * n)); };
      products[c].high[0] = _mm512_dpbusd_epi32(products[c].high[0], lower, four(0));
      products[c].low[0] = _mm512_dpbusd_epi32(products[c].low[0], lower, four(2));
      products[c].high[1] = _mm512_dpbusd_epi32(products[c].high[1], upper, four(1));
      products[c].low[1] = _mm512_dpbusd_epi32(products[c].low[1], upper, four(3));
    }
  }

  struct Sums {
    __m512 of = _mm512_setzero_ps();
    void add(Integers sums, const Bfloat16* scale) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale)));
      of = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)), of);
    }
    void store(float unit, float* to) const { _mm512_storeu_ps(to, _mm512_mul_ps(of, _mm512_set1_ps(unit))); }
  };
};
#else
struct Lanes {
  static constexpr const char* kName = "AVX2";
  struct Integers {
    __m256i of[2];
  };
  // Levels are counted from the lowest on, so that the first is 0: the shuffle leaves the upper half of 16 bits empty.
  static constexpr int kBelow = 127;

  struct Table {
    __m256i levels;
    Table() {
      alignas(16) std::uint8_t each[16];
      for (int n = 0; n < 16; ++n) each[n] = static_cast<std::uint8_t>(kLevels[n] + kBelow);
      levels = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(each)));
    }
  };

  // A block's numbers of a vector: 16 bits of columns 0, 2, 4, 6, 1, 3, 5, 7, as shifts bring the levels.
  static void keep(__m256i x, char* to) {
    const __m256i words = _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }

  // Of a group with one vector.
  struct Products {
    Integers sums;

    explicit Products(std::int32_t from) : sums{_mm256_set1_epi32(from), _mm256_set1_epi32(from)} {}

    Integers total() const { return sums; }
  };

  // A block with C vectors, the numbers of the next one `x_row` bytes further on. Two products of 16 bits fit 32.
  template <int C>
  static void add(const Table& table, const std::uint8_t* block, const char* x, Index x_row,
                  std::array<Products, C>& products) {
    const __m256i mask = _mm256_set1_epi16(15);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      __m256i levels[2];
      for (int n = 0; n < 2; ++n) {  // read again for each pair: kept, the words would drive a sum out of its register
        const __m256i words = held(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 32 * n)));
        levels[n] = _mm256_shuffle_epi8(table.levels, _mm256_and_si256(_mm256_srli_epi16(words, 4 * pair), mask));
      }
      for (int c = 0; c < C; ++c) {
        const __m256i both = _mm256_set1_epi32(word_at(x + c * x_row + 4 * pair));
        for (int n = 0; n < 2; ++n)
          // held, or GCC has all products of a block first, which no registers hold
          products[c].sums.of[n] = held(_mm256_add_epi32(products[c].sums.of[n], _mm256_madd_epi16(levels[n], both)));
      }
    }
  }

  struct Sums {
    __m256 of[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    void add(Integers sums, const Bfloat16* scale) {
      for (int n = 0; n < 2; ++n) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale + 8 * n)));
        const __m256 factor = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#if defined(__FMA__)
        of[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.of[n]), factor, of[n]);
#else
        of[n] = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums.of[n]), factor), of[n]);
#endif
      }
    }
    void store(float unit, float* to) const {
      for (int n = 0; n < 2; ++n) _mm256_storeu_ps(to + 8 * n, _mm256_mul_ps(of[n], _mm256_set1_ps(unit)));
    }
  };
};
#endif

// Times vectors rounded to 15 bits (1 / 32512 of their largest value). Sums within a group are exact integers. What the
// levels count too much is taken off beforehand: `less`.
struct ShortTiles : Tiles {
  const char* numbers;       // of each vector, 16 bytes for a block
  const std::int32_t* less;  // of each group of it
  const float* unit;
  Index x_row;  // bytes of a vector's numbers
  static constexpr Index kNumbers = 16;  // bytes
  // Bytes ahead. Past the outer caches: weights do not fit there, but states may, if nothing else drives them out.
  static constexpr Index kFetched = 4096;

  ShortTiles(const Matrix& m, const float* from, Index from_row, Index count, float* room)
      : Tiles(m), x_row(groups * kGroup / kBlockColumns * kNumbers) {
    float* units = room;
    auto* to = reinterpret_cast<char*>(room + round_up(count, 16));
    auto* off = reinterpret_cast<std::int32_t*>(to + x_row * count);
    for (Index c = 0; c < count; ++c) units[c] = round(from + c * from_row, to + c * x_row, off + c * groups);
    numbers = to;
    less = off;
    unit = units;
  }

  // Returns the unit.
  float round(const float* x, char* to, std::int32_t* off) const {
    Vector<float> most{};
    for (Index k = 0; k < columns; k += kLanes<float>) {
      const Vector<float> value = load_part(x + k, columns - k), size = value < Vector<float>{} ? -value : value;
      most = size > most ? size : most;
    }
    float largest = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) largest = std::max(largest, most[lane]);
    const float size = largest > 0 ? largest / 16256 : 1, per_unit = 1 / size;
    for (Index g = 0; g < groups; ++g) {
      std::int32_t sum = 0;
      for (Index k = g * kGroup; k < (g + 1) * kGroup; k += 8) {
        const __m256 value = _mm256_mul_ps(eight(x + k, columns - k), _mm256_set1_ps(per_unit));
        const __m256i whole = _mm256_cvtps_epi32(value);
        Lanes::keep(whole, to + k / kBlockColumns * kNumbers);
        sum += sum_of(whole);
      }
      off[g] = -Lanes::kBelow * sum;
    }
    return size;
  }

  static Vector<float> load_part(const float* x, Index there) {
    if (there >= kLanes<float>) return load(x);
    Vector<float> v{};
    std::memcpy(&v, x, there * sizeof(float));
    return v;
  }

  static __m256 eight(const float* x, Index there) {
    if (there >= 8) return _mm256_loadu_ps(x);
    __m256 v = _mm256_setzero_ps();
    if (there > 0) std::memcpy(&v, x, there * sizeof(float));
    return v;
  }

  static std::int32_t sum_of(__m256i v) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
  }

  template <int C>
  void products(Index tile, Index column, float (&out)[C][kTile]) const {
    const Lanes::Table table;
    const char* x = numbers + column * x_row;
    const std::int32_t* off = less + column * groups;
    Lanes::Sums sums[C];
    for (Index g = 0; g < groups; ++g) {
      const std::uint8_t* packed = bytes(tile, g);
      const Bfloat16* scale = scales(tile, g);
      __builtin_prefetch(scale + kFetched / kGroupBytes * kTile, 0, 0);
      auto products = [&]<int... c>(std::integer_sequence<int, c...>) {
        return std::array{Lanes::Products(off[c * groups + g])...};
      }(std::make_integer_sequence<int, C>());
      for (Index b = 0; b < kGroup / kBlockColumns; ++b, x += kNumbers) {
        __builtin_prefetch(packed + b * kBlock + kFetched, 0, 0);
        Lanes::add<C>(table, packed + b * kBlock, x, x_row, products);
      }
      for (int c = 0; c < C; ++c) sums[c].add(products[c].total(), scale);
    }
    for (int c = 0; c < C; ++c) sums[c].store(unit[column + c], out[c]);
  }
};
#endif

// What multiplies them, for vectors of float.
#if defined(__AVX2__)
constexpr const char* kInt4Products = Lanes::kName;
#else
constexpr const char* kInt4Products = "one by one";
#endif

}  // namespace taipan
