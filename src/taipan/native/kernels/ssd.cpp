// State space duality (Dao & Gu 2024, section 6) by chunks, forward and backward.
//
// With s = cumsum(dt A) inside a chunk of Q tokens, x̃ = dt x, S the state at its entrance and S' at its end,
//
//   y  = e^s (C S) + ((C Bᵀ) ∘ L) x̃ + D x        L_ij = e^(s_i - s_j), j ≤ i
//   S' = e^(s_Q) S + Σ_j e^(s_Q - s_j) x̃_j B_jᵀ
//
// and every exponent is ≤ 0, so nothing overflows however fast a head forgets. C Bᵀ is computed once for the heads of
// a group; the rest chunk by chunk, a few heads at a time, in memory that stays in the cache: no (heads, Q, Q) matrix
// exists. The backward computes the states at the entrances of the chunks again, unless the forward has left them. Sums of exponents are kept in two parts, so a slow token after a fast
// one (large sums, small difference) loses no digits. States are (N, P) here: then only x and dy of a chunk have to be
// transposed for products.
//
// With products in bfloat16, products that only affect results rounded to it (y, dx, dB, dC) round their operands; those
// that affect the states and the fp32 gradients (dt, A, the initial state) lose nothing.
#include <algorithm>
#include <optional>

#include "interface.h"
#include "products.h"
#include "sharing.h"

namespace taipan {
namespace {

constexpr Index kMultiple = 16;  // of N and P, which every vector width divides

struct Shape : SsdSizes {
  bool fits() const {
    return chunk > 0 && groups > 0 && heads % groups == 0 && head_dim % kMultiple == 0 && state % kMultiple == 0;
  }
  Index chunks() const { return (tokens + chunk - 1) / chunk; }
  Index pitch() const { return round_up(chunk, kBytes / 4); }  // of a row of a (Q, Q) matrix
  Index rows_up() const { return round_up(chunk, 16); }        // of the result of a product
  Index scores(Index b, Index g, Index c) const { return ((b * groups + g) * chunks() + c) * chunk * pitch(); }
  Index rows(Index b, Index g, Index c) const { return ((b * groups + g) * tokens + c * chunk) * state; }
  Index columns(Index b, Index g, Index c) const { return ((b * groups + g) * chunks() + c) * state * pitch(); }
  Index entrance(Index b, Index h, Index c) const { return ((b * heads + h) * chunks() + c) * state * head_dim; }
};

// X is the type of the tokens in memory.
template <class T, class X>
struct Arrays {
  const X *x, *B, *C;
  const T *dt, *A, *D, *initial;  // D and initial may be null
  const std::int32_t* document;   // running number of the document of each token, or null
  T* entrances;                   // states at the entrances of the chunks, (batch, heads, chunks, N, P), or null
};

// Shared by the heads of a group: C Bᵀ by chunks, and contiguous copies of B and C, (batch, groups, tokens, N). In the
// whole sequence their rows are about a power of 2 apart and would share few sets of the cache. For the backward (else
// null) also their columns by chunks, (batch, groups, chunks, N, pitch).
template <class T>
struct Common {
  T *scores, *B, *C, *B_columns, *C_columns;
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

