// State space duality (Dao & Gu 2024, section 6) by chunks, forward and backward.
//
// With s = cumsum(dt A) inside a chunk of Q tokens, x̃ = dt x, S the state at its entrance and S' at its end,
//
//   y  = e^s (C S) + ((C Bᵀ) ∘ L) x̃ + D x        L_ij = e^(s_i - s_j), j ≤ i
//   S' = e^(s_Q) S + Σ_j e^(s_Q - s_j) x̃_j B_jᵀ
//
// and every exponent is ≤ 0, so nothing overflows however fast a head forgets. C Bᵀ is made once for the heads of a
// group; all else is made chunk by chunk, a few heads one after the other, in memory that stays in the cache: no
// (heads, Q, Q) matrix exists. The backward computes the states again. Sums of exponents are kept in two parts, so that a slow token after
// a fast one (large sums, small difference) loses no digits.
#include <algorithm>

#include "gemm.h"

namespace taipan {
namespace {

// Sizes and strides in elements. N and P are multiples of the vector width; within a token, heads and groups lie one
// after the other.
struct Shape {
  Index batch, tokens, heads, head_dim, groups, state, chunk;
  Index x_b, x_t, dt_b, dt_t, B_b, B_t, C_b, C_t, narrow;
  Index chunks() const { return (tokens + chunk - 1) / chunk; }
  Index pitch() const { return round_up(chunk, kBytes / 4); }  // of a row of a (Q, Q) matrix
  Index scores(Index b, Index g, Index c) const { return ((b * groups + g) * chunks() + c) * chunk * pitch(); }
  Index rows(Index b, Index g, Index c) const { return ((b * groups + g) * tokens + c * chunk) * state; }
};

// X is what the tokens are in memory.
template <class T, class X>
struct Arrays {
  const X *x, *B, *C;
  const T *dt, *A, *D, *initial;  // D and initial may be null
  const std::int32_t* document;   // running number of the document of each token, or null
};

// What all heads of a group read: C Bᵀ by chunks, and B and C, (batch, groups, tokens, N), rows one after the other:
// those of the whole sequence are a power of 2 or nearly apart, and would meet in few sets of the cache.
template <class T>
struct Common {
  T *scores, *B, *C;
};

// Documents of the tokens of a chunk.
struct Documents {
  const std::int32_t* number;  // of each token; null when all are of the incoming document
  std::int32_t incoming;
  Documents(const std::int32_t* all, const Shape& s, Index b, Index begin)
      : number(all == nullptr ? nullptr : all + b * s.tokens + begin),
        incoming(all == nullptr || begin == 0 ? 0 : number[-1]) {}
  bool same(Index i, Index j) const { return number == nullptr || number[i] == number[j]; }
  bool is_incoming(Index i) const { return number == nullptr || number[i] == incoming; }
};

// Decays of a head in a chunk.
template <class T>
struct Decay {
  double* rate;   // dt A
  T *high, *low;  // s in two parts
  T *entrance;    // from the entrance of the chunk to a token; 0 in a later document
  T *end;         // from a token to the end; 0 in an earlier document
  T through;

  explicit Decay(Scratch& scratch, Index pitch)
      : rate(scratch.take<double>(pitch)), high(scratch.take<T>(pitch)), low(scratch.take<T>(pitch)),
        entrance(scratch.take<T>(pitch)), end(scratch.take<T>(pitch)), through(0) {}

  static std::size_t bytes(Index pitch) { return Scratch::bytes<double>(pitch) + 4 * Scratch::bytes<T>(pitch); }

  void compute(Index size, Index pitch, const T* dt, Index dt_t, T A, const Documents& documents) {
    for (Index i = 0; i < size; ++i) rate[i] = static_cast<double>(dt[i * dt_t]) * static_cast<double>(A);
    double total = 0, rest = 0;  // rest: what the sum loses by rounding (Knuth's TwoSum)
    for (Index i = 0; i < size; ++i) {
      const double before = total, added = rate[i];
      total += added;
      const double taken = total - before;
      rest += (before - (total - taken)) + (added - taken);
      high[i] = static_cast<T>(total);
      low[i] = static_cast<T>((total - static_cast<double>(high[i])) + rest);
    }
    for (Index i = size; i < pitch; ++i) high[i] = low[i] = 0;
    const Vector<T> last_high = splat(high[size - 1]), last_low = splat(low[size - 1]);
    for (Index i = 0; i < pitch; i += kLanes<T>) {
      store(entrance + i, exponential(load(high + i)));
      store(end + i, exponential((last_high - load(high + i)) + (last_low - load(low + i))));
    }
    through = entrance[size - 1];
    if (documents.number == nullptr) return;
    for (Index i = 0; i < size; ++i) {
      if (!documents.is_incoming(i)) entrance[i] = 0;
      if (!documents.same(i, size - 1)) end[i] = 0;
    }
    if (!documents.is_incoming(size - 1)) through = 0;
  }

