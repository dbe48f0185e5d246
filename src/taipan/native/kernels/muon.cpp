// A step of Muon for matrices that the caches hold (training/step/muon.py says what it is), each by one thread.
//
// Of a matrix and its transpose the iteration takes the wider one, X (m, n): G = X Xᵀ, P = b G + c G G, X ← a X + P X.
// G and P are symmetric: of their products only what lies below the diagonal is computed. Where products round their
// operands to bfloat16, X and G are rounded once, also where they are added: the polynomial of a rounded matrix loses less
// than one of a matrix and its rounding.
#include <algorithm>

#include "interface.h"
#include "products.h"

namespace taipan {
namespace {

// As torch.lerp.
template <class V, class T>
inline V between(V from, V to, T weight) {
  return weight < T(0.5) ? from + weight * (to - from) : to - (to - from) * (T(1) - weight);
}

// Of one matrix: m ≤ n, the pitches of their rows, and memory.
template <class T, class Product>
struct Room {
  Index m, n, side, width;
  T *x, *next, *gram, *polynomial, *upright;
  typename Product::Left wide_left, square_left;
  typename Product::Right wide_columns, square_right, wide_right;

  Room(Scratch& scratch, const MuonMatrix& matrix)
      : m(std::min(matrix.rows, matrix.columns)), n(std::max(matrix.rows, matrix.columns)), side(round_up(m, 16)),
        width(round_up(n, 16)), x(scratch.take<T>(side * width)), next(scratch.take<T>(side * width)),
        gram(scratch.take<T>(side * side)), polynomial(scratch.take<T>(side * side)),
        upright(scratch.take<T>(matrix.rows > matrix.columns ? n * side : 0)), wide_left(scratch, m, n),
        square_left(scratch, m, m), wide_columns(scratch, n, m), square_right(scratch, m, side),
        wide_right(scratch, m, width) {}

  // Above the diagonal what is below it. Blocks of 16 on the diagonal are whole.
  void mirror(T* square) const {
    for (Index i = 0; i + 16 < m; i += 16)
      transpose(m - i - 16, Index(16), square + (i + 16) * side + i, side, square + i * side + i + 16, side);
  }

  static void round(T* values, Index count, T factor = 1) {
    for (Index at = 0; at < count; at += kLanes<T>) {
      const Vector<T> value = factor * load(values + at);
      store(values + at, std::is_same_v<Product, PlainProduct<T>> ? value : to_bfloat16(value));
    }
  }

  void iterate(const Muon& call) {
    const T a = call.a, b_of_c = call.b / call.c, c = call.c;
    wide_left.rows(m, n, x, width);
    wide_columns.columns(n, m, x, width);
    Product::template run<Where::kResultLower>(m, side, n, wide_left, wide_columns, gram, side);
    mirror(gram);
    round(gram, m * side);
    square_left.rows(m, m, gram, side);
    square_right.rows(m, side, gram, side);
    Product::template run<Where::kResultLower>(m, side, m, square_left, square_right, polynomial, side,
                                               {gram, side, b_of_c});
    mirror(polynomial);
    round(polynomial, m * side, c);
    square_left.rows(m, m, polynomial, side);
    wide_right.rows(m, width, x, width);
    Product::run(m, width, m, square_left, wide_right, next, width, {x, width, a});
    round(next, m * width);
    std::swap(x, next);
  }
};

// Moves the momentum; the Nesterov direction, each row filled up with zeros. Returns its sum of squares.
template <class T>
double direction(const MuonMatrix& matrix, T keep, T* to, Index pitch) {
  double squares = 0;
  for (Index r = 0; r < matrix.rows; ++r, to += pitch) {
    const T* gradient = matrix.gradient + r * matrix.columns;
    T* momentum = matrix.momentum + r * matrix.columns;
    Vector<T> sums{};
    Index c = 0;
    for (; c + kLanes<T> <= matrix.columns; c += kLanes<T>) {
      const Vector<T> own = load(gradient + c), moved = between(load(momentum + c), own, T(1) - keep);
      store(momentum + c, moved);
      const Vector<T> value = between(own, moved, keep);
      store(to + c, value);
      sums += value * value;
    }
    squares += sum<T>(sums);
    for (; c < matrix.columns; ++c) {
      momentum[c] = between(momentum[c], gradient[c], T(1) - keep);
      to[c] = between(gradient[c], momentum[c], keep);
      squares += static_cast<double>(to[c]) * to[c];
    }
    std::fill(to + c, to + pitch, T(0));
  }
  return squares;
}

template <class T, class Product>
void step(const Muon& call, const MuonMatrix& matrix, Room<T, Product>& room) {
  const bool tall = matrix.rows > matrix.columns;
  T* given = tall ? room.upright : room.x;
  const Index pitch = tall ? room.side : room.width;
  const double squares = direction(matrix, static_cast<T>(call.keep), given, pitch);
  const T scale = static_cast<T>(1.0 / std::max(std::sqrt(squares), 1e-7));
  room.round(given, matrix.rows * pitch, scale);
  if (tall) transpose(room.n, room.m, given, pitch, room.x, room.width);
  for (Index n = 0; n < call.iterations; ++n) room.iterate(call);
  if (tall) transpose(room.m, room.n, room.x, room.width, given, pitch);
  const T* result = tall ? given : room.x;
  const T shrink = static_cast<T>(call.shrink), rate = static_cast<T>(matrix.rate);
  for (Index r = 0; r < matrix.rows; ++r)
    for (Index c = 0; c < matrix.columns; ++c) {
      T& parameter = matrix.parameter[r * matrix.columns + c];
      parameter = parameter * shrink - rate * result[r * pitch + c];
    }
}

template <class W>
int step_all(const Muon& call, int threads) {
  int status = kOk;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : status)
  for (Index n = 0; n < call.count; ++n) {
    [[maybe_unused]] const typename W::Session session;
    auto room = thread_scratch().template lay_out<Room<Real, typename W::Rounded>>(call.matrices[n]);
    if (room)
      step(call, call.matrices[n], *room);
    else
      status = kNoMemory;
  }
  return status;
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(muon, Muon) {
  using namespace taipan;
  return with_products<Real, Bfloat16>([&]<class W>() { return step_all<W>(*call, threads); });
}
