// An attention layer of a decoding step, selective or not: the gate decides which rows ask, their keys and values go into
// the ring of the window, and each head reads what the window shows.
#pragma once

#include "decode_step.h"

namespace taipan {

template <class T>
struct AttentionLayer {
  Step<T>& step;
  const DecodeSizes& s;

  explicit AttentionLayer(Step<T>& step) : step(step), s(step.s) {}

  void run(const Layer& layer, const State& state, Own<T>& own) const {
    const Index E = s.width, query = s.query_heads * E, key = s.key_heads * E;
    step.normalise(layer.norm, own.x);
    Index asked = step.count;
    const T* x = own.x;
    if (layer.kind == kSelective) {
      asked = 0;
      for (Index i = 0; i < step.count; ++i)
        if (opens(layer, state, i, own)) own.asked[asked++] = i;
      if (asked < step.count) {
        for (Index j = 0; j < asked; ++j)
          std::memcpy(own.chosen + j * s.hidden, own.x + own.asked[j] * s.hidden, sizeof(T) * s.hidden);
        x = own.chosen;
      }
    } else {
      for (Index i = 0; i < step.count; ++i) own.asked[i] = i;
    }
    const bool all = asked == step.count || layer.keys_of_all;
    const Index keyed = all ? step.count : asked, ahead = layer.kind == kSelective ? s.lookahead : 0;
    if (keyed == 0) return note_scores(layer, state, own);
    const T *values = all ? own.x : x, *keys = values;
    if (ahead > 0) {
      entries(state, own);
      values = own.entries;
      keys = own.entries + ahead * s.hidden;
    }
    T *q = step.wide, *k = q + step.count * query, *v = k + step.count * key;
    step.product(layer.first, x, s.hidden, asked, own, {q, query, false});
    step.product(layer.keys, keys, s.hidden * (1 + ahead), keyed, own, {k, key, false});
    step.product(layer.values, values, s.hidden * (1 + ahead), keyed, own, {v, key, false});
    note_scores(layer, state, own);
    step.team->wait(own.me);
    step.team->share(own.me, keyed * s.key_heads, 1, [&](Index begin, Index end) {
      for (Index task = begin; task < end; ++task) {
        const Index j = task / s.key_heads, g = task % s.key_heads;
        const Index i = all ? j : own.asked[j];
        const Index at = std::lower_bound(own.asked, own.asked + asked, i) - own.asked;
        const bool asks = at < asked && own.asked[at] == i;
        const Index slot = slot_of(layer, state, i);
        remember(layer, state, i, g, slot, k + j * key + g * E, v + j * key + g * E);
        if (asks) attend(layer, state, i, g, slot, q + at * query, step.y + at * query, own.attended);
      }
    });
    step.team->wait(own.me);
    if (own.me.part.number == 0)
      for (Index j = 0; j < keyed; ++j) {
        const Index i = all ? j : own.asked[j];
        const Index slot = step.rows[i] * state.slots + slot_of(layer, state, i);
        state.index[slot] = coordinate(layer, state, i);
        if (layer.recent > 0) state.strength[slot] = own.strength[i];
        ++state.count[step.rows[i]];
        if (ahead > 0) follow(state, i, own);
      }
    if (asked == 0) return;
    if (layer.kind == kAttention) {
      step.product(layer.last, step.y, query, asked, own, {step.h, s.hidden, true});
    } else {
      step.product(layer.last, step.y, query, asked, own, {step.wide, s.hidden, false}, [&](Index begin, Index end) {
        for (Index j = 0; j < asked; ++j) {
          const Index i = own.asked[j];
          T* h = step.h + i * s.hidden;
          for (Index c = begin; c < end; ++c)
            h[c] += own.weight[i] * (step.wide[j * s.hidden + c] - (layer.adds ? T(0) : h[c]));
        }
      });
    }
    step.team->wait(own.me);
  }

