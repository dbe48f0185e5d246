// Softmax attention of gathered queries in a sliding window, forward and backward, in blocks of queries and of keys.
//
// The queries of a block (and the heads that share a key) are the columns of all products, one lane each: scores are
// K Qᵀ, outputs are Vᵀ P. So keys and values are read row by row in memory order, the softmax of a query stays in its
// lane, and only the queries are transposed. Keys are taken block by block with the maximum so far (the online
// softmax of Milakov & Gimelshein 2018, in blocks as in Dao et al. 2022): no matrix of queries by keys exists. The
// backward computes the scores again.
//
// A query may attend a range [first, stop) of the present keys of its row. The ranges are found once, and absent keys are
// in none, so a mask is two comparisons, needed only in tiles at the edge of a range. Where keys leave one by one, each has
// the number of the first query that does not see it any more: a third comparison, in all tiles; a block of queries takes
// only those keys that its first query may still see.
#include <algorithm>
#include <limits>
#include <utility>

#include "interface.h"
#include "operands.h"

namespace taipan {
namespace {

constexpr Index kColumns = 64;         // of a block, unless more heads share a key
constexpr Index kMultiple = 16;        // of columns, which every vector width divides
constexpr Index kForwardKeys = 128;    // of a block
constexpr Index kForwardBlocks = 4;    // of queries, for which keys are gathered once
constexpr Index kBackwardKeys = 256;

struct Shape : AttentionSizes {
  Index shared() const { return heads / groups; }
  Index block() const { return std::max<Index>(1, kColumns / shared()); }  // queries
  Index blocks() const { return (queries + block() - 1) / block(); }
  Index columns() const { return round_up(block() * shared(), kMultiple); }
  Index pitch() const { return round_up(width, kMultiple); }
  bool fits() const {
    return groups > 0 && heads > 0 && heads % groups == 0 && known_blocks == blocks() && known_columns == columns();
  }
  Index panel(Index b, Index g, Index block) const { return (b * groups + g) * blocks() + block; }
};

// Keys of a block of queries: the range that any of them has; the number of its first slice of keys, and of the first
// part of its gradient within its row.
struct Bounds {
  std::int32_t lowest, highest, slice, part;
  bool meets(Index begin, Index end) const { return lowest < end && highest > begin; }
};

// Per row of the batch: indices of the present keys, of the queries that see any, and each query's range of keys.
struct Plan {
  std::int32_t *key, *query, *first, *stop;
  std::int32_t* counts;  // (B, 3): such keys and queries, and parts of their gradients
  Bounds* bounds;        // (B, blocks)
  std::int32_t* until;   // number of the first query that does not see a key any more; null: no key leaves by itself

  // Whether all its indices lie inside the tensors.
  bool in_range(const Shape& s) const {
    const auto below = [](const std::int32_t* of, Index count, Index most) {
      return std::all_of(of, of + count, [&](std::int32_t at) { return at >= 0 && at < most; });
    };
    for (Index b = 0; b < s.batch; ++b) {
      if (keys(b) < 0 || keys(b) > s.keys || queries(b) < 0 || queries(b) > s.queries) return false;
      if (!below(key + b * s.keys, keys(b), s.keys) || !below(query + b * s.queries, queries(b), s.queries)) return false;
      if (!below(first + b * s.queries, queries(b), keys(b) + 1) || !below(stop + b * s.queries, queries(b), keys(b) + 1))
        return false;
    }
    return true;
  }

  Index keys(Index b) const { return counts[3 * b]; }
  Index queries(Index b) const { return counts[3 * b + 1]; }
  Index blocks(const Shape& s, Index b) const { return (queries(b) + s.block() - 1) / s.block(); }