  void compute(Index size, Index pitch, const T* dt, Index dt_t, T A, const Documents& documents) {
    for (Index i = 0; i < size; ++i) rate[i] = static_cast<double>(dt[i * dt_t]) * static_cast<double>(A);
    double total = 0, rest = 0;  // rest: the rounding error of the sum (Knuth's TwoSum)
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
    return exponential_of_negative(difference > Vector<T>{} ? Vector<T>{} : difference);
  }
};

// Rows one after the other, in T.
template <class T, class X>
void gather(Index size, Index width, const X* from, Index from_row, T* to) {
  for (Index i = 0; i < size; ++i)
    for (Index n = 0; n < width; n += kLanes<T>) store(to + i * width + n, widen<T>(from + i * from_row + n));
}

// B and C of a chunk, and C Bᵀ: 0 above the diagonal and between documents.
template <class W, class T, class X>
void make_common(const Shape& s, const Arrays<T, X>& in, Index b, Index g, Index c, typename W::Rounded::Left& left,
                 typename W::Rounded::Right& right, T* product, const Common<T>& common) {
  const Index begin = c * s.chunk, size = std::min(s.chunk, s.tokens - begin), pitch = s.pitch(), N = s.state;
  T *B = common.B + s.rows(b, g, c), *C = common.C + s.rows(b, g, c), *scores = common.scores + s.scores(b, g, c);
  gather(size, N, in.B + b * s.B_b + begin * s.B_t + g * N, s.B_t, B);
  gather(size, N, in.C + b * s.C_b + begin * s.C_t + g * N, s.C_t, C);
  if (common.B_columns != nullptr) {
    transpose(size, N, B, N, common.B_columns + s.columns(b, g, c), pitch);
    transpose(size, N, C, N, common.C_columns + s.columns(b, g, c), pitch);
  }
  left.rows(size, N, C, N);
  right.columns(N, size, B, N);
  W::Rounded::template run<Where::kResultLower>(size, round_up(size, kLanes<T>), N, left, right, product, pitch);
  const Documents documents(in.document, s, b, begin);
  for (Index i = 0; i < size; ++i) {
    for (Index j = 0; j <= i; ++j) scores[i * pitch + j] = documents.same(i, j) ? product[i * pitch + j] : T(0);
    for (Index j = i + 1; j < pitch; ++j) scores[i * pitch + j] = 0;
  }
}

template <class W, class T, class X>
int make_common(const Shape& s, const Arrays<T, X>& in, const Common<T>& common, int threads) {
  struct Room {
    typename W::Rounded::Left left;
    typename W::Rounded::Right right;
    T* product;
    Room(Scratch& scratch, const Shape& s)
        : left(scratch, s.chunk, s.state), right(scratch, s.state, s.chunk),
          product(scratch.take<T>(s.rows_up() * s.pitch())) {}
  };
  const Index tasks = s.batch * s.groups * s.chunks();
  int status = kOk;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : status)
  for (Index task = 0; task < tasks; ++task) {
    [[maybe_unused]] const typename W::Session session;
    auto room = thread_scratch().template lay_out<Room>(s);
    if (!room) {
      status = kNoMemory;
      continue;
    }
    const Index c = task % s.chunks(), g = task / s.chunks() % s.groups, b = task / s.chunks() / s.groups;
    make_common<W>(s, in, b, g, c, room->left, room->right, room->product, common);
  }
  return status;
}

// Prefetches the next rows: each is a short piece of a token's row, which the processor does not prefetch by itself.
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

// to_i = factor_i from_i
template <class T>
void scale_rows(Index size, Index width, const T* factor, const T* from, T* to) {
  for (Index i = 0; i < size; ++i)
    for (Index p = 0; p < width; p += kLanes<T>) store(to + i * width + p, factor[i] * load(from + i * width + p));
}

// (C Bᵀ) ∘ L; L too, at and below the diagonal, if there is a place for it.
template <class T>
void make_matrix(Index size, Index pitch, const Decay<T>& decay, const T* scores, T* matrix, T* between = nullptr) {
  for (Index i = 0; i < size; ++i) {
    Index j = 0;
    for (; j <= i; j += kLanes<T>) {
      const Vector<T> factor = decay.between(i, j);
      if (between != nullptr) store(between + i * pitch + j, factor);
      store(matrix + i * pitch + j, factor * load(scores + i * pitch + j));
    }
    for (; j < pitch; j += kLanes<T>) store(matrix + i * pitch + j, Vector<T>{});
  }
}

// The state of a head, (N, P) from the (P, N) of all, or 0.
template <class T>
void take_state(const Shape& s, const T* from, Index head, T* to) {
  if (from == nullptr)
    std::memset(to, 0, sizeof(T) * s.state * s.head_dim);
  else
    transpose(s.head_dim, s.state, from + head * s.head_dim * s.state, s.state, to, s.head_dim);
}

// The tokens' parts from a state and from each other, (Q, P): factor (tokens · state) + matrix · rows.
template <class Product, Where where, class T>
void from_state_and_chunk(const Shape& s, Index size, const typename Product::Left& tokens,
                          const typename Product::Right& state, const T* factor, const typename Product::Left& matrix,
                          const typename Product::Right& rows, T* out) {
  const Index P = s.head_dim;
  Product::run(size, P, s.state, tokens, state, out, P);
  scale_rows(size, P, factor, out, out);
  Product::template run<where>(size, P, size, matrix, rows, out, P, {out, P, T(1)});
}

// Heads of a group that take a chunk one after the other, while the data they share is in the second cache.
constexpr Index kTogether = 4;

// The forward of a few heads of a group.
template <class W, class T, class X>
class Forward {
 public:
  Forward(Scratch& scratch, const Shape& s, const Arrays<T, X>& in, const Common<T>& common, Index heads)
      : s(s), in(in), common(common), P(s.head_dim), N(s.state), Q(s.chunk), pitch(s.pitch()),
        states(scratch.take<T>(heads * N * P)), weighted(scratch.take<T>(Q * P)), matrix(scratch.take<T>(Q * pitch)),
        sums(scratch.take<T>(s.rows_up() * P)), decay(scratch, pitch), C(scratch, Q, N), M(scratch, Q, Q),
        state_right(scratch, N, P), x_right(scratch, Q, P), B(scratch, N, Q), x_to_end(scratch, Q, P) {}