  // e^(s_i - s_j) for the lanes j, j + 1, …; at most 1 (and of no meaning) where j > i.
  Vector<T> between(Index i, Index j) const {
    const Vector<T> difference = (high[i] - load(high + j)) + (low[i] - load(low + j));
    return exponential(difference > Vector<T>{} ? Vector<T>{} : difference);
  }
};

// Rows one after the other, in T.
template <class T, class X>
void gather(Index size, Index width, const X* from, Index from_row, T* to) {
  for (Index i = 0; i < size; ++i)
    for (Index n = 0; n < width; n += kLanes<T>) store(to + i * width + n, widen<T>(from + i * from_row + n));
}

template <class T>
std::size_t common_scratch(const Shape& s) {
  return Scratch::bytes<T>(s.state * s.pitch());
}

// B and C of a chunk, and C Bᵀ: 0 above the diagonal and between documents.
template <class T, class X>
void make_common(const Shape& s, const Arrays<T, X>& in, Index b, Index g, Index c, Scratch& scratch,
                 const Common<T>& common) {
  const Index begin = c * s.chunk, size = std::min(s.chunk, s.tokens - begin), pitch = s.pitch(), N = s.state;
  T *B = common.B + s.rows(b, g, c), *C = common.C + s.rows(b, g, c), *scores = common.scores + s.scores(b, g, c);
  gather(size, N, in.B + b * s.B_b + begin * s.B_t + g * N, s.B_t, B);
  gather(size, N, in.C + b * s.C_b + begin * s.C_t + g * N, s.C_t, C);
  T* transposed = scratch.take<T>(N * pitch);
  const Index columns = round_up(size, kLanes<T>);
  transpose(size, N, B, N, transposed, pitch);
  for_tiles<T>(size, columns, [&]<int R, int W>(Index i, Index j) {
    if (j > i + R - 1) return;
    Tile<T, R, W> tile;
    tile.clear();
    tile.multiply(N, C + i * N, N, 1, transposed + j, pitch);
    tile.put(scores + i * pitch + j, pitch);
  });
  const Documents documents(in.document, s, b, begin);
  for (Index i = 0; i < size; ++i) {
    for (Index j = i + 1; j < pitch; ++j) scores[i * pitch + j] = 0;
    if (documents.number != nullptr)
      for (Index j = 0; j < i; ++j)
        if (!documents.same(i, j)) scores[i * pitch + j] = 0;
  }
}

template <class T, class X>
int make_common(const Shape& s, const Arrays<T, X>& in, const Common<T>& common, int threads) {
  const Index tasks = s.batch * s.groups * s.chunks();
  int status = kOk;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : status)
  for (Index task = 0; task < tasks; ++task) {
    Scratch& scratch = thread_scratch();
    if (!scratch.reserve(common_scratch<T>(s))) {
      status = kNoMemory;
      continue;
    }
    const Index c = task % s.chunks(), g = task / s.chunks() % s.groups, b = task / s.chunks() / s.groups;
    make_common(s, in, b, g, c, scratch, common);
  }
  return status;
}

// Rows that are read next are fetched meanwhile: each is a short piece of a token's, which the processor does not foresee.
template <class X>
void fetch(Index size, Index width, const X* from, Index from_row) {
  for (Index i = 0; i < size; ++i)
    for (Index byte = 0; byte < width * static_cast<Index>(sizeof(X)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(from + i * from_row) + byte, 0, 2);
}

// x̃ = dt x of a chunk, (Q, P).
template <class T, class X>
void weigh(Index size, Index width, const X* x, Index x_t, const T* dt, Index dt_t, T* out) {
  for (Index i = 0; i < size; ++i)
    for (Index p = 0; p < width; p += kLanes<T>) store(out + i * width + p, dt[i * dt_t] * widen<T>(x + i * x_t + p));
}

template <class T>
void scale_rows(Index size, Index width, const T* factor, T* rows) {
  for (Index i = 0; i < size; ++i)
    for (Index p = 0; p < width; p += kLanes<T>) store(rows + i * width + p, factor[i] * load(rows + i * width + p));
}

// (C Bᵀ) ∘ L, rows filled as far as a tile of rows reads them; L too if there is a place for it.
template <class T>
void make_matrix(Index size, Index pitch, const Decay<T>& decay, const T* scores, T* matrix, T* between = nullptr) {
  for (Index i = 0; i < size; ++i) {
    const Index width = std::min(pitch, round_up(i + kTileRows, kLanes<T>));
    for (Index j = 0; j < width; j += kLanes<T>) {
      const Vector<T> factor = decay.between(i, j);
      if (between != nullptr) store(between + i * pitch + j, factor);
      store(matrix + i * pitch + j, factor * load(scores + i * pitch + j));
    }
  }
}

// So many heads of a group take a chunk after each other, while what they share of it is in the second cache.
constexpr Index kTogether = 4;

// As many, but tasks enough for all threads.
inline Index heads_together(const Shape& s, int threads) {
  return std::max<Index>(1, std::min<Index>({kTogether, s.heads / s.groups, s.batch * s.heads / (3 * threads)}));
}

// y of a chunk of one head before the skip: e^s (C S) + M x̃, in tiles; `finish` gets each, with its row and column.
template <class T, class X>
class Output {
 public:
  static std::size_t bytes(const Shape&) { return 0; }
  Output(const Shape& s, Scratch&) : N(s.state), P(s.head_dim), pitch(s.pitch()) {}

  // C of the chunk: as given, and in T with rows one after the other.
  void begin(Index, const X*, Index, const T* rows) { C = rows; }

  template <class F>
  void run(Index size, const T* state, const Decay<T>& decay, const T* matrix, const T* weighted, F&& finish) const {
    for_tiles<T>(size, P, [&]<int R, int W>(Index i, Index p) {
      Tile<T, R, W> tile;
      tile.clear();
      tile.multiply(N, C + i * N, N, 1, state + p, P);
      tile.scale_rows(decay.entrance + i);
      tile.multiply(i + R, matrix + i * pitch, pitch, 1, weighted + p, P);
      finish(tile, i, p);
    });
  }

 private:
  const Index N, P, pitch;
  const T* C = nullptr;
};

#if defined(__AVX512BF16__)
// Where the processor multiplies bfloat16 and the output is rounded to it, both products take their operands so (C is so
// already) and sum in fp32. The state itself is never rounded.
template <>
class Output<float, Bfloat16> {
 public:
  static std::size_t bytes(const Shape& s) {
    return Scratch::bytes<Bfloat16>(s.state * s.head_dim) + Scratch::bytes<Bfloat16>(s.pitch() * s.head_dim) +
           Scratch::bytes<Bfloat16>(s.chunk * s.pitch()) + Scratch::bytes<Bfloat16>(s.chunk * s.state);
  }

  Output(const Shape& s, Scratch& scratch)
      : N(s.state), P(s.head_dim), pitch(s.pitch()), state_pairs(scratch.take<Bfloat16>(N * P)),
        weighted_pairs(scratch.take<Bfloat16>(pitch * P)), rows(scratch.take<Bfloat16>(s.chunk * pitch)),
        C(scratch.take<Bfloat16>(s.chunk * N)) {}

  void begin(Index size, const Bfloat16* given, Index given_row, const float*) {
    for (Index i = 0; i < size; ++i) std::memcpy(C + i * N, given + i * given_row, sizeof(Bfloat16) * N);
  }

  template <class F>
  void run(Index size, const float* state, const Decay<float>& decay, const float* matrix, const float* weighted,
           F&& finish) const {
    pair_rows(N, state, state_pairs);
    pair_rows(size, weighted, weighted_pairs);
    for (Index i = 0; i < size; ++i)
      for (Index j = 0; j < i + kTileRows && j < pitch; j += kLanes<float>)
        narrow(rows + i * pitch + j, load(matrix + i * pitch + j));
    for_tiles<float>(size, P, [&]<int R, int W>(Index i, Index p) {
      Tile<float, R, W> tile;
      tile.clear();
      tile.multiply_pairs(N / 2, C + i * N, N, state_pairs + 2 * p, 2 * P);
      tile.scale_rows(decay.entrance + i);
      tile.multiply_pairs((i + R + 1) / 2, rows + i * pitch, pitch, weighted_pairs + 2 * p, 2 * P);
      finish(tile, i, p);
    });
  }

 private:
  const Index N, P, pitch;
  Bfloat16 *state_pairs, *weighted_pairs, *rows, *C;

  // Of rows (count, P), 2k and 2k + 1 beside each other; 0 for what is missing to an even number.
  void pair_rows(Index count, const float* from, Bfloat16* to) const {
    for (Index k = 0; k < count; k += 2)
      for (Index p = 0; p < P; p += kLanes<float>)
        narrow_pairs(to + k * P + 2 * p, load(from + k * P + p),
                     k + 1 < count ? load(from + (k + 1) * P + p) : Vector<float>{});
  }
};
#endif

template <class T, class X>
int forward(const Shape& s, const Arrays<T, X>& in, const Common<T>& common, X* y, T* final, int threads) {
  const Index P = s.head_dim, N = s.state, Q = s.chunk, pitch = s.pitch();
  int status = make_common(s, in, common, threads);
  if (status != kOk) return status;
  const Index heads = s.heads / s.groups, together = heads_together(s, threads), parts = (heads + together - 1) / together;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : status)
  for (Index task = 0; task < s.batch * s.groups * parts; ++task) {
    Scratch& scratch = thread_scratch();
    if (!scratch.reserve(Scratch::bytes<T>(together * N * P) + Scratch::bytes<T>(Q * P) +
                         Scratch::bytes<T>(Q * pitch) + Decay<T>::bytes(pitch) + Output<T, X>::bytes(s))) {
      status = kNoMemory;
      continue;
    }
    T *states = scratch.take<T>(together * N * P), *weighted = scratch.take<T>(Q * P);
    T* matrix = scratch.take<T>(Q * pitch);
    Decay<T> decay(scratch, pitch);
    Output<T, X> output(s, scratch);
    const Index b = task / parts / s.groups, g = task / parts % s.groups, first = task % parts * together;
    const Index from = g * heads + first, to = g * heads + std::min(heads, first + together);
    for (Index h = from; h < to; ++h) {
      T* state = states + (h - from) * N * P;
      if (in.initial == nullptr)
        std::memset(state, 0, sizeof(T) * N * P);
      else
        transpose(P, N, in.initial + (b * s.heads + h) * P * N, N, state, P);
    }
    for (Index c = 0; c < s.chunks(); ++c) {
      const Index begin = c * Q, size = std::min(Q, s.tokens - begin);
      const T* B = common.B + s.rows(b, g, c);
      output.begin(size, in.C + b * s.C_b + begin * s.C_t + g * N, s.C_t, common.C + s.rows(b, g, c));
      const Documents documents(in.document, s, b, begin);
      for (Index h = from; h < to; ++h) {
        const X* x = in.x + b * s.x_b + begin * s.x_t + h * P;
        const T* dt = in.dt + b * s.dt_b + begin * s.dt_t + h;
        const T skip = in.D == nullptr ? T(0) : in.D[h];
        T* state = states + (h - from) * N * P;
        X* out = y + ((b * s.tokens + begin) * s.heads + h) * P;
        if (begin + Q < s.tokens) fetch(std::min(Q, s.tokens - begin - Q), P, x + Q * s.x_t, s.x_t);
        decay.compute(size, pitch, dt, s.dt_t, in.A[h], documents);
        make_matrix(size, pitch, decay, common.scores + s.scores(b, g, c), matrix);
        weigh(size, P, x, s.x_t, dt, s.dt_t, weighted);
        const auto put = [&]<int R, int W>(Tile<T, R, W>& tile, Index i, Index p) {
          for (int r = 0; r < R; ++r)
            for (int w = 0; w < W; ++w)
              tile.v[r][w] += skip * widen<T>(x + (i + r) * s.x_t + p + w * kLanes<T>);
          tile.put(out + i * s.heads * P + p, s.heads * P);
        };
        output.run(size, state, decay, matrix, weighted, put);
        scale_rows(size, P, decay.end, weighted);
        for_tiles<T>(N, P, [&]<int R, int W>(Index n, Index p) {
          Tile<T, R, W> tile;
          tile.take(state + n * P + p, P, decay.through);
          tile.multiply(size, B + n, 1, N, weighted + p, P);
          tile.put(state + n * P + p, P);
        });
      }
    }
    for (Index h = from; h < to; ++h)
      transpose(N, P, states + (h - from) * N * P, P, final + (b * s.heads + h) * P * N, N);
  }
  return status;
}

template <class T, class X>
struct Gradients {  // contiguous
  const X* dy;
  const T* dfinal;  // may be null
  X *dx, *dB, *dC;
  T *ddt, *dinitial;
  double *dA, *dD;  // (batch, heads)
};

// What the slices of heads of a group add up, each in its own memory: (slices, B, G, T, N) twice, (…, T, pitch).
template <class T>
struct Shared {
  T *dB, *dC, *dscores;
  Index slices;
};

// Sums of T in fp64, by lanes.
template <class T>
struct DoubleSums {
  static constexpr int kParts = sizeof(double) / sizeof(T);
  typedef T Piece __attribute__((vector_size(kBytes / kParts)));
  Vector<double> total[kParts] = {};

