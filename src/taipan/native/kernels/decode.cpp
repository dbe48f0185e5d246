// One token of every row through the whole decoder, in one call: the memory of weights and states is read once, and
// states are written in place.
//
// Threads share every product by its rows and wait for each other between stages; what is short (norms, gates) each of
// them computes for itself. Everything is summed in Real, whatever the weights are stored in.
#include <algorithm>
#include <optional>

#include "narrow.h"
#include "team.h"

namespace taipan {
namespace {

enum Format : Index { kReal = 0, kBfloat16 = 1, kInt8 = 2 };

// (rows, columns), one row after the other; scale per row for int8.
struct Matrix {
  const void* weight;
  const float* scale;
  Index rows, columns;
};

struct Sizes {
  Index layers, hidden, vocabulary, intermediate;
  Index inner, conv, taps, heads, head_dim, groups, state;  // of Mamba-2
  Index query_heads, key_heads, width;                       // of attention
  Index gate_hidden;                                         // 0: a linear gate
  Index format, embedding_format;                            // of the matrices and of the embedding
  Index rounds;  // the model is in bfloat16: what a state keeps is rounded to it, what a product takes may be
};

struct Constants {
  double eps, dt_low, dt_high;
};

enum Kind : Index { kMamba2 = 0, kAttention = 1, kSelective = 2, kClosed = 3 };

template <class T>
struct Layer {
  Index kind;
  const T* norm;
  Matrix first, keys, values, last;  // in_proj, -, -, out_proj; or q_proj, k_proj, v_proj, o_proj
  const T *conv_weight, *conv_bias;  // (K, C), (C)
  const T *dt_bias, *A, *D;          // (H); A is negative
  const T* gated_norm;
  const T* frequency;  // (E / 2) of the rotary embedding, or null
  Index window;        // 0: none
  const T *gate_weight, *gate_bias, *gate_hidden_weight, *gate_hidden_bias;
  const T* threshold;
  Index gate_reads_raw, keys_of_all, counts_selected, adds;
  const T* mlp_norm;  // null: no MLP
  Matrix gate, up, down;
};

// Of a Mamba-2 layer: columns (B, K - 1, C) and recurrent state (B, H, P, N). Of an attention layer: keys and values
// (B, G, W, E), window coordinate (B, W) and number of entries so far (B).
template <class T>
struct State {
  T *first, *second;
  std::int64_t *index, *count;
  Index slots;
};

// ------------------------------------------------------------------ vectors

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

// ------------------------------------------------------------------ products

constexpr int kMany = 4;      // vectors at once
constexpr Index kPanel = 16;  // rows that meet all of many vectors before the next ones are read
// Rows at once: as many sums as leave room in 32 registers, or in 16.
constexpr int kRows = kBytes == 64 ? 4 : 2;
constexpr int kChains = 4;  // sums of one row that do not wait for each other

// v in a register: the compiler would read it from memory again for every use, which takes longer than the use.
template <class V>
inline V held(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// Rows that are fetched while some rows meet several vectors: of the same ones a panel further on those from `first` on,
// so that the memory is as busy with the last vectors as with the first. One row after the other needs no such thing.
struct Ahead {
  Index first = 0, rows = 0;

  template <class W>
  void fetch(const W* w, Index columns, Index k) const {
    if (k * sizeof(W) % 64 != 0) return;
    for (Index row = first; row < first + rows; ++row) __builtin_prefetch(w + (kPanel + row) * columns + k, 0, 2);
  }
};

// out(r, c) = Σ_k w(r, k) x(c, k)
template <class T, class W, int R, int C>
inline void dots(Index count, const W* w, const T* x, Index x_row, T (&out)[R][C], const Ahead& ahead = {}) {
  Vector<T> total[R][C];
  for (auto& row : total)
    for (auto& one : row) one = Vector<T>{};
  Index k = 0;
  for (; k + kLanes<T> <= count; k += kLanes<T>) {
    ahead.fetch(w, count, k);
    Vector<T> left[R];
    for (int r = 0; r < R; ++r) left[r] = widen<T>(w + r * count + k);
    for (int c = 0; c < C; ++c) {
      const Vector<T> right = held(load(x + c * x_row + k));
      for (int r = 0; r < R; ++r) total[r][c] += left[r] * right;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = sum<T>(total[r][c]);
  for (; k < count; ++k)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) out[r][c] += widen_one<T>(w[r * count + k]) * x[c * x_row + k];
}

// Where a product goes: out(c, row), or added to it.
template <class T>
struct Target {
  T* out;
  Index out_row;
  bool add;

  template <int R, int C>
  void put(const Matrix& m, Index row, Index column, const T (&value)[R][C]) const {
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) {
        T* place = out + (column + c) * out_row + row + r;
        const T scaled = m.scale == nullptr ? value[r][c] : value[r][c] * m.scale[row + r];
        *place = add ? *place + scaled : scaled;
      }
  }
};

// How rows of W meet vectors of T: any length, each weight widened where it is used.
template <class T, class W>
struct Plain {
  const W* weight;
  Index columns;
  const T* x;
  Index x_row;

  // The product of a row with the first vector.
  T one(Index row) const {
    const W* w = weight + row * columns;
    Vector<T> total[kChains] = {};
    Index k = 0;
    for (; k + kChains * kLanes<T> <= columns; k += kChains * kLanes<T>)
      for (int n = 0; n < kChains; ++n) total[n] += widen<T>(w + k + n * kLanes<T>) * load(x + k + n * kLanes<T>);
    for (; k + kLanes<T> <= columns; k += kLanes<T>) total[0] += widen<T>(w + k) * load(x + k);
    T all = sum<T>((total[0] + total[1]) + (total[2] + total[3]));
    for (; k < columns; ++k) all += widen_one<T>(w[k]) * x[k];
    return all;
  }

  template <int R, int C>
  void dots(Index row, Index column, T (&out)[R][C], const Ahead& ahead) const {
    taipan::dots(columns, weight + row * columns, x + column * x_row, x_row, out, ahead);
  }
};

// Rows of bfloat16 meet vectors that lie in pairs: of a word of two weights, the upper is a float when the lower is
// masked out, and the lower when it is shifted up.
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
    const std::uint16_t* w = weight + row * columns;
    Vector<float> even[2] = {}, odd[2] = {};
    Index k = 0;
    for (; k + 2 * kBoth <= columns; k += 2 * kBoth)
      for (int n = 0; n < 2; ++n) add(w + k + n * kBoth, x + k + n * kBoth, even[n], odd[n]);
    if (k < columns) add(w + k, x + k, even[0], odd[0]);
    return sum<float>((even[0] + odd[0]) + (even[1] + odd[1]));
  }

