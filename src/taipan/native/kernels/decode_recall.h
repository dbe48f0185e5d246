// What the tokens of a decoding step repeat: for gates that recall (taipan.ops.recall).
#pragma once

#include "decode_step.h"

namespace taipan {

template <class T>
struct Recall {
  Step<T>& step;
  const DecodeSizes& s;
  const Decode& call;

  Recall(Step<T>& step, const Decode& call) : step(step), s(step.s), call(call) {}

  // For each row whether each n-gram that ends with its token was there before and how far back, as the gate reads it;
  // and the normed embedding of the token that followed the longest one.
  int look_back() const {
    if (s.orders == 0) return kOk;
    for (Index i = 0; i < step.count; ++i) {
      const std::int64_t follower = look_back(step.rows[i], step.repeated + i * 2 * s.orders);
      if (follower >= s.vocabulary) return kOutOfRange;
      T* to = step.follower + i * s.hidden;
      if (follower < 0) {
        std::fill(to, to + s.hidden, T(0));
        continue;
      }
      step.embed(call.embedding, follower, to);
      T squares = 0;
      for (Index c = 0; c < s.hidden; ++c) squares += to[c] * to[c];
      const T scale = T(1) / std::sqrt(squares / s.hidden + T(kSmallestSquare));
      for (Index c = 0; c < s.hidden; ++c) to[c] *= scale;
    }
    return kOk;
  }

  // The tokens of this step become the last ones of their rows.
  void remember() const {
    for (Index i = 0; s.orders > 0 && i < step.count; ++i) {
      std::int64_t* recent = call.recent + step.rows[i] * s.remembered;
      std::memmove(recent, recent + 1, sizeof(*recent) * (s.remembered - 1));
      recent[s.remembered - 1] = call.tokens[step.rows[i]];
    }
  }

 private:
  static constexpr double kSmallestSquare = 1e-6;  // of an embedding, as model/decoder.py has it

  std::int64_t look_back(Index b, T* repeated) const {
    const std::int64_t *recent = call.recent + b * s.remembered, token = call.tokens[b];
    const Index longest = call.orders[s.orders - 1];
    const T log_window = std::log(static_cast<T>(s.window));
    std::fill(repeated, repeated + 2 * s.orders, T(0));
    Index found = 0;  // orders, the shorter ones first: an n-gram was there no later than its end
    std::int64_t follower = -1;
    for (Index distance = 1; distance < s.window && found < s.orders; ++distance) {
      const std::int64_t* end = recent + s.remembered - distance;  // where an occurrence would end
      if (*end != token) continue;
      Index same = 1;
      // `end` has at least `longest` - 1 tokens before it: R is the window and `longest` - 2 more
      while (same < longest && end[-same] >= 0 && end[-same] == recent[s.remembered - same]) ++same;
      for (; found < s.orders && call.orders[found] <= same; ++found) {
        repeated[found] = 1;
        repeated[s.orders + found] = std::log(static_cast<T>(distance)) / log_window;
        follower = distance == 1 ? token : end[1];
      }
    }
    return follower;
  }
};

}  // namespace taipan