  // What the entries of this step are made of: for each row its input and the K before it, the newest first; 0 where the
  // text has none, as the state has it.
  void entries(const State& state, const Own<T>& own) const {
    const Index D = s.hidden, K = s.lookahead;
    for (Index i = 0; i < step.count; ++i) {
      T* to = own.entries + i * (1 + K) * D;
      const T* recent = state.recent + step.rows[i] * K * D;
      std::memcpy(to, own.x + i * D, sizeof(T) * D);
      for (Index back = 1; back <= K; ++back) std::memcpy(to + back * D, recent + (K - back) * D, sizeof(T) * D);
    }
  }

  // The input of row i becomes the last one of its text.
  void follow(const State& state, Index i, const Own<T>& own) const {
    const Index D = s.hidden, K = s.lookahead;
    T* recent = state.recent + step.rows[i] * K * D;
    std::memmove(recent, recent + D, sizeof(T) * (K - 1) * D);
    for (Index c = 0; c < D; ++c) {
      const T value = own.x[i * D + c];
      recent[(K - 1) * D + c] = s.rounds ? to_bfloat16<T>(value) : value;
    }
  }

  // The gate of row i (Eq. 1–3): whether it selects the token; its weight, α or 1, goes to own.weight.
  bool opens(const Layer& layer, const State& state, Index i, const Own<T>& own) const {
    const T* x = (layer.gate_reads_raw ? step.h : own.x) + i * s.hidden;
    Index size = s.hidden;
    if (layer.recall_query_weight != nullptr) {
      x = with_recall(layer, i, x, own.gate);
      size += 2 * s.orders + s.rank;
    }
    if (s.gate_hidden > 0) {
      T* hidden = own.gate + s.hidden + 2 * s.orders + s.rank;
      for (Index r = 0; r < s.gate_hidden; ++r) {
        const T value = dot(size, layer.gate_hidden_weight + r * size, x) + layer.gate_hidden_bias[r];
        hidden[r] = value * sigmoid_of(value);
      }
      x = hidden;
      size = s.gate_hidden;
    }
    const T skip = dot(size, layer.gate_weight, x) + layer.gate_bias[0];
    const T attend = dot(size, layer.gate_weight + size, x) + layer.gate_bias[1];
    own.margin[i] = attend - skip;
    own.weight[i] = layer.weighs_one ? T(1) : sigmoid_of(own.margin[i]);
    const T* scores_end = state.scores + (s.scores > 0 ? (step.rows[i] + 1) * s.scores : 0);
    // an entry that looks ahead is as strong as the strongest token in it
    own.strength[i] = own.margin[i];
    for (Index back = 1; layer.recent > 0 && back <= s.lookahead; ++back)
      own.strength[i] = std::max(own.strength[i], scores_end[-back]);
    if (!(own.margin[i] > *layer.threshold)) return false;
    const auto outranks = [&](T other) { return other >= own.margin[i]; };
    const Index higher = std::count_if(scores_end - s.bounding, scores_end, outranks);
    return s.bounding == 0 || static_cast<double>(higher) < s.most;
  }

  // The scores of this step become the last ones of their rows, once all threads have compared with those before.
  void note_scores(const Layer& layer, const State& state, Own<T>& own) const {
    if (layer.kind != kSelective || s.scores == 0) return;
    step.team->wait(own.me);
    for (Index i = 0; own.me.part.number == 0 && i < step.count; ++i) {
      T* scores = state.scores + step.rows[i] * s.scores;
      std::memmove(scores, scores + 1, sizeof(T) * (s.scores - 1));
      scores[s.scores - 1] = own.margin[i];
    }
  }

  // The input of row i, what it repeats, and how the token that followed fits it, one after the other.
  const T* with_recall(const Layer& layer, Index i, const T* x, T* room) const {
    const T* follower = step.follower + i * s.hidden;
    T* to = std::copy(x, x + s.hidden, room);
    to = std::copy_n(step.repeated + i * 2 * s.orders, 2 * s.orders, to);
    for (Index r = 0; r < s.rank; ++r) {
      const T query = dot(s.hidden, layer.recall_query_weight + r * s.hidden, x) + layer.recall_query_bias[r];
      const T key = dot(s.hidden, layer.recall_key_weight + r * s.hidden, follower) + layer.recall_key_bias[r];
      to[r] = query * key;
    }
    return room;
  }

