// The recurrence of a Mamba-2 layer, h = exp(dt A) h + dt B x and y = C h, of one head of one row.
//
// A state may be some tokens behind: what they bring is kept beside it, which is far smaller, and applied again at every
// token, until all of it is written at once. So the state is read at every token, but seldom written. A number goes
// through the same steps in the same order, each rounded alike, whether the state is written after every token or not.
#pragma once

#include "rows.h"

namespace taipan {

constexpr Index kMostBehind = 7;  // tokens that a state may be behind

template <class T>
struct Recurrence {
  const DecodeSizes& s;
  const State& state;
  Index most_behind;

  // One token of one head of a row of the batch whose state is `behind` tokens behind: y (P) is dt x before and C h after.
  void read(Index row, Index head, Index behind, T decay, const T* B, const T* C, T* y) const {
    if (behind < most_behind) {
      keep(row, head, behind, decay, B, y);
      with_number(behind, [&]<int Behind>() { rows<Behind, true, false>(row, head, decay, y, B, C, y); });
    } else {
      with_number(behind, [&]<int Behind>() { rows<Behind, true, true>(row, head, decay, y, B, C, y); });
    }
  }

  // The state of one head of a row catches up.
  void settle(Index row, Index head, Index behind) const {
    if (behind == 0) return;
    const Late late = late_of(row, head);
    const Index last = behind - 1;
    const T *input = late.input + last * s.head_dim, *B = late.B + last * s.state;
    with_number(last, [&]<int Behind>() {
      rows<Behind, false, true>(row, head, late.decay[last], input, B, nullptr, nullptr);
    });
  }

 private:
  // What the tokens bring that the state of a head is behind: dt x (., P), B (., N) of its group, and exp(dt A). What a head
  // needs lies together, so that the processor fetches it ahead.
  struct Late {
    T *input, *B, *decay;
  };

  Late late_of(Index row, Index head) const {
    T* at = state.late + row * most_behind * (s.inner + s.groups * s.state + s.heads);
    T *B = at + most_behind * s.inner, *decay = B + most_behind * s.groups * s.state;
    const Index group = head / (s.heads / s.groups);
    return {at + head * most_behind * s.head_dim, B + group * most_behind * s.state, decay + head * most_behind};
  }

  void keep(Index row, Index head, Index behind, T decay, const T* B, const T* input) const {
    const Late late = late_of(row, head);
    std::copy(input, input + s.head_dim, late.input + behind * s.head_dim);
    if (head % (s.heads / s.groups) == 0) std::copy(B, B + s.state, late.B + behind * s.state);
    late.decay[behind] = decay;
  }

  // f<number>()
  template <class F>
  static void with_number(Index number, F&& f) {
    [&]<int... N>(std::integer_sequence<int, N...>) {
      ((number == N ? f.template operator()<N>() : void()), ...);
    }(std::make_integer_sequence<int, kMostBehind + 1>());
  }

  // The kept tokens and one more, of all rows of a head's state (P, N).
  template <int Behind, bool Read, bool Write>
  void rows(Index row, Index head, T decay, const T* input, const T* B, const T* C, T* y) const {
    T decays[Behind + 1];
    const T *inputs[Behind + 1], *Bs[Behind + 1];
    const Late late = late_of(row, head);
    for (int n = 0; n < Behind; ++n) {
      decays[n] = late.decay[n];
      inputs[n] = late.input + n * s.head_dim;
      Bs[n] = late.B + n * s.state;
    }
    decays[Behind] = decay, inputs[Behind] = input, Bs[Behind] = B;
    T* h = state.second + (row * s.heads + head) * s.head_dim * s.state;
    for (Index p = 0; p < s.head_dim; ++p, h += s.state) {
      T now[Behind + 1];
      for (int n = 0; n <= Behind; ++n) now[n] = inputs[n][p];
      const T total = one_row<Behind + 1, Read, Write>(s.state, decays, now, Bs, C, h);
      if constexpr (Read) y[p] = total;
    }
  }

  // One row at a time, in memory order: with several the processor does not prefetch.
  template <int Tokens, bool Read, bool Write>
  [[gnu::always_inline]] static T one_row(Index N, const T (&decay)[Tokens], const T (&input)[Tokens],
                                          const T* const (&B)[Tokens], const T* C, T* h) {
    Vector<T> total{};
    for (Index n = 0; n < N; n += kLanes<T>) {
      Vector<T> value = load_some(h + n, N - n);
      for (int t = 0; t < Tokens; ++t)  // the product is rounded, the sum with the decayed value then is one operation
        value = decay[t] * value + rounded<T>(input[t] * load_some(B[t] + n, N - n));
      if constexpr (Write) store_some(h + n, value, N - n);
      if constexpr (Read) total += value * load_some(C + n, N - n);
    }
    return sum<T>(total);
  }
};

}  // namespace taipan
