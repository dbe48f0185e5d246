// Checks a call of the decoder: every size that it computes addresses from, and every number that it indexes by.
// Cost: some comparisons per layer and row.
#pragma once

#include "decode_recurrence.h"

namespace taipan {

struct DecodeCheck {
  const Decode& call;
  const DecodeSizes& s;

  explicit DecodeCheck(const Decode& call) : call(call), s(call.sizes) {}

  int status() const {
    if (const int status = status_of_rows(); status != kOk) return status;
    for (Index i = 0; i < call.count; ++i)
      if (const std::int64_t token = call.tokens[call.rows[i]]; token < 0 || token >= s.vocabulary) return kOutOfRange;
    return kOk;
  }

  // The same where no token is read.
  int status_of_rows() const {
    if (!sizes()) return kUnsupported;
    for (Index n = 0; n < s.layers; ++n)
      if (!layer(call.layers[n], call.states[n])) return kUnsupported;
    return indices() ? kOk : kOutOfRange;
  }

 private:
  bool sizes() const {
    const bool formats = s.format >= kReal && s.format <= kInt4 && s.embedding_format >= kReal &&
                         s.embedding_format <= kInt4 && s.embedding_format != kInt8;
    const bool there = is(call.embedding, s.vocabulary, s.hidden, s.embedding_format) && call.norm && call.tokens &&
                       call.position && call.behind && (call.count == 0 || (call.rows && call.logits));
    return formats && there && s.layers >= 0 && s.hidden > 0 && s.vocabulary > 0 && s.intermediate >= 0 &&
           s.gate_hidden >= 0 && s.lookahead >= 0 && s.bounding >= 0 && s.scores >= s.bounding && call.batch > 0 &&
           call.most_behind >= 0 && call.most_behind <= kMostBehind && is(call.head, s.vocabulary, s.hidden) && recall();
  }

  // Orders rise, and the remembered tokens hold all n-grams that end within the window.
  bool recall() const {
    if (s.orders == 0) return s.remembered == 0 && s.rank == 0;
    if (s.orders < 0 || s.window < 2 || s.rank < 1 || call.orders == nullptr || call.recent == nullptr) return false;
    for (Index n = 0; n < s.orders; ++n)
      if (call.orders[n] < 1 || (n > 0 && call.orders[n] <= call.orders[n - 1])) return false;
    return s.remembered == s.window + call.orders[s.orders - 1] - 2;
  }

  bool is(const Matrix& m, Index rows, Index columns) const { return is(m, rows, columns, s.format); }

  static bool is(const Matrix& m, Index rows, Index columns, Index format) {
    return m.rows == rows && m.columns == columns && m.weight != nullptr && (m.scale != nullptr) == (format >= kInt8);
  }

  bool layer(const Layer& layer, const State& state) const {
    if (layer.mlp_norm != nullptr) {
      const bool fits = is(layer.gate, s.intermediate, s.hidden) && is(layer.up, s.intermediate, s.hidden);
      if (!fits || !is(layer.down, s.hidden, s.intermediate)) return false;
    }
    switch (layer.kind) {
      case kClosed: return true;
      case kMamba2: return mamba2(layer, state);
      case kSelective: return gate(layer) && (s.scores == 0 || state.scores) && attention(layer, state) && retains(layer, state);
      case kAttention: return attention(layer, state) && layer.recent == 0;
      default: return false;
    }
  }

  bool mamba2(const Layer& layer, const State& state) const {
    const bool there = layer.norm && layer.conv_weight && layer.conv_bias && layer.dt_bias && layer.A && layer.D &&
                       layer.gated_norm && state.first && state.second && (call.most_behind == 0 || state.late);
    const bool fits = s.groups > 0 && s.heads > 0 && s.heads % s.groups == 0 && s.inner == s.heads * s.head_dim &&
                      s.conv == s.inner + 2 * s.groups * s.state && s.taps > 1 && s.state > 0;
    return there && fits && is(layer.first, s.inner + s.conv + s.heads, s.hidden) && is(layer.last, s.hidden, s.inner);
  }

  bool attention(const Layer& layer, const State& state) const {
    const bool there = layer.norm && state.first && state.second && state.index && state.count;
    const bool fits = s.width > 0 && s.key_heads > 0 && s.query_heads % s.key_heads == 0 && state.slots > 0 &&
                      layer.window >= 0 && (layer.frequency == nullptr || s.width % 2 == 0);
    const Index query = s.query_heads * s.width, key = s.key_heads * s.width;
    const Index ahead = layer.kind == kSelective ? s.lookahead : 0;
    const bool entries = ahead == 0 || (state.recent && layer.keys_of_all);
    return there && fits && entries && is(layer.first, query, s.hidden) && is(layer.keys, key, s.hidden) &&
           is(layer.values, key, s.hidden * (1 + ahead)) && is(layer.last, s.hidden, query);
  }

  // Where the weakest entry leaves: their strengths, the scores of entries that look ahead, coordinates that are ordinals.
  bool retains(const Layer& layer, const State& state) const {
    if (layer.recent == 0) return true;
    const bool ordinals = layer.keys_of_all || layer.counts_selected;
    return layer.recent > 0 && layer.recent <= state.slots && layer.window == 0 && state.strength && ordinals &&
           s.scores >= s.lookahead;
  }

  bool gate(const Layer& layer) const {
    const bool hidden = s.gate_hidden == 0 || (layer.gate_hidden_weight && layer.gate_hidden_bias);
    const bool recalls = layer.recall_query_weight && layer.recall_query_bias && layer.recall_key_weight &&
                         layer.recall_key_bias;
    return layer.gate_weight && layer.gate_bias && layer.threshold && hidden && recalls == (s.orders > 0);
  }

  // Rows, their positions, how far their states are behind, and the entries of their windows: a slot is their number
  // modulo the window.
  bool indices() const {
    if (call.count < 0 || call.count > call.batch) return false;
    for (Index i = 0; i < call.count; ++i) {
      const std::int64_t row = call.rows[i];
      if (row < 0 || row >= call.batch || (i > 0 && row <= call.rows[i - 1])) return false;
      if (call.position[row] < 0 || call.behind[row] < 0 || call.behind[row] > call.most_behind) return false;
      for (Index n = 0; n < s.layers; ++n) {
        const Index kind = call.layers[n].kind;
        if ((kind == kAttention || kind == kSelective) && call.states[n].count[row] < 0) return false;
      }
    }
    return true;
  }
};

}  // namespace taipan