  // Where a slice of the keys begins: at a block of them.
  Index slice(const Shape& s, Index b, Index number) const {
    const Index all = (keys(b) + kBackwardKeys - 1) / kBackwardKeys;
    return std::min(keys(b), all * number / s.slices * kBackwardKeys);
  }
  bool meets(const Shape& s, Index b, Index block, Index number) const {
    return bounds[b * s.blocks() + block].meets(slice(s, b, number), slice(s, b, number + 1));
  }
  // A block of queries uses consecutive slices (except empty ones), and so do its parts.
  Index part(const Shape& s, Index b, Index g, Index block, Index number) const {
    const Bounds& own = bounds[b * s.blocks() + block];
    Index at = own.part + number - own.slice;
    for (Index row = 0; row < b; ++row) at += counts[3 * row + 2];
    return at * s.groups + g;
  }
};

void make_plan(const Shape& s, const std::int64_t* low, const std::int64_t* high, const std::int64_t* code,
               const std::int64_t* until, const Plan& plan, Index b) {
  std::int32_t* key = plan.key + b * s.keys;
  const std::int64_t* codes = code + b * s.keys;
  Index keys = 0;
  for (Index j = 0; j < s.keys; ++j)
    if (codes[j] >= 0) key[keys++] = static_cast<std::int32_t>(j);
  // The first present key with a code of at least the bound; bounds grow, so the search continues where it stopped.
  const auto find = [&](std::int64_t bound, Index& at) {
    if (at > 0 && codes[key[at - 1]] >= bound)
      at = std::lower_bound(key, key + at, bound, [&](std::int32_t j, std::int64_t c) { return codes[j] < c; }) - key;
    while (at < keys && codes[key[at]] < bound) ++at;
    return static_cast<std::int32_t>(at);
  };
  Index count = 0, from = 0, to = 0;
  const Index at = b * s.queries;
  for (Index i = 0; i < s.queries; ++i) {
    if (high[at + i] < low[at + i]) continue;
    const std::int32_t first = find(low[at + i], from), stop = find(high[at + i] + 1, to);
    if (stop <= first) continue;
    plan.query[at + count] = static_cast<std::int32_t>(i);
    plan.first[at + count] = first;
    plan.stop[at + count] = stop;
    Bounds& bounds = plan.bounds[b * s.blocks() + count / s.block()];
    if (count % s.block() == 0) bounds = {first, stop, 0, 0};
    bounds = {std::min(bounds.lowest, first), std::max(bounds.highest, stop), 0, 0};
    ++count;
  }
  for (Index j = 0; plan.until != nullptr && j < keys; ++j) {
    const std::int32_t* query = plan.query + at;
    const auto before = [&](std::int32_t i, std::int64_t c) { return high[at + i] < c; };
    const auto leaves = std::lower_bound(query, query + count, until[b * s.keys + key[j]], before);
    plan.until[b * s.keys + j] = static_cast<std::int32_t>(leaves - query);
  }
  plan.counts[3 * b] = static_cast<std::int32_t>(keys);
  plan.counts[3 * b + 1] = static_cast<std::int32_t>(count);
  std::int32_t parts = 0;
  for (Index block = 0; block < plan.blocks(s, b); ++block) {
    Bounds& bounds = plan.bounds[b * s.blocks() + block];
    std::int32_t begin = 0, end = static_cast<std::int32_t>(s.slices);
    while (!plan.meets(s, b, block, begin)) ++begin;
    while (!plan.meets(s, b, block, end - 1)) --end;
    bounds.slice = begin;
    bounds.part = parts;
    parts += end - begin;
  }
  plan.counts[3 * b + 2] = parts;
}

template <class T, class W>
inline void narrow_row(Index width, const T* from, W* to) {
  Index e = 0;
  for (; e + kLanes<T> <= width; e += kLanes<T>) narrow(to + e, load(from + e));
  for (; e < width; ++e) to[e] = narrow_one<W>(from[e]);
}

// A contiguous copy of rows of keys or values: in place they may share few sets of the cache.
template <class Matrix, class W>
void gather(const Shape& s, const Index* stride, const W* from, const std::int32_t* place, Index b, Index g, Index count,
            const Matrix& to) {
  for (Index j = 0; j < count; ++j)
    to.set(j, s.width, from + b * stride[0] + place[j] * stride[1] + g * stride[2], 1);
}

// Rows that will be gathered next, into the second cache: they lie too far apart for the processor to foresee them.
template <class W>
void fetch(const Shape& s, const Index* stride, const W* from, const std::int32_t* place, Index b, Index g, Index count) {
  constexpr Index kLine = 64 / sizeof(W);
  for (Index j = 0; j < count; ++j) {
    const W* row = from + b * stride[0] + place[j] * stride[1] + g * stride[2];
    for (Index e = 0; e < s.width; e += kLine) __builtin_prefetch(row + e, 0, 2);
  }
}

// One block of queries.
template <class T>
struct Columns {
  using Integer = typename Simd<T>::Integer;
  using Number = std::conditional_t<std::is_same_v<T, float>, std::int32_t, std::int64_t>;
  const Shape& s;
  const Plan& plan;
  Index b, g, begin, queries;
  Bounds bounds;
  const std::int32_t* until;

  Columns(const Shape& s, const Plan& plan, Index b, Index g, Index block)
      : s(s), plan(plan), b(b), g(g), begin(block * s.block()),
        queries(std::min(s.block(), plan.queries(b) - begin)), bounds(plan.bounds[b * s.blocks() + block]),
        until(plan.until == nullptr ? nullptr : plan.until + b * s.keys) {}

  // Whether its queries may see any of some keys.
  bool meets(Index from, Index to) const {
    if (!bounds.meets(from, to)) return false;
    return until == nullptr || std::any_of(until + from, until + to, [&](std::int32_t at) { return at > begin; });
  }