  // All chunks of the heads [from, to).
  void run(Index b, Index from, Index to, X* y, T* final) {
    const Index g = from / (s.heads / s.groups), chunks = s.chunks();
    // Where the state at the entrance of a chunk lies; behind the last one, always in `states`.
    const auto state = [&](Index h, Index c) {
      if (in.entrances != nullptr && c < chunks) return in.entrances + s.entrance(b, h, c);
      return states + (h - from) * N * P;
    };
    for (Index h = from; h < to; ++h) take_state(s, in.initial, b * s.heads + h, state(h, 0));
    for (Index c = 0; c < chunks; ++c) {
      const Index size = std::min(Q, s.tokens - c * Q);
      C.rows(size, N, common.C + s.rows(b, g, c), N);
      B.columns(N, size, common.B + s.rows(b, g, c), N);
      for (Index h = from; h < to; ++h) chunk(b, h, g, c, state(h, c), state(h, c + 1), y);
    }
    for (Index h = from; h < to; ++h) transpose(N, P, state(h, chunks), P, final + (b * s.heads + h) * P * N, N);
  }

 private:
  const Shape& s;
  const Arrays<T, X>& in;
  const Common<T>& common;
  const Index P, N, Q, pitch;
  T *states, *weighted, *matrix, *sums;
  Decay<T> decay;
  typename W::Rounded::Left C, M;
  typename W::Rounded::Right state_right, x_right;
  typename W::ExactRight::Left B;
  typename W::ExactRight::Right x_to_end;

  void chunk(Index b, Index h, Index g, Index c, const T* state, T* next, X* y) {
    const Index begin = c * Q, size = std::min(Q, s.tokens - begin);
    const X* x = in.x + b * s.x_b + begin * s.x_t + h * P;
    const T* dt = in.dt + b * s.dt_b + begin * s.dt_t + h;
    const T skip = in.D == nullptr ? T(0) : in.D[h];
    if (begin + Q < s.tokens) fetch(std::min(Q, s.tokens - begin - Q), P, x + Q * s.x_t, s.x_t);
    decay.compute(size, pitch, dt, s.dt_t, in.A[h], Documents(in.document, s, b, begin));
    make_matrix(size, pitch, decay, common.scores + s.scores(b, g, c), matrix);
    weigh(size, P, x, s.x_t, dt, s.dt_t, weighted);

    // y = e^s (C S) + M x̃ + D x
    state_right.rows(N, P, state, P);
    M.rows(size, size, matrix, pitch);
    x_right.rows(size, P, weighted, P);
    from_state_and_chunk<typename W::Rounded, Where::kLower>(s, size, C, state_right, decay.entrance, M, x_right, sums);
    for (Index i = 0; i < size; ++i)
      for (Index p = 0; p < P; p += kLanes<T>)
        narrow(y + ((b * s.tokens + begin + i) * s.heads + h) * P + p,
               load(sums + i * P + p) + skip * widen<T>(x + i * s.x_t + p));

    // S' = e^(s_Q) S + Σ_j e^(s_Q - s_j) B_j x̃_jᵀ
    scale_rows(size, P, decay.end, weighted, weighted);
    x_to_end.rows(size, P, weighted, P);
    W::ExactRight::run(N, P, size, B, x_to_end, next, P, {state, P, decay.through});
  }
};

template <class W, class T, class X>
int forward(const Shape& s, const Arrays<T, X>& in, const Common<T>& common, X* y, T* final, int threads) {
  int status = make_common<W>(s, in, common, threads);
  if (status != kOk) return status;
  const Index heads = s.heads / s.groups, together = heads_together(s.batch * s.groups, heads, threads);
  const Index parts = (heads + together - 1) / together;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : status)
  for (Index task = 0; task < s.batch * s.groups * parts; ++task) {
    [[maybe_unused]] const typename W::Session session;
    auto work = thread_scratch().template lay_out<Forward<W, T, X>>(s, in, common, together);
    if (!work) {
      status = kNoMemory;
      continue;
    }
    const Index b = task / parts / s.groups, g = task / parts % s.groups, first = task % parts * together;
    work->run(b, g * heads + first, g * heads + std::min(heads, first + together), y, final);
  }
  return status;
}

