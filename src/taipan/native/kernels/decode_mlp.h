// The MLP of a decoding step: gate and up in one stage, down in the next.
#pragma once

#include "decode_step.h"

namespace taipan {

template <class T>
struct SwigluLayer {
  Step<T>& step;
  const DecodeSizes& s;

  explicit SwigluLayer(Step<T>& step) : step(step), s(step.s) {}

  void run(const Layer& layer, Own<T>& own) const {
    const Index size = s.intermediate;
    T *gate = step.wide, *up = gate + step.count * size;
    step.normalise(layer.mlp_norm, own.x);
    const auto share = [&](const auto& rows) {
      const auto others = of_matrix(rows, layer.up);
      step.team->share(own.me, size, step.grain_of(layer.gate, own), [&](Index begin, Index end) {
        product_of(rows, layer.gate, begin, end, step.count, Target<T>{gate, size, false});
        product_of(others, layer.up, begin, end, step.count, Target<T>{up, size, false});
        for (Index i = 0; i < step.count; ++i)
          for (Index c = begin; c < end; c += kLanes<T>) {
            const Index n = end - c, at = i * size + c;
            const Vector<T> value = load_some(gate + at, n);
            store_some(step.y + at, value * sigmoid(value) * load_some(up + at, n), n);
          }
      });
    };
    step.with_format(layer.gate, own.x, s.hidden, step.count, own.room, share);
    step.team->wait(own.me);
    step.product(layer.down, step.y, size, step.count, own, {step.h, s.hidden, true});
    step.team->wait(own.me);
  }
};

}  // namespace taipan
