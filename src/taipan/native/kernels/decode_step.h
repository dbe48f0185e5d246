// Shared by the layers of a decoding step: sizes, the rows that get a token, results that all threads read, the team of
// threads, and products with rows split over the threads.
#pragma once

#include <optional>

#include "rows.h"
#include "team.h"

namespace taipan {

constexpr Index kKeys = 64;  // of an attention at once

// Memory of one thread.
template <class T>
struct Own {
  T *x, *chosen, *room, *weight, *margin, *strength, *attended, *entries, *gate;
  Index* asked;
  Team::Member me;
};

template <class T>
struct Step {
  const DecodeSizes& s;
  const std::int64_t* rows;
  Index count;
  const std::int64_t *position, *behind;
  Index most_behind;
  Index longest, in, widest;
  std::optional<Team> team;
  T *h = nullptr, *wide = nullptr, *y = nullptr, *squares = nullptr;  // by all threads: residual stream, results
  T *repeated = nullptr, *follower = nullptr;  // by gates that recall: (count, 2 O) and (count, D)

  explicit Step(const Decode& call)
      : s(call.sizes), rows(call.rows), count(call.count), position(call.position), behind(call.behind),
        most_behind(call.most_behind) {
    const Index query = s.query_heads * s.width, key = s.key_heads * s.width;
    longest = std::max({s.hidden * (1 + s.lookahead), s.inner, s.intermediate, query});
    in = 2 * s.inner + 2 * s.groups * s.state + s.heads;
    widest = std::max({s.hidden, in, 2 * s.intermediate, query + 2 * key});
  }

  // Tokens that the recurrent states of one of the `count` rows are behind.
  Index behind_of(Index i) const { return behind[rows[i]]; }

  bool reserve(Scratch& scratch, Index threads) {
    const Index sizes[] = {count * s.hidden,     count * widest,        count * longest,
                           count * s.heads, count * 2 * s.orders, s.orders > 0 ? count * s.hidden : 0};
    std::size_t bytes = Scratch::bytes<char>(Team::bytes(threads));
    for (const Index size : sizes) bytes += Scratch::bytes<T>(size);
    if (!scratch.reserve(bytes)) return false;
    h = scratch.take<T>(sizes[0]);
    wide = scratch.take<T>(sizes[1]);
    y = scratch.take<T>(sizes[2]);
    squares = scratch.take<T>(sizes[3]);
    repeated = scratch.take<T>(sizes[4]);
    follower = scratch.take<T>(sizes[5]);
    team.emplace(threads, scratch.take<char>(Team::bytes(threads)));
    return true;
  }

  bool reserve(Scratch& scratch, Part part, Own<T>& own) const {
    const Index shared = s.key_heads == 0 ? 0 : s.query_heads / s.key_heads;
    const Index sizes[] = {count * longest,
                           count * s.hidden,
                           room_of(count, longest),
                           count,
                           shared * (2 * s.width + 2 + kKeys),
                           s.lookahead > 0 ? count * s.hidden * (1 + s.lookahead) : 0,
                           s.hidden + 2 * s.orders + s.rank + s.gate_hidden,
                           count,
                           count};
    std::size_t bytes = Scratch::bytes<Index>(count);
    for (const Index size : sizes) bytes += Scratch::bytes<T>(size);
    if (!scratch.reserve(bytes)) return false;
    own.x = scratch.take<T>(sizes[0]);
    own.chosen = scratch.take<T>(sizes[1]);
    own.room = scratch.take<T>(sizes[2]);
    own.weight = scratch.take<T>(sizes[3]);
    own.attended = scratch.take<T>(sizes[4]);
    own.entries = scratch.take<T>(sizes[5]);
    own.gate = scratch.take<T>(sizes[6]);
    own.margin = scratch.take<T>(sizes[7]);
    own.strength = scratch.take<T>(sizes[8]);
    own.asked = scratch.take<Index>(count);
    own.me.part = part;
    return true;
  }

  void embed(const Matrix& embedding, const std::int64_t* tokens) {
    for (Index i = 0; i < count; ++i) embed(embedding, tokens[rows[i]], h + i * s.hidden);
  }

  void embed(const Matrix& embedding, std::int64_t token, T* to) const {
    const Index at = token * s.hidden;
    if (s.embedding_format == kInt4)
      unpack_row(Tiles(embedding), token, to);
    else if (s.embedding_format == kBfloat16)
      widen_row(s.hidden, static_cast<const std::uint16_t*>(embedding.weight) + at, to);
    else
      widen_row(s.hidden, static_cast<const T*>(embedding.weight) + at, to);
  }

  static constexpr Index kPiece = 32768;  // bytes of a matrix

  // Rows of a matrix times `count` vectors, split over the threads; then f(begin, end) with the rows each has done.
  template <class F>
  void product(const Matrix& m, const T* x, Index x_row, Index count, Own<T>& own, const Target<T>& target, F&& f) {
    if (count == 0) return;  // no gate is open, for all threads alike
    const auto share = [&](const auto& rows) {
      team->share(own.me, m.rows, grain_of(m, own), [&](Index begin, Index end) {
        product_of(rows, m, begin, end, count, target);
        f(begin, end);
      });
    };
    with_format(m, x, x_row, count, own.room, share);
  }

  void product(const Matrix& m, const T* x, Index x_row, Index count, Own<T>& own, const Target<T>& target) {
    product(m, x, x_row, count, own, target, [](Index, Index) {});
  }

  template <class F>
  void with_format(const Matrix& m, const T* x, Index x_row, Index count, T* room, F&& f) const {
    if (s.format == kReal)
      with_rows<T, T>(m, x, x_row, count, s.rounds, room, f);
    else if (s.format == kBfloat16)
      with_rows<T, std::uint16_t>(m, x, x_row, count, s.rounds, room, f);
    else if (s.format == kInt8)
      with_rows<T, std::int8_t>(m, x, x_row, count, s.rounds, room, f);
    else
      with_tiles(m, x, x_row, count, room, f);
  }

  // Rows per piece of a thread: long enough for sequential reading, short enough for an even split.
  Index grain_of(const Matrix& m, const Own<T>& own) const {
    const Index size = s.format == kReal ? sizeof(T) : s.format == kBfloat16 ? 2 : 1;
    const Index bytes = s.format == kInt4 ? m.columns / 2 : m.columns * size;
    const Index rows = std::min(kPiece / std::max<Index>(1, bytes), m.rows / (4 * own.me.part.count));
    return std::max<Index>(rows / kPanel, 1) * kPanel;
  }

  void normalise(const T* weight, T* x) const {
    for (Index i = 0; i < count; ++i) {
      const T* row = h + i * s.hidden;
      Vector<T> squares{};
      for (Index c = 0; c < s.hidden; c += kLanes<T>) {
        const Vector<T> value = load_some(row + c, s.hidden - c);
        squares += value * value;
      }
      const T scale = scale_of(sum<T>(squares), s.hidden);
      for (Index c = 0; c < s.hidden; c += kLanes<T>) {
        const Index n = s.hidden - c;
        store_some(x + i * s.hidden + c, scale * load_some(row + c, n) * load_some(weight + c, n), n);
      }
    }
  }

  T scale_of(T squares, Index n) const {
    return static_cast<T>(1.0 / std::sqrt(static_cast<double>(squares) / n + s.eps));
  }
};

}  // namespace taipan