template <class T, class X>
struct Gradients {  // contiguous but for dy, dx, dB and dC, which say how far it is from token to token
  const X* dy;      // a chunk of a head is read before its dx is written, which may be the same place
  const T* dfinal;  // may be null
  X *dx, *dB, *dC;
  Index dy_t, dx_t, dB_t;
  T *ddt, *dinitial;
  double *dA, *dD;  // (batch, heads)
};

// Sums of each slice of a group's heads, in its own memory: columns of dB and dC by chunks, (slices, batch, groups,
// chunks, N, pitch), and d(C Bᵀ), (…, Q, pitch).
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

  void add(Vector<T> v) {
    for_pieces(v, [&](int n, Vector<double> wide) { total[n] += wide; });
  }

  // Adds the lanes of v to `each`, and v times the factors to `total`.
  void add(Vector<T> v, const double* factors, double* each) {
    for_pieces(v, [&](int n, Vector<double> wide) {
      store(each + n * kLanes<double>, load(each + n * kLanes<double>) + wide);
      total[n] += wide * load(factors + n * kLanes<double>);
    });
  }

  double sum() const {
    Vector<double> all = total[0];
    for (int n = 1; n < kParts; ++n) all += total[n];
    return taipan::sum<double>(all);
  }

 private:
  template <class F>
  static void for_pieces(Vector<T> v, F&& f) {
    Piece piece[kParts];
    std::memcpy(piece, &v, sizeof v);
    for (int n = 0; n < kParts; ++n) f(n, __builtin_convertvector(piece[n], Vector<double>));
  }
};

// The backward of a few heads of a group.
template <class W, class T, class X>
class Backward {
 public:
  Backward(Scratch& scratch, const Shape& s, const Arrays<T, X>& in, const Gradients<T, X>& out, const Shared<T>& shared,
           const Common<T>& common, Index heads)
      : s(s), in(in), out(out), shared(shared), common(common), P(s.head_dim), N(s.state), Q(s.chunk), pitch(s.pitch()),
        states(scratch.take<T>(in.entrances == nullptr ? heads * s.chunks() * N * P : 0)), dstates(scratch.take<T>(heads * N * P)),
        x(scratch.take<T>(Q * P)), dy(scratch.take<T>(Q * P)), weighted(scratch.take<T>(Q * P)),
        dweighted(scratch.take<T>(s.rows_up() * P)), matrix(scratch.take<T>(Q * pitch)),
        dmatrix(scratch.take<T>(s.rows_up() * pitch)), between(scratch.take<T>(Q * pitch)),
        projected(scratch.take<T>(N * pitch)), told(scratch.take<T>(pitch)), dt(scratch.take<T>(pitch)),
        factor(scratch.take<T>(pitch)), dt_double(scratch.take<double>(pitch)), column(scratch.take<double>(pitch)),
        dlog(scratch.take<double>(pitch)), through_x(scratch.take<double>(pitch)), kept(scratch.take<double>(pitch)),
        decay(scratch, pitch), dy_left(scratch, Q, P), B_left(scratch, Q, N), M_left(scratch, Q, Q),
        x_columns(scratch, P, Q), dstate_right(scratch, N, P), dy_right(scratch, Q, P), state_left(scratch, N, P),
        x_exact(scratch, P, Q), dy_exact(scratch, P, Q), B_exact(scratch, N, Q), C_exact(scratch, N, Q),
        weighted_right(scratch, Q, P) {}