  static T dot(Index count, const T* a, const T* b) {
    T out[1][1];
    dots(count, a, b, count, out);
    return out[0][0];
  }

  // Where the token of row i stands in the window.
  std::int64_t coordinate(const Layer& layer, const State& state, Index i) const {
    return layer.counts_selected ? state.count[step.rows[i]] : step.position[step.rows[i]];
  }

  void rotate(const Layer& layer, Index i, T* x) const {
    const Index half = s.width / 2;
    for (Index e = 0; layer.frequency != nullptr && e < half; ++e) {
      const T angle = static_cast<T>(step.position[step.rows[i]]) * layer.frequency[e];
      const T cosine = std::cos(angle), sine = std::sin(angle), first = x[e], second = x[half + e];
      x[e] = first * cosine - second * sine;
      x[half + e] = second * cosine + first * sine;
    }
  }

  // The slot that the entry of row i takes: that of the oldest, or of the weakest that is not among the newest.
  Index slot_of(const Layer& layer, const State& state, Index i) const {
    const Index b = step.rows[i];
    const std::int64_t count = state.count[b];
    if (layer.recent == 0 || count < state.slots) return count % state.slots;
    const std::int64_t* index = state.index + b * state.slots;
    const T* strength = state.strength + b * state.slots;
    Index weakest = -1;
    for (Index slot = 0; slot < state.slots; ++slot) {
      if (index[slot] > count - layer.recent) continue;
      if (weakest < 0 || strength[slot] < strength[weakest] ||
          (strength[slot] == strength[weakest] && index[slot] < index[weakest]))
        weakest = slot;
    }
    return std::max<Index>(weakest, 0);
  }

  // Key and value of one head into a slot.
  void remember(const Layer& layer, const State& state, Index i, Index g, Index slot, T* key, const T* value) const {
    const Index b = step.rows[i];
    const Index at = ((b * s.key_heads + g) * state.slots + slot) * s.width;
    rotate(layer, i, key);
    for (Index e = 0; e < s.width; ++e) {
      state.first[at + e] = s.rounds ? to_bfloat16<T>(key[e]) : key[e];
      state.second[at + e] = s.rounds ? to_bfloat16<T>(value[e]) : value[e];
    }
  }

  // Attention of the query heads that share key/value head g, keys taken in blocks: running maximum and sum.
  void attend(const Layer& layer, const State& state, Index i, Index g, Index own, T* query, T* out, T* room) const {
    const Index E = s.width, heads = s.query_heads / s.key_heads, b = step.rows[i];
    const std::int64_t here = coordinate(layer, state, i);
    const Index entries = std::min<Index>(state.count[b] + 1, state.slots);
    const T *keys = state.first + (b * s.key_heads + g) * state.slots * E;
    const T *values = state.second + (b * s.key_heads + g) * state.slots * E;
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
    for (Index begin = 0; begin < entries; begin += kKeys) {
      const Index count = std::min(kKeys, entries - begin);
      bool seen[kKeys], any = false;
      for (Index j = 0; j < count; ++j) {
        const std::int64_t at = index[begin + j];
        seen[j] = begin + j == own || (at >= 0 && (layer.window == 0 || at > here - layer.window));
        any |= seen[j];
      }
      if (!any) continue;
      for (Index r = 0; r < heads; ++r) {
        T* of = score + r * kKeys;
        Index j = 0;
        for (; j + 4 <= count; j += 4) {
          T value[1][4];
          dots(E, keys + (begin + j) * E, q + r * E, E, value);
          for (int n = 0; n < 4; ++n) of[j + n] = value[0][n];
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
};

}  // namespace taipan
