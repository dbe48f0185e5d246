// A Mamba-2 layer of a decoding step: in_proj and convolution in one stage, the recurrence of each head in the next, then
// the gated norm and out_proj.
#pragma once

#include "decode_recurrence.h"
#include "decode_step.h"

namespace taipan {

template <class T>
struct Mamba2Layer {
  Step<T>& step;
  const DecodeSizes& s;

  explicit Mamba2Layer(Step<T>& step) : step(step), s(step.s) {}

  void run(const Layer& layer, const State& state, Own<T>& own) const {
    step.normalise(layer.norm, own.x);
    const auto share = [&](const auto& rows) {
      step.team->share(own.me, step.in, step.grain_of(layer.first, own), [&](Index begin, Index end) {
        const Index from = std::max(begin - s.inner, Index(0)), to = std::min(end - s.inner, s.conv);
        if (from < to) fetch_columns(layer, state, from, to);
        product_of(rows, layer.first, begin, end, step.count, Target<T>{step.wide, step.in, false});
        if (from < to) convolve(layer, state, from, to);
      });
    };
    step.with_format(layer.first, own.x, s.hidden, step.count, own.room, share);
    step.team->wait(own.me);
    step.team->share(own.me, step.count * s.heads, 1, [&](Index begin, Index end) {
      for (Index task = begin; task < end; ++task) recur(layer, state, task / s.heads, task % s.heads);
    });
    step.team->wait(own.me);
    const Index size = s.inner / s.groups, heads = s.heads / s.groups;
    for (Index i = 0; i < step.count; ++i)
      for (Index g = 0; g < s.groups; ++g) {
        T squares = 0;
        for (Index head = g * heads; head < (g + 1) * heads; ++head) squares += step.squares[i * s.heads + head];
        const T scale = step.scale_of(squares, size);
        for (Index c = g * size; c < (g + 1) * size; c += kLanes<T>) {
          const Index n = (g + 1) * size - c, at = i * s.inner + c;
          store_some(own.x + at, scale * load_some(step.y + at, n) * load_some(layer.gated_norm + c, n), n);
        }
      }
    step.product(layer.last, own.x, s.inner, step.count, own, {step.h, s.hidden, true});
    step.team->wait(own.me);
  }

  // Prefetches the columns: few bytes each and far apart, so the processor does not do it.
  void fetch_columns(const Layer& layer, const State& state, Index begin, Index end) const {
    for (Index c = begin; c < end; c += 64 / sizeof(T)) {
      __builtin_prefetch(layer.conv_bias + c);
      for (Index k = 0; k < s.taps; ++k) __builtin_prefetch(layer.conv_weight + k * s.conv + c);
      for (Index i = 0; i < step.count; ++i)
        for (Index k = 0; k < s.taps - 1; ++k)
          __builtin_prefetch(state.first + (step.rows[i] * (s.taps - 1) + k) * s.conv + c, 1);
    }
  }

  // Convolution with SiLU in place of channels [begin, end), and their columns moved on.
  void convolve(const Layer& layer, const State& state, Index begin, Index end) const {
    const Index kept = s.taps - 1;
    for (Index i = 0; i < step.count; ++i) {
      T* columns = state.first + step.rows[i] * kept * s.conv;
      T* x = step.wide + i * step.in + s.inner;
      for (Index c = begin; c < end; c += kLanes<T>) {
        const Index n = end - c;
        Vector<T> now = load_some(x + c, n);
        if (s.rounds) now = to_bfloat16(now);
        Vector<T> total = load_some(layer.conv_bias + c, n) + now * load_some(layer.conv_weight + kept * s.conv + c, n);
        for (Index k = 0; k < kept; ++k) {
          const Vector<T> before = load_some(columns + k * s.conv + c, n);
          total += before * load_some(layer.conv_weight + k * s.conv + c, n);
          if (k > 0) store_some(columns + (k - 1) * s.conv + c, before, n);
        }
        if (kept > 0) store_some(columns + (kept - 1) * s.conv + c, now, n);
        store_some(x + c, total * sigmoid(total), n);
      }
    }
  }

  // The recurrence and y = C h + D x of one head of one row; then u = y · silu(z) and its sum of squares.
  void recur(const Layer& layer, const State& state, Index i, Index head) const {
    const Index P = s.head_dim, N = s.state, group = head / (s.heads / s.groups);
    const T* row = step.wide + i * step.in;
    const T *z = row + head * P, *x = row + s.inner + head * P;
    const T *B = row + 2 * s.inner + group * N, *C = B + s.groups * N;
    const T raw = row[s.inner + s.conv + head] + layer.dt_bias[head];
    T dt = raw > T(20) ? raw : std::log1p(std::exp(raw));
    dt = std::min(std::max(dt, static_cast<T>(s.dt_low)), static_cast<T>(s.dt_high));
    const T decay = std::exp(dt * layer.A[head]), skip = layer.D[head];
    T* y = step.y + i * s.inner + head * P;
    for (Index p = 0; p < P; ++p) y[p] = dt * x[p];
    const Recurrence<T> recurrence{s, state, step.most_behind};
    recurrence.read(step.rows[i], head, step.behind_of(i), decay, B, C, y);
    Vector<T> squares{};
    for (Index p = 0; p < P; p += kLanes<T>) {
      const Vector<T> gate = load_some(z + p, P - p);
      const Vector<T> all = load_some(y + p, P - p) + skip * load_some(x + p, P - p);
      const Vector<T> u = all * gate * sigmoid(gate);
      squares += u * u;
      store_some(y + p, u, P - p);
    }
    step.squares[i * s.heads + head] = sum<T>(squares);
  }
};

}  // namespace taipan