  // Adds the lanes of v here, and one after the other to what is at `each`.
  void add(Vector<T> v, double* each) {
    Piece piece[kParts];
    std::memcpy(piece, &v, sizeof v);
    for (int n = 0; n < kParts; ++n) {
      const Vector<double> wide = __builtin_convertvector(piece[n], Vector<double>);
      store(each + n * kLanes<double>, load(each + n * kLanes<double>) + wide);
      total[n] += wide;
    }
  }

  double sum() const {
    double all = 0;
    for (const Vector<double>& part : total) all += taipan::sum<double>(part);
    return all;
  }
};

template <class T, class X>
class Backward {
 public:
  Backward(const Shape& s, const Arrays<T, X>& in, const Gradients<T, X>& out, const Shared<T>& shared,
           const Common<T>& common)
      : s(s), in(in), out(out), shared(shared), common(common), P(s.head_dim), N(s.state), Q(s.chunk),
        pitch(s.pitch()), scratch(thread_scratch()) {}

  // Room for so many heads together.
  bool reserve(Index heads) {
    const std::size_t bytes = Scratch::bytes<T>(heads * s.chunks() * P * N) + Scratch::bytes<T>((heads + 1) * P * N) +
                              5 * Scratch::bytes<T>(Q * P) + 3 * Scratch::bytes<T>(Q * pitch) +
                              Scratch::bytes<T>(Q * N) + Scratch::bytes<T>(P * pitch) + Decay<T>::bytes(pitch) +
                              3 * Scratch::bytes<double>(pitch);
    if (!scratch.reserve(bytes)) return false;
    all_states = scratch.take<T>(heads * s.chunks() * P * N);
    all_dstates = scratch.take<T>(heads * P * N);
    dstate_transposed = scratch.take<T>(P * N);
    weighted = scratch.take<T>(Q * P);
    dweighted = scratch.take<T>(Q * P);
    dentrance = scratch.take<T>(Q * P);
    matrix = scratch.take<T>(Q * pitch);
    dmatrix = scratch.take<T>(Q * pitch);
    between = scratch.take<T>(Q * pitch);
    x_rows = scratch.take<T>(Q * P);
    dy_rows = scratch.take<T>(Q * P);
    projected = scratch.take<T>(Q * N);
    weighted_transposed = scratch.take<T>(P * pitch);
    column = scratch.take<double>(pitch);
    dlog = scratch.take<double>(pitch);
    kept = scratch.take<double>(pitch);
    return true;
  }