  static void add(const std::uint16_t* w, const float* x, Vector<float>& even, Vector<float>& odd) {
    Words words;
    std::memcpy(&words, w, sizeof words);
    even += reinterpret_cast<Vector<float>>(words << 16) * load(x);
    odd += reinterpret_cast<Vector<float>>(words & 0xffff0000u) * load(x + kLanes<float>);
  }

  template <int R, int C>
  void dots(Index row, Index column, float (&out)[R][C], const Ahead& ahead) const {
    const std::uint16_t* w = weight + row * columns;
    const float* of = x + column * columns;
    Vector<float> total[R][C];
    for (auto& row : total)
      for (auto& one : row) one = Vector<float>{};
    for (Index k = 0; k < columns; k += kBoth) {
      ahead.fetch(w, columns, k);
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
        for (int r = 0; r < R; ++r) total[r][c] += even[r] * first;
        for (int r = 0; r < R; ++r) total[r][c] += odd[r] * second;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) out[r][c] = sum<float>(total[r][c]);
  }
};

// Rows of weights W meet vectors X, so many columns at once as a step of a Kind takes: it knows how a step is read, added
// and summed, and the unit of a vector.
template <class Kind, class W, class X>
struct Stepped {
  const W* weight;
  Index columns;
  X* x;

  float one(Index row) const {
    const W* w = weight + row * columns;
    typename Kind::Sums total[kChains] = {};
    Index k = 0;
    for (; k + kChains * Kind::kStep <= columns; k += kChains * Kind::kStep)
      for (int n = 0; n < kChains; ++n) step(total[n], w, x, k + n * Kind::kStep);
    for (; k < columns; k += Kind::kStep) step(total[0], w, x, k);
    float all = 0;
    for (int n = 0; n < kChains; ++n) all += Kind::sum_of(total[n]);
    return kind().unit_of(0) * all;
  }