  // All chunks of the heads [from, to); the sums of a chunk stay in the cache.
  void run(Index b, Index from, Index to, Index slice) {
    const Index g = from / (s.heads / s.groups);
    for (Index h = from; h < to; ++h) {
      const Index task = b * s.heads + h;
      take_state(s, out.dfinal, task, dstates + (h - from) * N * P);
      out.dA[task] = out.dD[task] = 0;
    }
    if (in.entrances == nullptr) make_states(b, g, from, to);
    const T* entrances = in.entrances == nullptr ? states : in.entrances + s.entrance(b, from, 0);
    const Index at = (slice * s.batch + b) * s.groups + g;
    for (Index c = s.chunks() - 1; c >= 0; --c) {
      const Index size = std::min(Q, s.tokens - c * Q), columns = (at * s.chunks() + c) * N * pitch;
      B_left.rows(size, N, common.B + s.rows(b, g, c), N);
      C_exact.columns(N, size, common.C + s.rows(b, g, c), N);
      for (Index h = from; h < to; ++h)
        chunk(b, h, g, c, entrances + ((h - from) * s.chunks() + c) * N * P, dstates + (h - from) * N * P, shared.dB + columns,
              shared.dC + columns, shared.dscores + (at * s.chunks() + c) * Q * pitch);
    }
    for (Index h = from; h < to; ++h)
      transpose(N, P, dstates + (h - from) * N * P, P, out.dinitial + (b * s.heads + h) * P * N, N);
  }

 private:
  const Shape& s;
  const Arrays<T, X>& in;
  const Gradients<T, X>& out;
  const Shared<T>& shared;
  const Common<T>& common;
  const Index P, N, Q, pitch;
  T *states, *dstates;  // (heads, chunks, N, P) and (heads, N, P)
  T *x, *dy, *weighted, *dweighted, *matrix, *dmatrix, *between, *projected, *told, *dt, *factor;
  double *dt_double, *column, *dlog, *through_x, *kept;
  Decay<T> decay;
  typename W::Rounded::Left dy_left, B_left, M_left;
  typename W::Rounded::Right x_columns, dstate_right, dy_right;
  typename W::ExactLeft::Left state_left;
  typename W::ExactLeft::Right x_exact, dy_exact;
  typename W::ExactRight::Left B_exact, C_exact;
  typename W::ExactRight::Right weighted_right;

  T* states_of(Index head) const { return states + head * s.chunks() * N * P; }

  // States at the entrance of every chunk.
  void make_states(Index b, Index g, Index from, Index to) {
    for (Index h = from; h < to; ++h) take_state(s, in.initial, b * s.heads + h, states_of(h - from));
    for (Index c = 0; c + 1 < s.chunks(); ++c) {
      const Index begin = c * Q;
      B_exact.columns(N, Q, common.B + s.rows(b, g, c), N);
      const Documents documents(in.document, s, b, begin);
      for (Index h = from; h < to; ++h) {
        const X* rows = in.x + b * s.x_b + begin * s.x_t + h * P;
        const T* steps = in.dt + b * s.dt_b + begin * s.dt_t + h;
        if (c + 2 < s.chunks()) fetch(Q, P, rows + Q * s.x_t, s.x_t);
        decay.compute(Q, pitch, steps, s.dt_t, in.A[h], documents);
        weigh(Q, P, rows, s.x_t, steps, s.dt_t, weighted);
        scale_rows(Q, P, decay.end, weighted, weighted);
        weighted_right.rows(Q, P, weighted, P);
        const T* before = states_of(h - from) + c * N * P;
        W::ExactRight::run(N, P, Q, B_exact, weighted_right, states_of(h - from) + (c + 1) * N * P, P,
                           {before, P, decay.through});
      }
    }
  }