  // All chunks of the heads [from, to) of a group; what they add to of a chunk stays in the cache meanwhile.
  void run(Index b, Index from, Index to, Index slice) {
    Decay<T> decay(scratch, pitch);
    const Index g = from / (s.heads / s.groups);
    for (Index h = from; h < to; ++h) {
      const Index task = b * s.heads + h;
      choose(h - from);
      make_states(b, h, g, decay);
      if (out.dfinal == nullptr)
        std::memset(dstate, 0, sizeof(T) * P * N);
      else
        std::memcpy(dstate, out.dfinal + task * P * N, sizeof(T) * P * N);
      out.dA[task] = out.dD[task] = 0;
    }
    const Index at = (slice * s.batch + b) * s.groups + g;
    for (Index c = s.chunks() - 1; c >= 0; --c) {
      T* dscores = shared.dscores + at * s.chunks() * Q * pitch + c * Q * pitch;
      for (Index h = from; h < to; ++h) {
        choose(h - from);
        chunk(b, h, g, c, decay, shared.dB + at * s.tokens * N, shared.dC + at * s.tokens * N, dscores);
      }
    }
    for (Index h = from; h < to; ++h) {
      choose(h - from);
      std::memcpy(out.dinitial + (b * s.heads + h) * P * N, dstate, sizeof(T) * P * N);
    }
  }