  // Calls f(column, row) for the rows of a tensor that belong to the columns.
  template <class W, class F>
  void each(const Index* stride, W* tensor, F&& f) const {
    const std::int32_t* place = plan.query + b * s.queries + begin;
    for (Index i = 0; i < queries; ++i)
      for (Index r = 0; r < s.shared(); ++r)
        f(i * s.shared() + r, tensor + b * stride[0] + place[i] * stride[1] + (g * s.shared() + r) * stride[2]);
  }

  // The columns as rows (columns, pitch), times a factor; and transposed (width, columns).
  template <class W, class Matrix>
  void read(const Index* stride, const W* tensor, T factor, const Matrix& rows, const Matrix& transposed) const {
    each(stride, tensor, [&](Index column, const W* row) { rows.set(column, s.width, row, factor); });
    rows.clear(queries * s.shared(), s.columns());
    transposed.set_transposed(rows, s.columns(), s.width);
  }

  // Of the columns: ranges of keys, empty where there is no query, and the number of the query. Of each vector of columns:
  // the range of keys that all its queries have.
  struct Runs {
    Number *first, *stop, *query, *latest, *earliest;
    Runs(Scratch& scratch, Index columns)
        : first(scratch.take<Number>(columns)), stop(scratch.take<Number>(columns)), query(scratch.take<Number>(columns)),
          latest(scratch.take<Number>(columns / kLanes<T>)), earliest(scratch.take<Number>(columns / kLanes<T>)) {}
  };

  void read_runs(const Runs& runs) const {
    const Index at = b * s.queries + begin;
    for (Index column = 0; column < s.columns(); ++column) {
      const bool used = column < queries * s.shared();
      runs.first[column] = used ? plan.first[at + column / s.shared()] : 0;
      runs.stop[column] = used ? plan.stop[at + column / s.shared()] : 0;
      runs.query[column] = static_cast<Number>(begin + column / s.shared());
    }
    const Index all = queries * s.shared();
    for (Index column = 0; column < s.columns(); column += kLanes<T>) {
      const Index end = std::max(column, std::min(column + kLanes<T>, all));
      Number &latest = runs.latest[column / kLanes<T>], &earliest = runs.earliest[column / kLanes<T>];
      latest = 0, earliest = std::numeric_limits<Number>::max();
      for (Index at = column; at < end; ++at) {
        latest = std::max(latest, runs.first[at]);
        earliest = std::min(earliest, runs.stop[at]);
      }
    }
  }

  // Whether the queries of a vector of columns see all of some keys.
  bool all_see(Index from, Index to, const Runs& runs, Index column) const {
    return until == nullptr && runs.latest[column / kLanes<T>] <= from && to <= runs.earliest[column / kLanes<T>];
  }

  // Columns with queries, rounded up to whole vectors.
  Index used() const { return round_up(queries * s.shared(), kMultiple); }

  // The range of vectors of columns that see any of some keys: queries far apart share few keys.
  std::pair<Index, Index> seeing(Index begin, Index end, const Runs& runs) const {
    Index from = 0, to = queries * s.shared();
    while (from < to && !(runs.first[from] < end && runs.stop[from] > begin)) ++from;
    while (from < to && !(runs.first[to - 1] < end && runs.stop[to - 1] > begin)) --to;
    return {from / kLanes<T> * kLanes<T>, round_up(to, kLanes<T>)};
  }

  static Integer numbers(const Number* p) {
    Integer loaded;
    std::memcpy(&loaded, p, sizeof loaded);
    return loaded;
  }

  // Which lanes from a column on see a key.
  Integer see(Index key, const Runs& runs, Index column) const {
    const Number number = static_cast<Number>(key);
    const Integer inside = (numbers(runs.first + column) <= number) & (numbers(runs.stop + column) > number);
    return until == nullptr ? inside : inside & (numbers(runs.query + column) < static_cast<Number>(until[key]));
  }
};

// The keys of some queries, some at a time: those of a range, without those that the first of the queries does not see
// any more.
class Keys {
 public:
  Index count = 0;
  const std::int32_t* place = nullptr;

  Keys(const Shape& s, const Plan& plan, Index b, Index query, Index lowest, Index highest)
      : all_(plan.key + b * s.keys), until_(plan.until == nullptr ? nullptr : plan.until + b * s.keys), query_(query),
        next_(lowest), highest_(highest) {}

  bool next() {
    begin_ = next_;
    if (until_ == nullptr) {
      count = std::min<Index>(kForwardKeys, highest_ - begin_);
      place = all_ + begin_;
      next_ += kForwardKeys;
      return count > 0;
    }
    count = 0;
    for (; next_ < highest_ && count < kForwardKeys; ++next_)
      if (until_[next_] > query_) {
        numbers_[count] = static_cast<std::int32_t>(next_);
        places_[count++] = all_[next_];
      }
    place = places_;
    return count > 0;
  }