  void chunk(Index b, Index h, Index g, Index c, const T* state, T* dstate, T* dB, T* dC, T* dscores) {
    const Index begin = c * Q, size = std::min(Q, s.tokens - begin), columns = round_up(size, kLanes<T>);
    const Index token = b * s.tokens + begin, row = out.dy_t, task = b * s.heads + h;
    const X *x_from = in.x + b * s.x_b + begin * s.x_t + h * P, *dy_from = out.dy + token * row + h * P;
    if (c > 0) {
      fetch(Q, P, x_from - Q * s.x_t, s.x_t);
      fetch(Q, P, dy_from - Q * row, row);
    }
    gather(size, P, x_from, s.x_t, x);
    gather(size, P, dy_from, row, dy);
    const T A = in.A[h], skip = in.D == nullptr ? T(0) : in.D[h];
    for (Index i = 0; i < columns; ++i) {
      dt[i] = i < size ? in.dt[b * s.dt_b + (begin + i) * s.dt_t + h] : T(0);
      dt_double[i] = static_cast<double>(dt[i]);
      column[i] = 0;
    }
    decay.compute(size, pitch, dt, 1, A, Documents(in.document, s, b, begin));
    make_matrix(size, pitch, decay, common.scores + s.scores(b, g, c), matrix, between);

    // dy xᵀ on and below the diagonal; times dt it is dM.
    dy_left.rows(size, P, dy, P);
    x_columns.columns(P, size, x, P);
    W::Rounded::template run<Where::kResultLower>(size, columns, P, dy_left, x_columns, dmatrix, pitch);

    // d(C Bᵀ) += dM ∘ L. With E = dM ∘ M below the diagonal, ds_i gets the sum of row i less that of column i, both in
    // fp64: summed over the later tokens most of it cancels, and a token that forgets much multiplies the rest by its large
    // dt. The columns of M ∘ dy xᵀ are also part of dx.
    for (Index i = 0; i < size; ++i) {
      T* values = dmatrix + i * pitch;
      const T own = values[i];
      for (Index j = i; j < round_up(i + 1, kLanes<T>); ++j) values[j] = 0;
      DoubleSums<T> total;
      for (Index j = 0; j < i; j += kLanes<T>) {
        const Vector<T> value = load(values + j);
        store(dscores + i * pitch + j,
              load(dscores + i * pitch + j) + value * load(dt + j) * load(between + i * pitch + j));
        total.add(value * load(matrix + i * pitch + j), dt_double + j, column + j);
      }
      dscores[i * pitch + i] += own * dt[i];
      through_x[i] = static_cast<double>(own * matrix[i * pitch + i]);
      dlog[i] = total.sum();
    }

    // dC from the entrance, by columns: S dyᵀ e^s.
    state_left.rows(N, P, state, P);
    dy_exact.columns(P, size, dy, P);
    W::ExactLeft::run(N, columns, P, state_left, dy_exact, projected, pitch);
    add_projected(columns, decay.entrance, common.C_columns + s.columns(b, g, c), dC);
    for (Index i = 0; i < size; ++i) dlog[i] += static_cast<double>(decay.entrance[i]) * static_cast<double>(told[i]);

    // dB from the end, by columns: dS' xᵀ dt e^(s_Q - s). Token i passes to the end state the state at the
    // entrance and the tokens before i. (The end state less what i and later tokens added would be equal, but if little is
    // left, the difference is mostly rounding.)
    for (Index i = 0; i < columns; ++i) factor[i] = dt[i] * decay.end[i];
    state_left.rows(N, P, dstate, P);
    x_exact.columns(P, size, x, P);
    W::ExactLeft::run(N, columns, P, state_left, x_exact, projected, pitch);
    add_projected(columns, factor, common.B_columns + s.columns(b, g, c), dB);
    double passed = static_cast<double>(decay.through) * dot(N * P, dstate, state);
    for (Index i = 0; i < size; ++i) {
      kept[i] = passed;
      const double back = static_cast<double>(decay.end[i]) * static_cast<double>(told[i]);
      passed += dt_double[i] * back;
      through_x[i] += column[i] + back;
    }

    // dx̃ = Mᵀ dy + e^(s_Q - s) B dS'.
    dstate_right.rows(N, P, dstate, P);
    M_left.columns(size, size, matrix, pitch);
    dy_right.rows(size, P, dy, P);
    from_state_and_chunk<typename W::Rounded, Where::kUpper>(s, size, B_left, dstate_right, decay.end, M_left, dy_right,
                                                             dweighted);

    // dS = e^(s_Q) dS' + Σ_i e^(s_i) C_i dy_iᵀ.
    scale_rows(size, P, decay.entrance, dy, weighted);
    weighted_right.rows(size, P, weighted, P);
    W::ExactRight::run(N, P, size, C_exact, weighted_right, dstate, P, {dstate, P, decay.through});

    // dx, dD, and from ds (summed from the end of the chunk) ddt and dA.
    double later = 0;
    DoubleSums<T> through_D;
    for (Index i = size - 1; i >= 0; --i) {
      X* dx = out.dx + (token + i) * out.dx_t + h * P;
      Vector<T> through_skip{};
      for (Index p = 0; p < P; p += kLanes<T>) {
        const Vector<T> gradient = load(dy + i * P + p);
        through_skip += gradient * load(x + i * P + p);
        narrow(dx + p, dt[i] * load(dweighted + i * P + p) + skip * gradient);
      }
      later += dlog[i] - dt_double[i] * column[i];
      // Such a decay lets less than a rounding pass; a difference of sums would add their rounding, times dt.
      const double moved = decay.rate[i] < -40 ? 0.0 : later + kept[i];
      out.ddt[(token + i) * s.heads + h] = static_cast<T>(static_cast<double>(A) * moved + through_x[i]);
      out.dA[task] += dt_double[i] * moved;
      through_D.add(through_skip);
    }
    out.dD[task] += through_D.sum();
  }