 private:
  const Shape& s;
  const Arrays<T, X>& in;
  const Gradients<T, X>& out;
  const Shared<T>& shared;
  const Common<T>& common;
  const Index P, N, Q, pitch;
  Scratch& scratch;
  T *all_states, *all_dstates, *states, *dstate, *dstate_transposed, *weighted, *dweighted, *dentrance, *matrix, *dmatrix,
      *between, *x_rows, *dy_rows, *projected, *weighted_transposed;
  double *column, *dlog, *kept;

  // The head, of those together, that the states are of from now on.
  void choose(Index head) {
    states = all_states + head * s.chunks() * P * N;
    dstate = all_dstates + head * P * N;
  }

  // States (P, N) at the entrance of every chunk.
  void make_states(Index b, Index h, Index g, Decay<T>& decay) {
    if (in.initial == nullptr)
      std::memset(states, 0, sizeof(T) * P * N);
    else
      std::memcpy(states, in.initial + (b * s.heads + h) * P * N, sizeof(T) * P * N);
    for (Index c = 0; c + 1 < s.chunks(); ++c) {
      const Index begin = c * Q;
      const X* x = in.x + b * s.x_b + begin * s.x_t + h * P;
      const T* dt = in.dt + b * s.dt_b + begin * s.dt_t + h;
      const T* B = common.B + s.rows(b, g, c);
      if (c + 2 < s.chunks()) fetch(Q, P, x + Q * s.x_t, s.x_t);
      decay.compute(Q, pitch, dt, s.dt_t, in.A[h], Documents(in.document, s, b, begin));
      weigh(Q, P, x, s.x_t, dt, s.dt_t, weighted);
      scale_rows(Q, P, decay.end, weighted);
      const T* before = states + c * P * N;
      for_tiles<T>(P, N, [&]<int R, int W>(Index p, Index n) {
        Tile<T, R, W> tile;
        tile.take(before + p * N + n, N, decay.through);
        tile.multiply(Q, weighted + p, 1, P, B + n, N);
        tile.put(states + (c + 1) * P * N + p * N + n, N);
      });
    }
  }