  Index number(Index j) const { return until_ == nullptr ? begin_ + j : numbers_[j]; }

  // The places of those that may be next, and how many they are.
  const std::int32_t* following() const { return all_ + next_; }
  Index many() const { return std::clamp<Index>(highest_ - next_, 0, kForwardKeys); }

  // Which of them are inside [lowest, highest), from a multiple on.
  std::pair<Index, Index> between(Index lowest, Index highest, Index multiple) const {
    Index from = 0, to = count;
    while (from < to && number(from) < lowest) ++from;
    while (from < to && number(to - 1) >= highest) --to;
    return {from - from % multiple, to};
  }

 private:
  const std::int32_t *all_, *until_;
  Index query_, next_, highest_, begin_ = 0;
  std::int32_t numbers_[kForwardKeys], places_[kForwardKeys];
};

template <class T>
inline Vector<T> larger(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

template <class T, class W>
struct Arrays {
  const W *q, *k, *v;
};

// For the backward: the largest score of each column, and one over its sum of exponentials, (2, columns).
template <class T>
inline T* statistics_of(const Shape& s, T* all, Index b, Index g, Index block) {
  return all + s.panel(b, g, block) * 2 * s.columns();
}

// 1/√E goes into the queries, or where those would be rounded, into the scores.
template <class T, class Matrix>
struct Scale {
  T of_queries = 1, of_scores = 1;
  explicit Scale(const Shape& s) {
    (Matrix::kRounds ? of_scores : of_queries) = static_cast<T>(1 / std::sqrt(static_cast<double>(s.width)));
  }
  template <class Tile>
  void finish(Tile& scores) const {
    if constexpr (Matrix::kRounds) scores.scale(of_scores);
  }
};

// What a block of queries of the forward keeps from keys to keys.
template <class T, class Matrix>
struct ForwardBlock {
  Matrix query;
  T *sums, *highest, *total;
  typename Columns<T>::Runs runs;
  ForwardBlock(Scratch& scratch, const Shape& s)
      : query(scratch, s.pitch(), s.columns()), sums(scratch.take<T>(s.width * s.columns())),
        highest(scratch.take<T>(s.columns())), total(scratch.take<T>(s.columns())), runs(scratch, s.columns()) {}
};

template <class T, class Matrix>
struct ForwardRoom {
  Matrix rows, key, value, weights;
  T *scores, *out, *before, *kept;
  ForwardBlock<T, Matrix> blocks[kForwardBlocks];
  ForwardRoom(Scratch& scratch, const Shape& s)
      : rows(scratch, s.columns(), s.pitch()), key(scratch, kForwardKeys, s.pitch()),
        value(scratch, kForwardKeys, s.pitch()), weights(scratch, kForwardKeys, s.columns()),
        scores(weights.wide(scratch, kForwardKeys)), out(scratch.take<T>(s.columns() * s.pitch())),
        before(scratch.take<T>(s.columns())), kept(scratch.take<T>(s.columns())),
        blocks{{scratch, s}, {scratch, s}, {scratch, s}, {scratch, s}} {}
};

// Blocks of queries that lie beside each other: the keys, of which they share most, are gathered once.
template <class T, class W>
class Forward {
  using Matrix = MatrixFor<T, W>;
  using Room = ForwardRoom<T, Matrix>;
  using Block = ForwardBlock<T, Matrix>;
  static constexpr T kNone = -std::numeric_limits<T>::infinity();

 public:
  Forward(const Shape& s, const Arrays<T, W>& in, const Plan& plan, W* out, T* statistics)
      : s_(s), in_(in), plan_(plan), out_(out), statistics_(statistics), scale_(s) {}

  int blocks(Index b, Index g, Index first, Index stop) const {
    const auto room = thread_scratch().lay_out<Room>(s_);
    if (!room) return kNoMemory;
    const Index N = s_.columns();
    std::int32_t lowest = std::numeric_limits<std::int32_t>::max(), highest = 0;
    for (Index block = first; block < stop; ++block) {
      const Columns<T> columns(s_, plan_, b, g, block);
      const Block& own = room->blocks[block - first];
      columns.read(s_.q, in_.q, scale_.of_queries, room->rows, own.query);
      columns.read_runs(own.runs);
      std::fill(own.sums, own.sums + s_.width * N, T(0));
      std::fill(own.highest, own.highest + N, kNone);
      std::fill(own.total, own.total + N, T(0));
      lowest = std::min(lowest, columns.bounds.lowest);
      highest = std::max(highest, columns.bounds.highest);
    }
    for (Keys keys(s_, plan_, b, first * s_.block(), lowest, highest); keys.next();) {
      gather(s_, s_.k, in_.k, keys.place, b, g, keys.count, room->key);
      gather(s_, s_.v, in_.v, keys.place, b, g, keys.count, room->value);
      fetch(s_, s_.k, in_.k, keys.following(), b, g, keys.many());
      fetch(s_, s_.v, in_.v, keys.following(), b, g, keys.many());
      room->value.pair_up(0, keys.count, 0, s_.pitch());
      for (Index block = first; block < stop; ++block)
        meet(Columns<T>(s_, plan_, b, g, block), keys, *room, room->blocks[block - first]);
    }
    for (Index block = first; block < stop; ++block)
      finish(Columns<T>(s_, plan_, b, g, block), statistics_of(s_, statistics_, b, g, block), *room,
             room->blocks[block - first]);
    return kOk;
  }

 private:
  // Rows of gathered keys and vectors of columns: where products are needed.
  struct Area {
    Index from, to, left, right;
  };

  // Adds what a block's queries get from some keys. (Three functions, none of them inlined: the compiler would stop to inline
  // what is inside them.)
  void meet(const Columns<T>& columns, const Keys& keys, const Room& room, const Block& own) const {
    const auto [from, to] = keys.between(columns.bounds.lowest, columns.bounds.highest, Matrix::kTogether);
    if (from >= to) return;
    const auto [left, right] = columns.seeing(keys.number(from), keys.number(to - 1) + 1, own.runs);
    const Area area{from, to, left, right};
    std::copy(own.highest + left, own.highest + right, room.before + left);
    score(area, columns, keys, room, own);
    weigh(area, room, own);
    add(area, room, own);
  }

  [[gnu::noinline]] void score(const Area& area, const Columns<T>& columns, const Keys& keys, const Room& room,
                               const Block& own) const {
    const Index N = s_.columns(), E = s_.width;
    for_tiles<T>(area.to - area.from, area.right - area.left, [&]<int R, int V>(Index row, Index column) {
      const Index j = area.from + row, c = area.left + column;
      Tile<T, R, V> tile;
      tile.clear();
      Matrix::multiply_rows(tile, 0, E, room.key, j, own.query, c);
      scale_.finish(tile);
      for (int w = 0; w < V; ++w) {
        const Index at = c + w * kLanes<T>;
        if (columns.all_see(keys.number(j), keys.number(j) + R, own.runs, at)) continue;
        for (int r = 0; r < R; ++r)
          tile.v[r][w] = columns.see(keys.number(j + r), own.runs, at) ? tile.v[r][w] : splat(kNone);
      }
      tile.put(room.scores + j * N + c, N);
      for (int w = 0; w < V; ++w) {
        Vector<T> high = load(own.highest + c + w * kLanes<T>);
        for (int r = 0; r < R; ++r) high = larger<T>(high, tile.v[r][w]);
        store(own.highest + c + w * kLanes<T>, high);
      }
    });
  }

  [[gnu::noinline]] void weigh(const Area& area, const Room& room, const Block& own) const {
    const Index N = s_.columns();
    for (Index c = area.left; c < area.right; c += kLanes<T>) {
      const Vector<T> high = load(own.highest + c);
      const Vector<T> base = high == splat(kNone) ? Vector<T>{} : high;  // no key yet
      Vector<T> summed{};
      Index j = area.from;
      for (; j + 1 < area.to; j += 2) {
        const Vector<T> p = exponential(load(room.scores + j * N + c) - base);
        const Vector<T> next = exponential(load(room.scores + (j + 1) * N + c) - base);
        summed += p;
        summed += next;
        room.weights.put_two(j, c, p, next);
      }
      if (j < area.to) {
        const Vector<T> p = exponential(load(room.scores + j * N + c) - base);
        summed += p;
        room.weights.put_two(j, c, p, Vector<T>{});
      }
      const Vector<T> factor = exponential(load(room.before + c) - base);
      store(room.kept + c, factor);
      store(own.total + c, load(own.total + c) * factor + summed);
    }
  }

  [[gnu::noinline]] void add(const Area& area, const Room& room, const Block& own) const {
    const Index N = s_.columns(), E = s_.width;
    for_tiles<T>(E, area.right - area.left, [&]<int R, int V>(Index e, Index column) {
      const Index c = area.left + column;
      Tile<T, R, V> tile;
      tile.clear();
      Matrix::multiply_columns(tile, area.from, area.to, room.value, e, room.weights, c);
      for (int w = 0; w < V; ++w) {
        const Vector<T> factor = load(room.kept + c + w * kLanes<T>);
        for (int r = 0; r < R; ++r) {
          T* at = own.sums + (e + r) * N + c + w * kLanes<T>;
          store(at, load(at) * factor + tile.v[r][w]);
        }
      }
    });
  }

  void finish(const Columns<T>& columns, T* statistics, const Room& room, const Block& own) const {
    const Index N = s_.columns(), E = s_.width, pitch = s_.pitch();
    for (Index c = 0; c < N; ++c) {
      statistics[c] = own.total[c] > 0 ? own.highest[c] : T(0);
      statistics[N + c] = own.total[c] > 0 ? 1 / own.total[c] : T(0);
    }
    transpose(E, columns.used(), own.sums, N, room.out, pitch);
    columns.each(s_.out, out_, [&](Index column, W* row) {
      T* from = room.out + column * pitch;
      for (Index e = 0; e < E; ++e) from[e] *= statistics[N + column];
      narrow_row(E, from, row);
    });
  }

  const Shape& s_;
  const Arrays<T, W>& in_;
  const Plan& plan_;
  W* out_;
  T* statistics_;
  const Scale<T, Matrix> scale_;
};

template <class T, class W>
int forward(const Shape& s, const Arrays<T, W>& in, const Plan& plan, W* out, T* statistics, int threads) {
  int status = kOk;
  const Index rows = s.batch * s.groups, tasks = (s.blocks() + kForwardBlocks - 1) / kForwardBlocks;
  const Forward<T, W> work(s, in, plan, out, statistics);
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : status)
  for (Index task = 0; task < rows * tasks; ++task) {
    // One head of keys after the other: what blocks beside each other read stays in the cache. The last queries have the
    // most keys where there is no window.
    const Index first = (tasks - 1 - task % tasks) * kForwardBlocks;
    const Index b = task / tasks / s.groups, g = task / tasks % s.groups;
    const Index stop = std::min(first + kForwardBlocks, plan.blocks(s, b));
    if (first < stop) status = std::max(status, work.blocks(b, g, first, stop));
  }
  return status;
}

template <class T, class W>
struct Gradients {
  const W *out, *dout;
  W *dq, *dk, *dv;
};

// Shared between tasks. The keys are cut into slices, whatever the number of threads; each slice sums gradients of queries
// by itself, so the order of sums is always the same.
template <class T>
struct Shared {
  T* statistics;
  T* delta;  // (B, G, blocks, columns): Σ_e dout out
  T* dq;     // (parts, width, columns)
};

template <class T, class W>
void make_delta(const Shape& s, const Gradients<T, W>& out, const Plan& plan, T* delta, Index b, Index g, Index block) {
  const Columns<T> columns(s, plan, b, g, block);
  std::fill(delta, delta + s.columns(), T(0));
  const auto inner = [&](const W* a, const W* c) {
    Vector<T> total{};
    Index e = 0;
    for (; e + kLanes<T> <= s.width; e += kLanes<T>) total += widen<T>(a + e) * widen<T>(c + e);
    T rest = sum<T>(total);
    for (; e < s.width; ++e) rest += widen_one<T>(a[e]) * widen_one<T>(c[e]);
    return rest;
  };
  columns.each(s.dout, out.dout, [&](Index column, const W* row) {
    const Index i = column / s.shared(), r = column % s.shared();
    const Index place = plan.query[b * s.queries + columns.begin + i];
    delta[column] = inner(row, out.out + b * s.out[0] + place * s.out[1] + (g * s.shared() + r) * s.out[2]);
  });
}

template <class T, class Matrix>
struct BackwardRoom {
  Matrix query, dout, query_transposed, dout_transposed, key, value, weights, dscores;
  T *wide_weights, *dkey, *dvalue;
  typename Columns<T>::Runs runs;
  BackwardRoom(Scratch& scratch, const Shape& s) : BackwardRoom(scratch, s.columns(), s.pitch(), kBackwardKeys) {}