  template <int R, int C>
  void dots(Index row, Index column, float (&out)[R][C], const Ahead& ahead) const {
    const W* w = weight + row * columns;
    const X* of = x + column * columns;
    typename Kind::Sums total[R][C];
    for (auto& sums : total)
      for (auto& one : sums) one = typename Kind::Sums{};
    for (Index k = 0; k < columns; k += Kind::kStep) {
      ahead.fetch(w, columns, k);
      typename Kind::Operand left[R];
      for (int r = 0; r < R; ++r) left[r] = held(Kind::read(w + r * columns + k));
      for (int c = 0; c < C; ++c) {
        const auto right = held(Kind::read(of + c * columns + k));
        for (int r = 0; r < R; ++r) total[r][c] = Kind::add(total[r][c], left[r], right);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) out[r][c] = kind().unit_of(column + c) * Kind::sum_of(total[r][c]);
  }

 private:
  const Kind& kind() const { return static_cast<const Kind&>(*this); }

  template <class Sums>  // a Kind's: it is not whole yet
  static void step(Sums& total, const W* w, const X* x, Index k) {
    total = Kind::add(total, Kind::read(w + k), Kind::read(x + k));
  }
};

#if defined(__AVX512BF16__)
// Rows of bfloat16 meet vectors of a model in bfloat16, which its own forward rounds to that before every product, too:
// with several vectors half the instructions count; with one only memory does, and it is not rounded.
struct Rounded : Stepped<Rounded, Bfloat16, Bfloat16> {
  using Sums = __m512;
  using Operand = __m512bh;
  static constexpr Index kStep = 2 * kLanes<float>;

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
  static float sum_of(Sums total) { return sum<float>(reinterpret_cast<Vector<float>>(total)); }
  float unit_of(Index) const { return 1; }
};
#endif

#if defined(__AVX2__)
// Rows of int8 meet vectors that are rounded to 16 bits, which is 1 / 65534 of their largest value: exact sums at half
// the instructions, where widening to float takes longer than memory does.
struct Short : Stepped<Short, std::int8_t, std::int16_t> {
#if defined(__AVX512BW__)
  using Integers = __m512i;
#else
  using Integers = __m256i;
#endif
  using Sums = Integers;
  using Operand = Integers;
  static constexpr Index kStep = sizeof(Integers) / 2;
  static constexpr Index kMost = 4096;  // columns whose sum fits 32 bits
  float* unit;  // of each vector

  static bool fits(Index columns) { return columns % kStep == 0 && columns <= kMost; }

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

  // As float before lanes meet: their sum does not fit.
  static float sum_of(Integers total) {
    return sum<float>(reinterpret_cast<Vector<float>>(_mm512_cvtepi32_ps(total)));
  }
#else
  static Integers read(const std::int8_t* w) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }

  static Integers read(const std::int16_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

  static Integers add(Integers total, Integers left, Integers right) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(left, right));
  }

  static float sum_of(Integers total) {
    return sum<float>(reinterpret_cast<Vector<float>>(_mm256_cvtepi32_ps(total)));
  }
#endif

  float unit_of(Index vector) const { return unit[vector]; }
};
#endif

// Rows [row, end) of the product with C vectors.
template <int C, class T, class Rows>
inline void rows_with(const Rows& rows, const Matrix& m, Index row, Index end, Index column, const Target<T>& target,
                      const Ahead& ahead) {
  for (; row + kRows <= end; row += kRows) {
    T value[kRows][C];
    rows.dots(row, column, value, ahead);
    target.put(m, row, column, value);
  }
  for (; row < end; ++row) {
    T value[1][C];
    rows.dots(row, column, value, Ahead{});
    target.put(m, row, column, value);
  }
}