  void chunk(Index b, Index h, Index g, Index c, Decay<T>& decay, T* dB_group, T* dC_group, T* dscores) {
    const Index begin = c * Q, size = std::min(Q, s.tokens - begin), columns = round_up(size, kLanes<T>);
    const Index token = b * s.tokens + begin, row = s.heads * P, task = b * s.heads + h;
    const T* dt = in.dt + b * s.dt_b + begin * s.dt_t + h;
    const T *B = common.B + s.rows(b, g, c), *C = common.C + s.rows(b, g, c);
    const X *x_from = in.x + b * s.x_b + begin * s.x_t + h * P, *dy_from = out.dy + token * row + h * P;
    if (c > 0) {
      fetch(Q, P, x_from - Q * s.x_t, s.x_t);
      fetch(Q, P, dy_from - Q * row, row);
    }
    gather(size, P, x_from, s.x_t, x_rows);
    gather(size, P, dy_from, row, dy_rows);
    const T *x = x_rows, *dy = dy_rows, *state = states + c * P * N;
    const T A = in.A[h], skip = in.D == nullptr ? T(0) : in.D[h];
    decay.compute(size, pitch, dt, s.dt_t, A, Documents(in.document, s, b, begin));
    weigh(size, P, x, P, dt, s.dt_t, weighted);
    make_matrix(size, pitch, decay, common.scores + s.scores(b, g, c), matrix, between);

    // dM = dy x̃ᵀ on and below the diagonal.
    transpose(size, P, weighted, P, weighted_transposed, pitch);
    for_tiles<T>(size, columns, [&]<int R, int W>(Index i, Index j) {
      if (j > i + R - 1) return;
      Tile<T, R, W> tile;
      tile.clear();
      tile.multiply(P, dy + i * P, P, 1, weighted_transposed + j, pitch);
      tile.put(dmatrix + i * pitch + j, pitch);
    });

    // d(C Bᵀ) += dM ∘ L; with E = dM ∘ M below the diagonal, ds_i gets the sum of row i less that of column i. Both in
    // fp64: of what they add up to over the later tokens most cancels, and a token that forgets much multiplies the rest
    // by its large dt.
    for (Index j = 0; j < columns; ++j) column[j] = 0;
    for (Index i = 0; i < size; ++i) {
      T* values = dmatrix + i * pitch;
      const T own = values[i];
      for (Index j = i; j < round_up(i + 1, kLanes<T>); ++j) values[j] = 0;
      DoubleSums<T> total;
      for (Index j = 0; j < i; j += kLanes<T>) {
        const Vector<T> value = load(values + j);
        store(dscores + i * pitch + j, load(dscores + i * pitch + j) + value * load(between + i * pitch + j));
        total.add(value * load(matrix + i * pitch + j), column + j);
      }
      dscores[i * pitch + i] += own;
      dlog[i] = total.sum();
    }

    // dC from the entrance: e^s dy Sᵀ.
    for_tiles<T>(size, N, [&]<int R, int W>(Index i, Index n) {
      Tile<T, R, W> tile;
      tile.clear();
      tile.multiply(P, dy + i * P, P, 1, state + n, N);
      tile.put(projected + i * N + n, N);
    });
    add_projected(size, decay.entrance, C, dC_group + begin * N, [&](Index i, T value) { dlog[i] += value; });

    // dB from the end: e^(s_Q - s) x̃ dS'ᵀ.
    for_tiles<T>(size, N, [&]<int R, int W>(Index i, Index n) {
      Tile<T, R, W> tile;
      tile.clear();
      tile.multiply(P, weighted + i * P, P, 1, dstate + n, N);
      tile.put(projected + i * N + n, N);
    });
    // What token i passes to the state at the end: the state at the entrance and the tokens before i. (All that is in
    // the state less what i and later tokens added is the same, but of little the difference would leave its rounding.)
    double passed = static_cast<double>(decay.through) * dot(P * N, dstate, state);
    add_projected(size, decay.end, B, dB_group + begin * N, [&](Index i, T value) {
      kept[i] = passed;
      passed += value;
    });

    // dx̃ = Mᵀ dy + e^(s_Q - s) B dS'.
    transpose(P, N, dstate, N, dstate_transposed, P);
    for_tiles<T>(size, P, [&]<int R, int W>(Index j, Index p) {
      Tile<T, R, W> tile;
      tile.clear();
      tile.multiply(N, B + j * N, N, 1, dstate_transposed + p, P);
      tile.scale_rows(decay.end + j);
      tile.multiply(size - j, matrix + j * pitch + j, 1, pitch, dy + j * P + p, P);
      tile.put(dweighted + j * P + p, P);
    });

    // dS = e^(s_Q) dS' + Σ_i e^(s_i) dy_i C_iᵀ.
    for (Index i = 0; i < size; ++i)
      for (Index p = 0; p < P; p += kLanes<T>)
        store(dentrance + i * P + p, decay.entrance[i] * load(dy + i * P + p));
    for_tiles<T>(P, N, [&]<int R, int W>(Index p, Index n) {
      Tile<T, R, W> tile;
      tile.take(dstate + p * N + n, N, decay.through);
      tile.multiply(size, dentrance + p, 1, P, C + n, N);
      tile.put(dstate + p * N + n, N);
    });

    // dx, dD, and from ds (summed from the end of the chunk) ddt and dA.
    double later = 0;
    for (Index i = size - 1; i >= 0; --i) {
      X* dx = out.dx + (token + i) * row + h * P;
      Vector<T> through_x{}, through_skip{};
      for (Index p = 0; p < P; p += kLanes<T>) {
        const Vector<T> value = load(dweighted + i * P + p), input = load(x + i * P + p);
        const Vector<T> gradient = load(dy + i * P + p);
        through_x += value * input;
        through_skip += gradient * input;
        narrow(dx + p, dt[i * s.dt_t] * value + skip * gradient);
      }
      later += dlog[i] - column[i];
      // Less than a rounding passes such a decay; a difference of sums would leave their rounding, times dt.
      const double moved = decay.rate[i] < -40 ? 0.0 : later + kept[i];
      out.ddt[(token + i) * s.heads + h] = static_cast<T>(static_cast<double>(A) * moved + sum<T>(through_x));
      out.dA[task] += static_cast<double>(dt[i * s.dt_t]) * moved;
      out.dD[task] += sum<T>(through_skip);
    }
  }