 private:
  BackwardRoom(Scratch& scratch, Index N, Index pitch, Index K)
      : query(scratch, N, pitch), dout(scratch, N, pitch), query_transposed(scratch, pitch, N),
        dout_transposed(scratch, pitch, N), key(scratch, K, pitch), value(scratch, K, pitch), weights(scratch, K, N),
        dscores(scratch, K, N), wide_weights(weights.wide(scratch, K)), dkey(scratch.take<T>(K * pitch)),
        dvalue(scratch.take<T>(K * pitch)), runs(scratch, N) {}
};

template <class T, class W>
int backward_slice(const Shape& s, const Arrays<T, W>& in, const Gradients<T, W>& out, const Plan& plan,
                   const Shared<T>& shared, Index b, Index g, Index slice) {
  using Matrix = MatrixFor<T, W>;
  const Index N = s.columns(), E = s.width, pitch = s.pitch(), K = kBackwardKeys;
  const auto room = thread_scratch().lay_out<BackwardRoom<T, Matrix>>(s);
  if (!room) return kNoMemory;
  const auto& [query, dout, query_transposed, dout_transposed, key, value, weights, dscores, wide_weights, dkey, dvalue,
               runs] = *room;
  const Scale<T, Matrix> scale(s);
  const Index slice_begin = plan.slice(s, b, slice), slice_end = plan.slice(s, b, slice + 1);
  for (Index block = 0; block < plan.blocks(s, b); ++block)
    if (plan.meets(s, b, block, slice))
      std::fill_n(shared.dq + plan.part(s, b, g, block, slice) * E * N, E * N, T(0));
  for (Index begin = slice_begin; begin < slice_end; begin += K) {
    const Index end = std::min(slice_end, begin + K);
    const std::int32_t* place = plan.key + b * s.keys + begin;
    gather(s, s.k, in.k, place, b, g, end - begin, key);
    gather(s, s.v, in.v, place, b, g, end - begin, value);
    key.pair_up(0, end - begin, 0, pitch);
    std::fill(dkey, dkey + (end - begin) * pitch, T(0));
    std::fill(dvalue, dvalue + (end - begin) * pitch, T(0));
    for (Index block = 0; block < plan.blocks(s, b); ++block) {
      const Columns<T> columns(s, plan, b, g, block);
      const Bounds& bounds = columns.bounds;
      if (!columns.meets(begin, end)) continue;
      columns.read(s.q, in.q, scale.of_queries, query, query_transposed);
      columns.read(s.dout, out.dout, T(1), dout, dout_transposed);
      query.pair_up(0, N, 0, pitch);
      dout.pair_up(0, N, 0, pitch);
      columns.read_runs(runs);
      const T *highest = statistics_of(s, shared.statistics, b, g, block), *share = highest + N;
      const T* delta = shared.delta + s.panel(b, g, block) * N;
      // Only the keys that some query sees.
      const Index lowest = std::max<Index>(begin, bounds.lowest) - begin, to = std::min<Index>(end, bounds.highest) - begin;
      const Index from = lowest - lowest % Matrix::kTogether;
      const auto [left, right] = columns.seeing(begin, end, runs);
      for_tiles<T>(to - from, right - left, [&, left = left]<int R, int V>(Index row, Index column) {
        const Index j = from + row, c = left + column;
        Tile<T, R, V> tile;
        tile.clear();
        Matrix::multiply_rows(tile, 0, E, key, j, query_transposed, c);
        scale.finish(tile);
        for (int w = 0; w < V; ++w) {
          const Index at = c + w * kLanes<T>;
          const bool all = columns.all_see(begin + j, begin + j + R, runs, at);
          for (int r = 0; r < R; ++r) {
            const Vector<T> p = exponential(tile.v[r][w] - load(highest + at)) * load(share + at);
            tile.v[r][w] = p;
            if (!all) tile.v[r][w] = columns.see(begin + j + r, runs, at) ? p : Vector<T>{};
          }
        }
        weights.put(tile, j, c);
        if constexpr (Matrix::kRounds) tile.put(wide_weights + j * N + c, N);
      });
      for_tiles<T>(to - from, right - left, [&, left = left]<int R, int V>(Index row, Index column) {
        const Index j = from + row, c = left + column;
        Tile<T, R, V> tile;
        tile.clear();
        Matrix::multiply_rows(tile, 0, E, value, j, dout_transposed, c);
        for (int w = 0; w < V; ++w) {
          const Vector<T> mean = load(delta + c + w * kLanes<T>);
          for (int r = 0; r < R; ++r)
            tile.v[r][w] = load(wide_weights + (j + r) * N + c + w * kLanes<T>) * (tile.v[r][w] - mean);
        }
        dscores.put(tile, j, c);
      });
      dscores.pair_up(from, to, left, right);
      const auto add = [&, left = left, right = right](const Matrix& factors, const Matrix& rows, T* target) {
        for_tiles<T>(to - from, pitch, [&]<int R, int V>(Index row, Index e) {
          const Index j = from + row;
          Tile<T, R, V> tile;
          tile.clear();
          Matrix::multiply_rows(tile, left, right, factors, j, rows, e);
          tile.add_to(target + j * pitch + e, pitch);
        });
      };
      add(weights, dout, dvalue);
      add(dscores, query, dkey);
      T* dq = shared.dq + plan.part(s, b, g, block, slice) * E * N;
      for_tiles<T>(E, right - left, [&, left = left]<int R, int V>(Index e, Index column) {
        const Index c = left + column;
        Tile<T, R, V> tile;
        tile.clear();
        Matrix::multiply_columns(tile, from, to, key, e, dscores, c);
        tile.add_to(dq + e * N + c, N);
      });
    }
    if constexpr (Matrix::kRounds)
      for (Index i = 0; i < (end - begin) * pitch; i += kLanes<T>) store(dkey + i, scale.of_scores * load(dkey + i));
    for (Index j = 0; j < end - begin; ++j) {
      const Index at = ((b * s.keys + place[j]) * s.groups + g) * E;
      narrow_row(E, dkey + j * pitch, out.dk + at);
      narrow_row(E, dvalue + j * pitch, out.dv + at);
    }
  }
  return kOk;
}

// Adds up the slices' gradients of a block of queries.
template <class T, class W>
int finish_queries(const Shape& s, const Gradients<T, W>& out, const Plan& plan, const Shared<T>& shared, Index b, Index g,
                   Index block) {
  const Index N = s.columns(), E = s.width, pitch = s.pitch();
  Scratch& scratch = thread_scratch();
  if (!scratch.reserve(Scratch::bytes<T>(E * N) + Scratch::bytes<T>(N * pitch))) return kNoMemory;
  T *total = scratch.take<T>(E * N), *rows = scratch.take<T>(N * pitch);
  std::fill(total, total + E * N, T(0));
  const Columns<T> columns(s, plan, b, g, block);
  for (Index slice = 0; slice < s.slices; ++slice) {
    if (!plan.meets(s, b, block, slice)) continue;
    const T* part = shared.dq + plan.part(s, b, g, block, slice) * E * N;
    for (Index i = 0; i < E * N; i += kLanes<T>) store(total + i, load(total + i) + load(part + i));
  }
  const T scale = static_cast<T>(1 / std::sqrt(static_cast<double>(E)));
  for (Index i = 0; i < E * N; i += kLanes<T>) store(total + i, scale * load(total + i));
  transpose(E, columns.used(), total, N, rows, pitch);
  const Index stride[3] = {s.queries * s.heads * E, s.heads * E, E};
  columns.each(stride, out.dq, [&](Index column, W* row) { narrow_row(E, rows + column * pitch, row); });
  return kOk;
}

template <class T, class W>
int backward(const Shape& s, const Arrays<T, W>& in, const Gradients<T, W>& out, const Plan& plan,
             const Shared<T>& shared, int threads) {
  int status = kOk;
  const Index rows = s.batch * s.groups;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index task = 0; task < rows * s.blocks(); ++task) {
    const Index block = task % s.blocks(), g = task / s.blocks() % s.groups, b = task / s.blocks() / s.groups;
    if (block < plan.blocks(s, b)) make_delta(s, out, plan, shared.delta + task * s.columns(), b, g, block);
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : status)
  for (Index task = 0; task < rows * s.slices; ++task) {
    const Index slice = task / rows, b = task % rows / s.groups, g = task % s.groups;
    status = std::max(status, backward_slice(s, in, out, plan, shared, b, g, slice));
  }
  if (status != kOk) return status;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : status)
  for (Index task = 0; task < rows * s.blocks(); ++task) {
    const Index block = task % s.blocks(), g = task / s.blocks() % s.groups, b = task / s.blocks() / s.groups;
    if (block < plan.blocks(s, b)) status = std::max(status, finish_queries(s, out, plan, shared, b, g, block));
  }
  return status;
}