  // target_ni += by_i projected_ni, and told_i = Σ_n projected_ni with_ni.
  void add_projected(Index columns, const T* by, const T* with, T* target) const {
    Index i = 0;
    for (; i + 4 * kLanes<T> <= columns; i += 4 * kLanes<T>) add_columns<4>(i, by, with, target);
    for (; i < columns; i += kLanes<T>) add_columns<1>(i, by, with, target);
  }

  // A number of vectors of columns of all rows, contiguous.
  template <int Vectors>
  void add_columns(Index i, const T* by, const T* with, T* target) const {
    constexpr Index kRows = 16;  // which N is a multiple of; sums of few terms lose less
    Vector<T> total[Vectors] = {};
    for (Index n = 0; n < N; n += kRows) {
      Vector<T> sums[Vectors] = {};
      for (Index at = n * pitch + i; at < (n + kRows) * pitch; at += pitch)
        for (int w = 0; w < Vectors; ++w) {
          const Index place = at + w * kLanes<T>;
          const Vector<T> value = load(projected + place);
          sums[w] += value * load(with + place);
          store(target + place, load(target + place) + load(by + i + w * kLanes<T>) * value);
        }
      for (int w = 0; w < Vectors; ++w) total[w] += sums[w];
    }
    for (int w = 0; w < Vectors; ++w) store(told + i + w * kLanes<T>, total[w]);
  }
};

// Products and memory of the last step.
template <class W, class T>
struct FinishRoom {
  T* rows;
  typename W::Rounded::Left left;
  typename W::Rounded::Right right;
  FinishRoom(Scratch& scratch, const Shape& s)
      : rows(scratch.take<T>(s.rows_up() * s.state)), left(scratch, s.chunk, s.pitch()),
        right(scratch, s.chunk, s.state) {}
};

// dB and dC of a chunk: the slices' sums, and the part from d(C Bᵀ).
template <class W, class T, class X>
void finish(const Shape& s, const Arrays<T, X>& in, const Gradients<T, X>& out, const Shared<T>& shared,
            const Common<T>& common, Index b, Index g, Index c, FinishRoom<W, T>& room) {
  const Index Q = s.chunk, N = s.state, pitch = s.pitch(), begin = c * Q, size = std::min(Q, s.tokens - begin);
  const Index group = b * s.groups + g, groups = s.batch * s.groups;
  const auto sum_slices = [&](T* first, Index count, Index apart) {
    for (Index slice = 1; slice < shared.slices; ++slice)
      for (Index i = 0; i < count; i += kLanes<T>) store(first + i, load(first + i) + load(first + slice * apart + i));
  };
  T* dscores = shared.dscores + (group * s.chunks() + c) * Q * pitch;
  sum_slices(dscores, size * pitch, groups * s.chunks() * Q * pitch);
  const Documents documents(in.document, s, b, begin);
  for (Index i = 0; i < size; ++i) {
    T* row = dscores + i * pitch;
    for (Index j = i + 1; j < pitch; ++j) row[j] = 0;
    if (documents.number != nullptr)
      for (Index j = 0; j < i; ++j)
        if (!documents.same(i, j)) row[j] = 0;
  }
  const auto put = [&](T* columns, const T* with, X* target, auto&& product) {
    sum_slices(columns, N * pitch, groups * s.chunks() * N * pitch);
    transpose(N, size, columns, pitch, room.rows, N);
    room.right.rows(size, N, with, N);
    product(Addend<T>{room.rows, N, T(1)});
    for (Index i = 0; i < size; ++i)
      for (Index n = 0; n < N; n += kLanes<T>) narrow(target + i * out.dB_t + n, load(room.rows + i * N + n));
  };
  const Index from = s.columns(b, g, c), to = (b * s.tokens + begin) * out.dB_t + g * N;
  put(shared.dC + from, common.B + s.rows(b, g, c), out.dC + to, [&](const Addend<T>& sums) {
    room.left.rows(size, size, dscores, pitch);
    W::Rounded::template run<Where::kLower>(size, N, size, room.left, room.right, room.rows, N, sums);
  });
  put(shared.dB + from, common.C + s.rows(b, g, c), out.dB + to, [&](const Addend<T>& sums) {
    room.left.columns(size, size, dscores, pitch);
    W::Rounded::template run<Where::kUpper>(size, N, size, room.left, room.right, room.rows, N, sums);
  });
}