// Rows [row, end) of the product with `count` vectors. Of many, kMany stay in the first cache while they meet a panel of
// rows, which the next ones find in the second.
template <class T, class Rows>
void product_of(const Rows& rows, const Matrix& m, Index row, Index end, Index count, const Target<T>& target) {
  if (count == 1) {
    for (; row < end; ++row) {
      const T value[1][1] = {{rows.one(row)}};
      target.put(m, row, 0, value);
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

// Floats that the vectors of a product take once more, as its rows want them.
inline Index room_of(Index count, Index columns) { return count * columns + round_up(count, 16); }

// Calls f(rows) with the rows of a matrix that meet `count` vectors x(c, ·), which may be rounded to bfloat16 if `rounds`;
// `room` has what room_of says.
template <class T, class W, class F>
void with_rows(const Matrix& m, const T* x, Index x_row, Index count, [[maybe_unused]] bool rounds, T* room, F&& f) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<W, std::uint16_t> && std::is_same_v<T, float>)
    if (rounds && count > 1 && Rounded::fits(m.columns)) return f(Rounded(m.weight, m.columns, x, x_row, count, room));
#endif
  if constexpr (std::is_same_v<W, std::uint16_t> && std::is_same_v<T, float>)
    if (Pairs::fits(m.columns)) return f(Pairs(m.weight, m.columns, x, x_row, count, room));
#if defined(__AVX2__)
  if constexpr (std::is_same_v<W, std::int8_t> && std::is_same_v<T, float>)
    if (Short::fits(m.columns)) return f(Short(m.weight, m.columns, x, x_row, count, room));
#endif
  f(Plain<T, W>{static_cast<const W*>(m.weight), m.columns, x, x_row});
}

// ------------------------------------------------------------------ the decoder

template <class T>
class Decoder {
 public:
  Decoder(const Sizes& sizes, const Constants& constants, const Layer<T>* layers, const State<T>* states,
          const std::int64_t* rows, Index count, const std::int64_t* position)
      : s_(sizes), k_(constants), layers_(layers), states_(states), rows_(rows), count_(count), position_(position) {
    const Index query = s_.query_heads * s_.width, key = s_.key_heads * s_.width;
    longest_ = std::max({s_.hidden, s_.inner, s_.intermediate, query, s_.gate_hidden});
    in_ = 2 * s_.inner + 2 * s_.groups * s_.state + s_.heads;
    widest_ = std::max({s_.hidden, in_, 2 * s_.intermediate, query + 2 * key});
  }

  bool reserve(Scratch& scratch, Index threads) {
    const Index sizes[] = {count_ * s_.hidden, count_ * widest_, count_ * longest_, count_ * s_.heads};
    std::size_t bytes = Scratch::bytes<char>(Team::bytes(threads));
    for (const Index size : sizes) bytes += Scratch::bytes<T>(size);
    if (!scratch.reserve(bytes)) return false;
    h_ = scratch.take<T>(sizes[0]);
    wide_ = scratch.take<T>(sizes[1]);
    y_ = scratch.take<T>(sizes[2]);
    squares_ = scratch.take<T>(sizes[3]);
    team_.emplace(threads, scratch.take<char>(Team::bytes(threads)));
    return true;
  }

  void embed(const void* embedding, const std::int64_t* tokens) {
    for (Index i = 0; i < count_; ++i) {
      const Index at = tokens[rows_[i]] * s_.hidden;
      T* h = h_ + i * s_.hidden;
      if (s_.embedding_format == kBfloat16)
        widen_row(s_.hidden, static_cast<const std::uint16_t*>(embedding) + at, h);
      else
        widen_row(s_.hidden, static_cast<const T*>(embedding) + at, h);
    }
  }

  // What one thread needs for itself.
  struct Own {
    T *x, *chosen, *room, *weight, *attended;
    Index* asked;
    Team::Member me;
  };

  bool reserve(Scratch& scratch, Part part, Own& own) const {
    const Index shared = s_.key_heads == 0 ? 0 : s_.query_heads / s_.key_heads;
    const Index sizes[] = {count_ * longest_, count_ * s_.hidden, room_of(count_, longest_), count_,
                           shared * (2 * s_.width + 2 + kBlock)};
    std::size_t bytes = Scratch::bytes<Index>(count_);
    for (const Index size : sizes) bytes += Scratch::bytes<T>(size);
    if (!scratch.reserve(bytes)) return false;
    own.x = scratch.take<T>(sizes[0]);
    own.chosen = scratch.take<T>(sizes[1]);
    own.room = scratch.take<T>(sizes[2]);
    own.weight = scratch.take<T>(sizes[3]);
    own.attended = scratch.take<T>(sizes[4]);
    own.asked = scratch.take<Index>(count_);
    own.me.part = part;
    return true;
  }

  void meet(Own& own) { team_->wait(own.me); }

  // All layers, and the logits (count, V).
  void run(const T* norm, const Matrix& head, T* logits, Own& own) {
    for (Index n = 0; n < s_.layers; ++n) {
      const Layer<T>& layer = layers_[n];
      if (layer.kind == kMamba2)
        mamba2(layer, states_[n], own);
      else if (layer.kind != kClosed)
        attention(layer, states_[n], own);
      if (layer.mlp_norm != nullptr) mlp(layer, own);
    }
    normalise(norm, own.x);
    product(head, own.x, s_.hidden, count_, own, {logits, s_.vocabulary, false});
  }

 private:
  static constexpr Index kBlock = 64;  // keys at once
  static constexpr Index kPiece = 32768;  // bytes of a matrix

  // Rows of a matrix by `count` vectors, shared among the threads; then f(begin, end) with what each has done.
  template <class F>
  void product(const Matrix& m, const T* x, Index x_row, Index count, Own& own, const Target<T>& target, F&& f) {
    if (count == 0) return;  // no gate is open, for all threads alike
    const auto share = [&](const auto& rows) {
      team_->share(own.me, m.rows, grain_of(m, own), [&](Index begin, Index end) {
        product_of(rows, m, begin, end, count, target);
        f(begin, end);
      });
    };
    with_format(m, x, x_row, count, own.room, share);
  }

  void product(const Matrix& m, const T* x, Index x_row, Index count, Own& own, const Target<T>& target) {
    product(m, x, x_row, count, own, target, [](Index, Index) {});
  }

  template <class F>
  void with_format(const Matrix& m, const T* x, Index x_row, Index count, T* room, F&& f) const {
    if (s_.format == kReal)
      with_rows<T, T>(m, x, x_row, count, s_.rounds, room, f);
    else if (s_.format == kBfloat16)
      with_rows<T, std::uint16_t>(m, x, x_row, count, s_.rounds, room, f);
    else
      with_rows<T, std::int8_t>(m, x, x_row, count, s_.rounds, room, f);
  }

  // Rows that a thread takes at once: long enough in memory to be read as one, short enough to be shared evenly.
  Index grain_of(const Matrix& m, const Own& own) const {
    const Index size = s_.format == kReal ? sizeof(T) : s_.format == kBfloat16 ? 2 : 1;
    const Index rows = std::min(kPiece / std::max<Index>(1, m.columns * size), m.rows / (4 * own.me.part.count));
    return std::max<Index>(rows / kPanel, 1) * kPanel;
  }

  void normalise(const T* weight, T* x) const {
    for (Index i = 0; i < count_; ++i) {
      const T* h = h_ + i * s_.hidden;
      Vector<T> squares{};
      for (Index c = 0; c < s_.hidden; c += kLanes<T>) {
        const Vector<T> value = load_some(h + c, s_.hidden - c);
        squares += value * value;
      }
      const T scale = scale_of(sum<T>(squares), s_.hidden);
      for (Index c = 0; c < s_.hidden; c += kLanes<T>) {
        const Index n = s_.hidden - c;
        store_some(x + i * s_.hidden + c, scale * load_some(h + c, n) * load_some(weight + c, n), n);
      }
    }
  }

  T scale_of(T squares, Index n) const {
    return static_cast<T>(1.0 / std::sqrt(static_cast<double>(squares) / n + k_.eps));
  }

  // ---------------------------------------------------------------- Mamba-2

  void mamba2(const Layer<T>& layer, const State<T>& state, Own& own) {
    normalise(layer.norm, own.x);
    const auto share = [&](const auto& rows) {
      team_->share(own.me, in_, grain_of(layer.first, own), [&](Index begin, Index end) {
        const Index from = std::max(begin - s_.inner, Index(0)), to = std::min(end - s_.inner, s_.conv);
        if (from < to) fetch_columns(layer, state, from, to);
        product_of(rows, layer.first, begin, end, count_, Target<T>{wide_, in_, false});
        if (from < to) convolve(layer, state, from, to);
      });
    };
    with_format(layer.first, own.x, s_.hidden, count_, own.room, share);
    team_->wait(own.me);
    team_->share(own.me, count_ * s_.heads, 1, [&](Index begin, Index end) {
      for (Index task = begin; task < end; ++task) recur(layer, state, task / s_.heads, task % s_.heads);
    });
    team_->wait(own.me);
    const Index size = s_.inner / s_.groups, heads = s_.heads / s_.groups;
    for (Index i = 0; i < count_; ++i)
      for (Index g = 0; g < s_.groups; ++g) {
        T squares = 0;
        for (Index head = g * heads; head < (g + 1) * heads; ++head) squares += squares_[i * s_.heads + head];
        const T scale = scale_of(squares, size);
        for (Index c = g * size; c < (g + 1) * size; c += kLanes<T>) {
          const Index n = (g + 1) * size - c, at = i * s_.inner + c;
          store_some(own.x + at, scale * load_some(y_ + at, n) * load_some(layer.gated_norm + c, n), n);
        }
      }
    product(layer.last, own.x, s_.inner, count_, own, {h_, s_.hidden, true});
    team_->wait(own.me);
  }

  // So few at once, and so far apart, that no one else does.
  void fetch_columns(const Layer<T>& layer, const State<T>& state, Index begin, Index end) const {
    for (Index c = begin; c < end; c += 64 / sizeof(T)) {
      __builtin_prefetch(layer.conv_bias + c);
      for (Index k = 0; k < s_.taps; ++k) __builtin_prefetch(layer.conv_weight + k * s_.conv + c);
      for (Index i = 0; i < count_; ++i)
        for (Index k = 0; k < s_.taps - 1; ++k)
          __builtin_prefetch(state.first + (rows_[i] * (s_.taps - 1) + k) * s_.conv + c, 1);
    }
  }

  // Convolution with SiLU in place of channels [begin, end), and their columns moved on.
  void convolve(const Layer<T>& layer, const State<T>& state, Index begin, Index end) {
    const Index kept = s_.taps - 1;
    for (Index i = 0; i < count_; ++i) {
      T* columns = state.first + rows_[i] * kept * s_.conv;
      T* x = wide_ + i * in_ + s_.inner;
      for (Index c = begin; c < end; c += kLanes<T>) {
        const Index n = end - c;
        Vector<T> now = load_some(x + c, n);
        if (s_.rounds) now = to_bfloat16(now);
        Vector<T> total = load_some(layer.conv_bias + c, n) + now * load_some(layer.conv_weight + kept * s_.conv + c, n);
        for (Index k = 0; k < kept; ++k) {
          const Vector<T> before = load_some(columns + k * s_.conv + c, n);
          total += before * load_some(layer.conv_weight + k * s_.conv + c, n);
          if (k > 0) store_some(columns + (k - 1) * s_.conv + c, before, n);
        }
        if (kept > 0) store_some(columns + (kept - 1) * s_.conv + c, now, n);
        store_some(x + c, total * sigmoid(total), n);
      }
    }
  }

  // h = exp(dt A) h + dt B x and y = C h + D x of one head of one row; then u = y · silu(z) and its sum of squares.
  void recur(const Layer<T>& layer, const State<T>& state, Index i, Index head) {
    const Index P = s_.head_dim, N = s_.state, group = head / (s_.heads / s_.groups);
    const T* row = wide_ + i * in_;
    const T *z = row + head * P, *x = row + s_.inner + head * P;
    const T *B = row + 2 * s_.inner + group * N, *C = B + s_.groups * N;
    const T raw = row[s_.inner + s_.conv + head] + layer.dt_bias[head];
    T dt = raw > T(20) ? raw : std::log1p(std::exp(raw));
    dt = std::min(std::max(dt, static_cast<T>(k_.dt_low)), static_cast<T>(k_.dt_high));
    const T decay = std::exp(dt * layer.A[head]), skip = layer.D[head];
    T* h = state.second + (rows_[i] * s_.heads + head) * P * N;
    T* y = y_ + i * s_.inner + head * P;
    for (Index p = 0; p < P; ++p) y[p] = recur_row(N, decay, dt * x[p], B, C, h + p * N) + skip * x[p];
    Vector<T> squares{};
    for (Index p = 0; p < P; p += kLanes<T>) {
      const Vector<T> gate = load_some(z + p, P - p);
      const Vector<T> u = load_some(y + p, P - p) * gate * sigmoid(gate);
      squares += u * u;
      store_some(y + p, u, P - p);
    }
    squares_[i * s_.heads + head] = sum<T>(squares);
  }

  // One row after the other, as they lie in memory: with several at once the processor does not read ahead.
  static T recur_row(Index N, T decay, T input, const T* B, const T* C, T* h) {
    Vector<T> total{};
    for (Index n = 0; n < N; n += kLanes<T>) {
      const Vector<T> value = decay * load_some(h + n, N - n) + input * load_some(B + n, N - n);
      store_some(h + n, value, N - n);
      total += value * load_some(C + n, N - n);
    }
    return sum<T>(total);
  }

  // ---------------------------------------------------------------- attention

  void attention(const Layer<T>& layer, const State<T>& state, Own& own) {
    const Index E = s_.width, query = s_.query_heads * E, key = s_.key_heads * E;
    normalise(layer.norm, own.x);
    Index asked = count_;
    const T* x = own.x;
    if (layer.kind == kSelective) {
      asked = 0;
      for (Index i = 0; i < count_; ++i)
        if (opens(layer, i, own)) own.asked[asked++] = i;
      if (asked < count_) {
        for (Index j = 0; j < asked; ++j)
          std::memcpy(own.chosen + j * s_.hidden, own.x + own.asked[j] * s_.hidden, sizeof(T) * s_.hidden);
        x = own.chosen;
      }
    } else {
      for (Index i = 0; i < count_; ++i) own.asked[i] = i;
    }
    const bool all = asked == count_ || layer.keys_of_all;
    const Index keyed = all ? count_ : asked;
    if (keyed == 0) return;
    T *q = wide_, *k = q + count_ * query, *v = k + count_ * key;
    product(layer.first, x, s_.hidden, asked, own, {q, query, false});
    product(layer.keys, all ? own.x : x, s_.hidden, keyed, own, {k, key, false});
    product(layer.values, all ? own.x : x, s_.hidden, keyed, own, {v, key, false});
    team_->wait(own.me);
    team_->share(own.me, keyed * s_.key_heads, 1, [&](Index begin, Index end) {
      for (Index task = begin; task < end; ++task) {
        const Index j = task / s_.key_heads, g = task % s_.key_heads;
        const Index i = all ? j : own.asked[j];
        const Index at = std::lower_bound(own.asked, own.asked + asked, i) - own.asked;
        const bool asks = at < asked && own.asked[at] == i;
        remember(layer, state, i, g, k + j * key + g * E, v + j * key + g * E);
        if (asks) attend(layer, state, i, g, q + at * query, y_ + at * query, own.attended);
      }
    });
    team_->wait(own.me);
    if (own.me.part.number == 0)
      for (Index j = 0; j < keyed; ++j) {
        const Index i = all ? j : own.asked[j];
        std::int64_t& entries = state.count[rows_[i]];
        state.index[rows_[i] * state.slots + entries % state.slots] = coordinate(layer, state, i);
        ++entries;
      }
    if (asked == 0) return;
    if (layer.kind == kAttention) {
      product(layer.last, y_, query, asked, own, {h_, s_.hidden, true});
    } else {
      product(layer.last, y_, query, asked, own, {wide_, s_.hidden, false}, [&](Index begin, Index end) {
        for (Index j = 0; j < asked; ++j) {
          const Index i = own.asked[j];
          T* h = h_ + i * s_.hidden;
          for (Index c = begin; c < end; ++c)
            h[c] += own.weight[i] * (wide_[j * s_.hidden + c] - (layer.adds ? T(0) : h[c]));
        }
      });
    }
    team_->wait(own.me);
  }

  // The gate of row i (Eq. 1–3): whether it selects the token; its α goes to own.weight.
  bool opens(const Layer<T>& layer, Index i, const Own& own) const {
    const T* x = (layer.gate_reads_raw ? h_ : own.x) + i * s_.hidden;
    Index size = s_.hidden;
    if (s_.gate_hidden > 0) {
      for (Index r = 0; r < s_.gate_hidden; ++r) {
        const T value = dot(s_.hidden, layer.gate_hidden_weight + r * s_.hidden, x) + layer.gate_hidden_bias[r];
        own.room[r] = value * sigmoid_of(value);
      }
      x = own.room;
      size = s_.gate_hidden;
    }
    const T skip = dot(size, layer.gate_weight, x) + layer.gate_bias[0];
    const T attend = dot(size, layer.gate_weight + size, x) + layer.gate_bias[1];
    own.weight[i] = sigmoid_of(attend - skip);
    return attend - skip > *layer.threshold;
  }

  static T dot(Index count, const T* a, const T* b) {
    T out[1][1];
    dots(count, a, b, count, out);
    return out[0][0];
  }

  // Where the token of row i stands in the window.
  std::int64_t coordinate(const Layer<T>& layer, const State<T>& state, Index i) const {
    return layer.counts_selected ? state.count[rows_[i]] : position_[rows_[i]];
  }

  void rotate(const Layer<T>& layer, Index i, T* x) const {
    const Index half = s_.width / 2;
    for (Index e = 0; layer.frequency != nullptr && e < half; ++e) {
      const T angle = static_cast<T>(position_[rows_[i]]) * layer.frequency[e];
      const T cosine = std::cos(angle), sine = std::sin(angle), first = x[e], second = x[half + e];
      x[e] = first * cosine - second * sine;
      x[half + e] = second * cosine + first * sine;
    }
  }

  // Key and value of one head into the slot of the oldest.
  void remember(const Layer<T>& layer, const State<T>& state, Index i, Index g, T* key, const T* value) const {
    const Index b = rows_[i], slot = state.count[b] % state.slots;
    const Index at = ((b * s_.key_heads + g) * state.slots + slot) * s_.width;
    rotate(layer, i, key);
    for (Index e = 0; e < s_.width; ++e) {
      state.first[at + e] = s_.rounds ? to_bfloat16<T>(key[e]) : key[e];
      state.second[at + e] = s_.rounds ? to_bfloat16<T>(value[e]) : value[e];
    }
  }

  // Attention of the query heads that share key/value head g, keys taken in blocks: running maximum and sum.
  void attend(const Layer<T>& layer, const State<T>& state, Index i, Index g, T* query, T* out, T* room) const {
    const Index E = s_.width, heads = s_.query_heads / s_.key_heads, b = rows_[i];
    const std::int64_t here = coordinate(layer, state, i);
    const Index entries = std::min<Index>(state.count[b] + 1, state.slots), own = state.count[b] % state.slots;
    const T *keys = state.first + (b * s_.key_heads + g) * state.slots * E;
    const T *values = state.second + (b * s_.key_heads + g) * state.slots * E;
    const std::int64_t* index = state.index + b * state.slots;
    T *q = room, *mean = q + heads * E, *largest = mean + heads * E, *total = largest + heads, *score = total + heads;
    const T scale = T(1) / std::sqrt(static_cast<T>(E));
    for (Index r = 0; r < heads; ++r) {
      T* from = query + (g * heads + r) * E;
      rotate(layer, i, from);
      for (Index e = 0; e < E; ++e) q[r * E + e] = from[e] * scale;
      largest[r] = -INFINITY;
      total[r] = 0;
    }
    std::fill(mean, mean + heads * E, T(0));
    for (Index begin = 0; begin < entries; begin += kBlock) {
      const Index count = std::min(kBlock, entries - begin);
      bool seen[kBlock], any = false;
      for (Index j = 0; j < count; ++j) {
        const std::int64_t at = index[begin + j];
        seen[j] = begin + j == own || (at >= 0 && (layer.window == 0 || at > here - layer.window));
        any |= seen[j];
      }
      if (!any) continue;
      for (Index r = 0; r < heads; ++r) {
        T* of = score + r * kBlock;
        Index j = 0;
        for (; j + 4 <= count; j += 4) {
          T value[4][1];
          dots(E, keys + (begin + j) * E, q + r * E, E, value);
          for (int n = 0; n < 4; ++n) of[j + n] = value[n][0];
        }
        for (; j < count; ++j) of[j] = dot(E, keys + (begin + j) * E, q + r * E);
        T top = largest[r];
        for (j = 0; j < count; ++j)
          if (seen[j]) top = std::max(top, of[j]);
        const T kept = std::exp(largest[r] - top);
        T added = 0;
        for (j = 0; j < count; ++j) added += of[j] = seen[j] ? std::exp(of[j] - top) : T(0);
        largest[r] = top;
        total[r] = total[r] * kept + added;
        for (Index e = 0; e < E; e += kLanes<T>) {
          const Index n = E - e;
          Vector<T> mix = kept * load_some(mean + r * E + e, n);
          for (j = 0; j < count; ++j) mix += of[j] * load_some(values + (begin + j) * E + e, n);
          store_some(mean + r * E + e, mix, n);
        }
      }
    }
    for (Index r = 0; r < heads; ++r)
      for (Index e = 0; e < E; ++e) out[(g * heads + r) * E + e] = mean[r * E + e] / total[r];
  }

  // ---------------------------------------------------------------- SwiGLU

  void mlp(const Layer<T>& layer, Own& own) {
    const Index size = s_.intermediate;
    T *gate = wide_, *up = gate + count_ * size;
    normalise(layer.mlp_norm, own.x);
    const auto share = [&](const auto& rows) {
      auto others = rows;  // of the same vectors
      others.weight = static_cast<decltype(others.weight)>(layer.up.weight);
      team_->share(own.me, size, grain_of(layer.gate, own), [&](Index begin, Index end) {
        product_of(rows, layer.gate, begin, end, count_, Target<T>{gate, size, false});
        product_of(others, layer.up, begin, end, count_, Target<T>{up, size, false});
        for (Index i = 0; i < count_; ++i)
          for (Index c = begin; c < end; c += kLanes<T>) {
            const Index n = end - c, at = i * size + c;
            const Vector<T> value = load_some(gate + at, n);
            store_some(y_ + at, value * sigmoid(value) * load_some(up + at, n), n);
          }
      });
    };
    with_format(layer.gate, own.x, s_.hidden, count_, own.room, share);
    team_->wait(own.me);
    product(layer.down, y_, size, count_, own, {h_, s_.hidden, true});
    team_->wait(own.me);
  }

  const Sizes& s_;
  const Constants& k_;
  const Layer<T>* layers_;
  const State<T>* states_;
  const std::int64_t* rows_;
  Index count_;
  const std::int64_t* position_;
  Index longest_, in_, widest_;
  std::optional<Team> team_;
  T *h_ = nullptr, *wide_ = nullptr, *y_ = nullptr, *squares_ = nullptr;  // by all threads: residual stream, results
};

}  // namespace
}  // namespace taipan