Plan plan_of(const AttentionPlan& plan) {
  return {plan.key,    plan.query, plan.first, plan.stop, plan.counts, reinterpret_cast<Bounds*>(plan.bounds),
          plan.until};
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(attention_plan, AttentionPlanned) {
  using namespace taipan;
  const Shape s{call->sizes};
  if (!s.fits()) return kUnsupported;
  const Plan plan = plan_of(call->plan);
  if ((plan.until == nullptr) != (call->until == nullptr)) return kUnsupported;
#pragma omp parallel for num_threads(threads) schedule(static) if (s.batch > 1)
  for (Index b = 0; b < s.batch; ++b) make_plan(s, call->low, call->high, call->code, call->until, plan, b);
  return kOk;
}

TAIPAN_FUNCTION(attention_forward, AttentionForward) {
  using namespace taipan;
  const Shape s{call->sizes};
  const Plan plan = plan_of(call->plan);
  if (!s.fits()) return kUnsupported;
  if (!plan.in_range(s)) return kOutOfRange;
  return with_element<Real>(s.narrow, [&]<class W>() {
    const auto of = [](const void* p) { return static_cast<const W*>(p); };
    return forward<Real, W>(s, {of(call->q), of(call->k), of(call->v)}, plan, static_cast<W*>(call->out),
                            call->statistics, threads);
  });
}

TAIPAN_FUNCTION(attention_backward, AttentionBackward) {
  using namespace taipan;
  const Shape s{call->sizes};
  const Plan plan = plan_of(call->plan);
  if (!s.fits()) return kUnsupported;
  if (!plan.in_range(s)) return kOutOfRange;
  return with_element<Real>(s.narrow, [&]<class W>() {
    const auto of = [](const void* p) { return static_cast<const W*>(p); };
    const auto to = [](void* p) { return static_cast<W*>(p); };
    return backward<Real, W>(s, {of(call->q), of(call->k), of(call->v)},
                             {of(call->out), of(call->dout), to(call->dq), to(call->dk), to(call->dv)}, plan,
                             {call->statistics, call->delta, call->parts_dq}, threads);
  });
}