  // target_i += factor_i projected_i, and tell(i, factor_i · projected_i · with_i).
  template <class F>
  void add_projected(Index size, const T* factor, const T* with, T* target, F&& tell) {
    for (Index i = 0; i < size; ++i) {
      Vector<T> total{};
      for (Index n = 0; n < N; n += kLanes<T>) {
        const Vector<T> value = factor[i] * load(projected + i * N + n);
        total += value * load(with + i * N + n);
        store(target + i * N + n, load(target + i * N + n) + value);
      }
      tell(i, sum<T>(total));
    }
  }
};

// d(C Bᵀ) of all slices into dC and dB.
template <class T, class X>
void finish(const Shape& s, const Arrays<T, X>& in, const Gradients<T, X>& out, const Shared<T>& shared,
            const Common<T>& common, Index b, Index g, Index c) {
  const Index Q = s.chunk, N = s.state, pitch = s.pitch(), begin = c * Q, size = std::min(Q, s.tokens - begin);
  const T *B = common.B + s.rows(b, g, c), *C = common.C + s.rows(b, g, c);
  const Index group = b * s.groups + g, groups = s.batch * s.groups;
  T* dscores = shared.dscores + (group * s.chunks() + c) * Q * pitch;
  const Documents documents(in.document, s, b, begin);
  for (Index i = 0; i < size; ++i) {
    T* row = dscores + i * pitch;
    for (Index slice = 1; slice < shared.slices; ++slice) {
      const T* other = row + slice * groups * s.chunks() * Q * pitch;
      for (Index j = 0; j <= i; ++j) row[j] += other[j];
    }
    for (Index j = i + 1; j < pitch; ++j) row[j] = 0;
    if (documents.number != nullptr)
      for (Index j = 0; j < i; ++j)
        if (!documents.same(i, j)) row[j] = 0;
  }
  const auto add = [&](const T* summed, X* target, auto&& product) {
    for_tiles<T>(size, N, [&]<int R, int W>(Index i, Index n) {
      Tile<T, R, W> tile;
      tile.take(summed + i * N + n, N, T(1));
      for (Index slice = 1; slice < shared.slices; ++slice)
        for (int r = 0; r < R; ++r)
          for (int w = 0; w < W; ++w)
            tile.v[r][w] += load(summed + slice * groups * s.tokens * N + (i + r) * N + n + w * kLanes<T>);
      product(tile, i, n);
      tile.put(target + i * s.groups * N + n, s.groups * N);
    });
  };
  const Index from = group * s.tokens * N + begin * N, to = ((b * s.tokens + begin) * s.groups + g) * N;
  add(shared.dC + from, out.dC + to, [&]<int R, int W>(Tile<T, R, W>& tile, Index i, Index n) {
    tile.multiply(std::min(size, i + R), dscores + i * pitch, pitch, 1, B + n, N);
  });
  add(shared.dB + from, out.dB + to, [&]<int R, int W>(Tile<T, R, W>& tile, Index j, Index n) {
    tile.multiply(size - j, dscores + j * pitch + j, 1, pitch, C + j * N + n, N);
  });
}

template <class T, class X>
int backward(const Shape& s, const Arrays<T, X>& in, const Gradients<T, X>& out, const Shared<T>& shared,
             const Common<T>& common, int threads) {
  int status = make_common(s, in, common, threads);
  if (status != kOk) return status;
  const Index groups = s.batch * s.groups, heads = s.heads / s.groups;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : status)
  for (Index task = 0; task < groups * shared.slices; ++task) {
    const Index slice = task / groups, b = task % groups / s.groups, g = task % s.groups;
    const Index at = slice * groups + b * s.groups + g;
    std::memset(shared.dB + at * s.tokens * s.state, 0, sizeof(T) * s.tokens * s.state);
    std::memset(shared.dC + at * s.tokens * s.state, 0, sizeof(T) * s.tokens * s.state);
    const Index size = s.chunks() * s.chunk * s.pitch();
    std::memset(shared.dscores + at * size, 0, sizeof(T) * size);
    Backward<T, X> work(s, in, out, shared, common);
    const Index first = heads * slice / shared.slices, last = heads * (slice + 1) / shared.slices;
    for (Index h = first; h < last; h += kTogether) {
      const Index end = std::min(last, h + kTogether);
      if (!work.reserve(end - h)) {
        status = kNoMemory;
        break;
      }
      work.run(b, g * heads + h, g * heads + end, slice);
    }
  }
  if (status != kOk) return status;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index task = 0; task < groups * s.chunks(); ++task) {
    const Index c = task % s.chunks(), g = task / s.chunks() % s.groups, b = task / s.chunks() / s.groups;
    finish(s, in, out, shared, common, b, g, c);
  }
  return kOk;
}

}  // namespace
}  // namespace taipan