using Real = TAIPAN_REAL;

// `rows` are the `count` of the batch that get a token; `tokens` and `position` are of the whole batch, `logits`
// (count, V) of those rows. The words of sizes, layers, states and head are the fields of the structures above in order.
extern "C" int taipan_decode(const std::ptrdiff_t* sizes, double eps, double dt_low, double dt_high,
                             const std::ptrdiff_t* layers, const std::ptrdiff_t* states, const std::ptrdiff_t* head,
                             const void* embedding, const Real* norm, const std::int64_t* rows, std::ptrdiff_t count,
                             const std::int64_t* tokens, std::int64_t* position, Real* logits, int threads) {
  using namespace taipan;
  static_assert(sizeof(void*) == sizeof(Index));
  Sizes s;
  Matrix last;
  std::memcpy(&s, sizes, sizeof s);
  std::memcpy(&last, head, sizeof last);
  const Constants constants{eps, dt_low, dt_high};
  Decoder<Real> decoder(s, constants, reinterpret_cast<const Layer<Real>*>(layers),
                        reinterpret_cast<const State<Real>*>(states), rows, count, position);
  static thread_local Scratch shared;
  if (!decoder.reserve(shared, threads)) return kNoMemory;
  decoder.embed(embedding, tokens);
  std::atomic<bool> enough = true;
#pragma omp parallel num_threads(threads) shared(enough)
  {
    Part part{0, 1};
#ifdef _OPENMP
    part = {omp_get_thread_num(), omp_get_num_threads()};
#endif
    Decoder<Real>::Own own;
    if (!decoder.reserve(thread_scratch(), part, own)) enough = false;
    decoder.meet(own);
    if (enough) decoder.run(norm, last, logits, own);
  }
  if (!enough) return kNoMemory;
  for (Index i = 0; i < count; ++i) ++position[rows[i]];
  return kOk;
}
