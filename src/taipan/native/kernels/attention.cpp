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

// Keys of a block of queries: their first and last, and the range common to all; the number of its first slice of keys,
// and of the first part of its gradient within its row.
struct Bounds {
  std::int32_t lowest, highest, latest, earliest, slice, part;
  bool meets(Index begin, Index end) const { return lowest < end && highest > begin; }
  bool all_see(Index begin, Index end) const { return latest <= begin && end <= earliest; }
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
    if (count % s.block() == 0) bounds = {first, stop, first, stop, 0, 0};
    bounds = {std::min(bounds.lowest, first), std::max(bounds.highest, stop), std::max(bounds.latest, first),
              std::min(bounds.earliest, stop), 0, 0};
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

  // Whether all of them see all of some keys.
  bool all_see(Index from, Index to) const { return until == nullptr && bounds.all_see(from, to); }

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

  // Of the columns: ranges of keys, empty where there is no query, and the number of the query.
  struct Runs {
    Number *first, *stop, *query;
  };

  void read_runs(const Runs& runs) const {
    const Index at = b * s.queries + begin;
    for (Index column = 0; column < s.columns(); ++column) {
      const bool used = column < queries * s.shared();
      runs.first[column] = used ? plan.first[at + column / s.shared()] : 0;
      runs.stop[column] = used ? plan.stop[at + column / s.shared()] : 0;
      runs.query[column] = static_cast<Number>(begin + column / s.shared());
    }
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

// Keys of a block of queries, some at a time: those of its range, without those that its first query does not see any
// more.
template <class T>
class Keys {
 public:
  Index count = 0;
  const std::int32_t* place = nullptr;

  explicit Keys(const Columns<T>& columns) : columns_(columns), next_(columns.bounds.lowest) {}

  bool next() {
    const std::int32_t* all = columns_.plan.key + columns_.b * columns_.s.keys;
    begin_ = next_;
    if (columns_.until == nullptr) {
      count = std::min<Index>(kForwardKeys, columns_.bounds.highest - begin_);
      place = all + begin_;
      next_ += kForwardKeys;
      return count > 0;
    }
    count = 0;
    for (; next_ < columns_.bounds.highest && count < kForwardKeys; ++next_)
      if (columns_.until[next_] > columns_.begin) {
        numbers_[count] = static_cast<std::int32_t>(next_);
        places_[count++] = all[next_];
      }
    place = places_;
    return count > 0;
  }

  Index number(Index j) const { return columns_.until == nullptr ? begin_ + j : numbers_[j]; }

 private:
  const Columns<T>& columns_;
  Index next_, begin_ = 0;
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

template <class T, class Matrix>
struct ForwardRoom {
  using Number = typename Columns<T>::Number;
  Matrix rows, query, key, value, weights;
  T *scores, *sums, *out, *highest, *before, *total, *kept;
  typename Columns<T>::Runs runs;
  ForwardRoom(Scratch& scratch, const Shape& s) : ForwardRoom(scratch, s.columns(), s.width, s.pitch()) {}

 private:
  ForwardRoom(Scratch& scratch, Index N, Index E, Index pitch)
      : rows(scratch, N, pitch), query(scratch, pitch, N), key(scratch, kForwardKeys, pitch),
        value(scratch, kForwardKeys, pitch), weights(scratch, kForwardKeys, N), scores(weights.wide(scratch, kForwardKeys)),
        sums(scratch.take<T>(E * N)), out(scratch.take<T>(N * pitch)), highest(scratch.take<T>(N)),
        before(scratch.take<T>(N)), total(scratch.take<T>(N)), kept(scratch.take<T>(N)),
        runs{scratch.take<Number>(N), scratch.take<Number>(N), scratch.take<Number>(N)} {}
};

template <class T, class W>
int forward_block(const Shape& s, const Arrays<T, W>& in, const Plan& plan, W* out, T* statistics, Index b, Index g,
                  Index block) {
  using Matrix = MatrixFor<T, W>;
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  const Index N = s.columns(), E = s.width, pitch = s.pitch();
  const auto room = thread_scratch().lay_out<ForwardRoom<T, Matrix>>(s);
  if (!room) return kNoMemory;
  const auto& [rows, query, key, value, weights, scores, sums, result, highest, before, total, kept, runs] = *room;
  const Scale<T, Matrix> scale(s);

  const Columns<T> columns(s, plan, b, g, block);
  const Index used = columns.used();
  columns.read(s.q, in.q, scale.of_queries, rows, query);
  columns.read_runs(runs);
  std::fill(sums, sums + E * N, T(0));
  std::fill(highest, highest + N, kNone);
  std::fill(total, total + N, T(0));
  for (Keys<T> keys(columns); keys.next();) {
    const Index count = keys.count;
    gather(s, s.k, in.k, keys.place, b, g, count, key);
    gather(s, s.v, in.v, keys.place, b, g, count, value);
    value.pair_up(0, count, 0, pitch);
    std::copy(highest, highest + N, before);
    const auto [left, right] = columns.seeing(keys.number(0), keys.number(count - 1) + 1, runs);
    for_tiles<T>(count, right - left, [&, left = left]<int R, int V>(Index j, Index column) {
      const Index c = left + column;
      Tile<T, R, V> tile;
      tile.clear();
      Matrix::multiply_rows(tile, 0, E, key, j, query, c);
      scale.finish(tile);
      if (!columns.all_see(keys.number(j), keys.number(j) + R))
        for (int r = 0; r < R; ++r)
          for (int w = 0; w < V; ++w) {
            const Index at = c + w * kLanes<T>;
            tile.v[r][w] = columns.see(keys.number(j + r), runs, at) ? tile.v[r][w] : splat(kNone);
          }
      tile.put(scores + j * N + c, N);
      for (int w = 0; w < V; ++w) {
        Vector<T> high = load(highest + c + w * kLanes<T>);
        for (int r = 0; r < R; ++r) high = larger<T>(high, tile.v[r][w]);
        store(highest + c + w * kLanes<T>, high);
      }
    });
    for (Index c = left; c < right; c += kLanes<T>) {
      const Vector<T> high = load(highest + c);
      const Vector<T> base = high == splat(kNone) ? Vector<T>{} : high;  // no key yet
      Vector<T> summed{};
      for (Index j = 0; j < count; j += 2) {
        const Vector<T> p = exponential(load(scores + j * N + c) - base);
        const Vector<T> next = j + 1 < count ? exponential(load(scores + (j + 1) * N + c) - base) : Vector<T>{};
        summed += p;
        summed += next;
        weights.put_two(j, c, p, next);
      }
      const Vector<T> factor = exponential(load(before + c) - base);
      store(kept + c, factor);
      store(total + c, load(total + c) * factor + summed);
    }
    for_tiles<T>(E, right - left, [&, left = left]<int R, int V>(Index e, Index column) {
      const Index c = left + column;
      Tile<T, R, V> tile;
      tile.clear();
      Matrix::multiply_columns(tile, 0, count, value, e, weights, c);
      for (int w = 0; w < V; ++w) {
        const Vector<T> factor = load(kept + c + w * kLanes<T>);
        for (int r = 0; r < R; ++r) {
          T* at = sums + (e + r) * N + c + w * kLanes<T>;
          store(at, load(at) * factor + tile.v[r][w]);
        }
      }
    });
  }
  T* own = statistics_of(s, statistics, b, g, block);
  for (Index c = 0; c < N; ++c) {
    own[c] = total[c] > 0 ? highest[c] : T(0);
    own[N + c] = total[c] > 0 ? 1 / total[c] : T(0);
  }
  transpose(E, used, sums, N, result, pitch);
  columns.each(s.out, out, [&, result = result](Index column, W* row) {
    T* from = result + column * pitch;
    for (Index e = 0; e < E; ++e) from[e] *= own[N + column];
    narrow_row(E, from, row);
  });
  return kOk;
}

template <class T, class W>
int forward(const Shape& s, const Arrays<T, W>& in, const Plan& plan, W* out, T* statistics, int threads) {
  int status = kOk;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : status)
  for (Index task = 0; task < s.batch * s.groups * s.blocks(); ++task) {
    // The last queries have the most keys where there is no window.
    const Index block = s.blocks() - 1 - task / (s.batch * s.groups);
    const Index b = task % s.batch, g = task / s.batch % s.groups;
    if (block < plan.blocks(s, b))
      status = std::max(status, forward_block(s, in, plan, out, statistics, b, g, block));
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
  using Number = typename Columns<T>::Number;
  Matrix query, dout, query_transposed, dout_transposed, key, value, weights, dscores;
  T *wide_weights, *dkey, *dvalue;
  typename Columns<T>::Runs runs;
  BackwardRoom(Scratch& scratch, const Shape& s) : BackwardRoom(scratch, s.columns(), s.pitch(), kBackwardKeys) {}

 private:
  BackwardRoom(Scratch& scratch, Index N, Index pitch, Index K)
      : query(scratch, N, pitch), dout(scratch, N, pitch), query_transposed(scratch, pitch, N),
        dout_transposed(scratch, pitch, N), key(scratch, K, pitch), value(scratch, K, pitch), weights(scratch, K, N),
        dscores(scratch, K, N), wide_weights(weights.wide(scratch, K)), dkey(scratch.take<T>(K * pitch)),
        dvalue(scratch.take<T>(K * pitch)),
        runs{scratch.take<Number>(N), scratch.take<Number>(N), scratch.take<Number>(N)} {}
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
        const bool all = columns.all_see(begin + j, begin + j + R);
        for (int w = 0; w < V; ++w) {
          const Index at = c + w * kLanes<T>;
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