template <class W, class T, class X>
int backward(const Shape& s, const Arrays<T, X>& in, const Gradients<T, X>& out, const Shared<T>& shared,
             const Common<T>& common, int threads) {
  int status = make_common<W>(s, in, common, threads);
  if (status != kOk) return status;
  const Index groups = s.batch * s.groups, heads = s.heads / s.groups;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : status)
  for (Index task = 0; task < groups * shared.slices; ++task) {
    [[maybe_unused]] const typename W::Session session;
    const Index slice = task / groups, b = task % groups / s.groups, g = task % s.groups;
    const Index columns = s.chunks() * s.state * s.pitch(), scores = s.chunks() * s.chunk * s.pitch();
    const Index at = slice * groups + b * s.groups + g;
    std::memset(shared.dB + at * columns, 0, sizeof(T) * columns);
    std::memset(shared.dC + at * columns, 0, sizeof(T) * columns);
    std::memset(shared.dscores + at * scores, 0, sizeof(T) * scores);
    const Index first = heads * slice / shared.slices, last = heads * (slice + 1) / shared.slices;
    const Index together = std::min(kTogether, last - first);
    auto work = thread_scratch().template lay_out<Backward<W, T, X>>(s, in, out, shared, common, together);
    if (!work) {
      status = kNoMemory;
      continue;
    }
    for (Index h = first; h < last; h += kTogether)
      work->run(b, g * heads + h, g * heads + std::min(last, h + kTogether), slice);
  }
  if (status != kOk) return status;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : status)
  for (Index task = 0; task < groups * s.chunks(); ++task) {
    [[maybe_unused]] const typename W::Session session;
    auto room = thread_scratch().template lay_out<FinishRoom<W, T>>(s);
    if (!room) {
      status = kNoMemory;
      continue;
    }
    const Index c = task % s.chunks(), g = task / s.chunks() % s.groups, b = task / s.chunks() / s.groups;
    finish<W>(s, in, out, shared, common, b, g, c, *room);
  }
  return status;
}

// In their type in memory.
template <class X>
Arrays<Real, X> arrays(const SsdInputs& in) {
  const auto of = [](const void* p) { return static_cast<const X*>(p); };
  return {of(in.x), of(in.B), of(in.C), in.dt, in.A, in.D, in.initial, in.document, in.entrances};
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(ssd_forward, SsdForward) {
  using namespace taipan;
  const Shape s{call->sizes};
  if (!s.fits()) return kUnsupported;
  return with_element<Real>(s.narrow, [&]<class X>() {
    return with_products<Real, X>([&]<class W>() {
      const SsdInputs& in = call->inputs;
      return forward<W>(s, arrays<X>(in), {in.scores, in.B_rows, in.C_rows, nullptr, nullptr}, static_cast<X*>(call->y),
                        call->final, threads);
    });
  });
}

TAIPAN_FUNCTION(ssd_backward, SsdBackward) {
  using namespace taipan;
  const Shape s{call->sizes};
  if (!s.fits()) return kUnsupported;
  return with_element<Real>(s.narrow, [&]<class X>() {
    const SsdInputs& in = call->inputs;
    const Gradients<Real, X> out{
        static_cast<const X*>(call->dy), call->dfinal, static_cast<X*>(call->dx), static_cast<X*>(call->dB),
        static_cast<X*>(call->dC),       call->dy_t,   call->dx_t,                call->dB_t,
        call->ddt,                       call->dinitial, call->dA,              call->dD};
    return with_products<Real, X>([&]<class W>() {
      return backward<W>(s, arrays<X>(in), out, {call->slices_dB, call->slices_dC, call->slices_dscores, call->slices},
                         {in.scores, in.B_rows, in.C_rows, call->B_columns, call->C_columns}, threads);
    });
  });
}