using Real = TAIPAN_REAL;

// Sizes are the fields of Shape in order; native.py of the op has the shapes of all else.
extern "C" int taipan_ssd_forward(const std::ptrdiff_t* sizes, const void* x, const Real* dt, const Real* A,
                                  const void* B, const void* C, const Real* D, const Real* initial,
                                  const std::int32_t* document, Real* scores, Real* B_rows, Real* C_rows, void* y,
                                  Real* final, int threads) {
  using namespace taipan;
  Shape s;
  std::memcpy(&s, sizes, sizeof s);
  return with_element<Real>(s.narrow, [&]<class X>() {
    const Arrays<Real, X> in{
        static_cast<const X*>(x), static_cast<const X*>(B), static_cast<const X*>(C), dt, A, D, initial, document};
    return forward<Real, X>(s, in, {scores, B_rows, C_rows}, static_cast<X*>(y), final, threads);
  });
}

extern "C" int taipan_ssd_backward(const std::ptrdiff_t* sizes, const void* x, const Real* dt, const Real* A,
                                   const void* B, const void* C, const Real* D, const Real* initial,
                                   const std::int32_t* document, Real* scores, Real* B_rows, Real* C_rows,
                                   const void* dy, const Real* dfinal, Real* slices_dB, Real* slices_dC,
                                   Real* slices_dscores, std::ptrdiff_t slices, void* dx, Real* ddt, void* dB, void* dC,
                                   Real* dinitial, double* dA, double* dD, int threads) {
  using namespace taipan;
  Shape s;
  std::memcpy(&s, sizes, sizeof s);
  return with_element<Real>(s.narrow, [&]<class X>() {
    const Arrays<Real, X> in{
        static_cast<const X*>(x), static_cast<const X*>(B), static_cast<const X*>(C), dt, A, D, initial, document};
    const Gradients<Real, X> out{static_cast<const X*>(dy), dfinal, static_cast<X*>(dx), static_cast<X*>(dB),
                                 static_cast<X*>(dC), ddt, dinitial, dA, dD};
    return backward<Real, X>(s, in, out, {slices_dB, slices_dC, slices_dscores, slices}, {scores, B_rows, C_rows},
                             threads);
  });
}
