// Depthwise causal convolution over time with SiLU, forward and backward, each in one pass over memory.
//
// The backward takes a piece of the channels through all tokens, so that neighbouring tokens find their inputs in
// the cache, and walks from the last token to the first.
#include <algorithm>

#include "gemm.h"

namespace taipan {
namespace {

struct Shape {
  Index batch, tokens, channels, taps, x_b, x_t, silu;
};

template <class T>
struct Arrays {
  const T *x, *weight, *bias, *columns;  // weight (K, C); columns (B, K - 1, C) or null for zeros
  const std::int32_t* document;          // (B, T): number of the document, 0 that of the columns; or null
};

// Inputs that the taps of one token meet, oldest first; null where a tap counts for nothing.
template <class T>
void meet(const Shape& s, const Arrays<T>& in, Index b, Index t, const T** inputs) {
  for (Index k = 0; k < s.taps; ++k) {
    const Index from = t - s.taps + 1 + k;
    const std::int32_t* document = in.document == nullptr ? nullptr : in.document + b * s.tokens;
    if (from >= 0)
      inputs[k] = document == nullptr || document[from] == document[t] ? in.x + b * s.x_b + from * s.x_t : nullptr;
    else if (in.columns == nullptr || (document != nullptr && document[t] != 0))
      inputs[k] = nullptr;
    else
      inputs[k] = in.columns + (b * (s.taps - 1) + from + s.taps - 1) * s.channels;
  }
}

// The taps of one vector of channels.
template <class T, int K>
struct Taps {
  Vector<T> weight[K], bias;

  Taps(const Shape& s, const Arrays<T>& in, Index c) : bias(load(in.bias + c)) {
    for (int k = 0; k < K; ++k) weight[k] = load(in.weight + k * s.channels + c);
  }

  Vector<T> sum(const T* const* inputs, Index c) const {
    Vector<T> total = bias;
    for (int k = 0; k < K; ++k)
      if (inputs[k] != nullptr) total += load(inputs[k] + c) * weight[k];
    return total;
  }
};

template <class T, int K>
void forward(const Shape& s, const Arrays<T>& in, T* y, int threads) {
  constexpr Index kTokens = 32;
  const Index parts = (s.tokens + kTokens - 1) / kTokens;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index task = 0; task < s.batch * parts; ++task) {
    const Index b = task / parts, begin = task % parts * kTokens, end = std::min(s.tokens, begin + kTokens);
    const T* inputs[kTokens][K];
    for (Index t = begin; t < end; ++t) meet(s, in, b, t, inputs[t - begin]);
    for (Index c = 0; c < s.channels; c += kLanes<T>) {
      const Taps<T, K> taps(s, in, c);
      for (Index t = begin; t < end; ++t) {
        const Vector<T> total = taps.sum(inputs[t - begin], c);
        store(y + (b * s.tokens + t) * s.channels + c, s.silu ? total * sigmoid(total) : total);
      }
    }
  }
}

// Gradients of x and the columns (one after the other, (B, K - 1 + T, C)), of the weight and of the bias. The latter
// two are per row of the batch, (B, K + 1, C), bias last.
template <class T, int K>
void backward(const Shape& s, const Arrays<T>& in, const T* dy, T* dinputs, T* dweight, int threads) {
  constexpr Index kPiece = 8 * kLanes<T>, kTokens = 32;
  const Index pieces = (s.channels + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index task = 0; task < s.batch * pieces; ++task) {
    const Index b = task / pieces, first = task % pieces * kPiece, last = std::min(s.channels, first + kPiece);
    T* target = dinputs + b * (K - 1 + s.tokens) * s.channels;
    T* own = dweight + b * (K + 1) * s.channels;
    for (Index k = 0; k <= K; ++k) std::memset(own + k * s.channels + first, 0, sizeof(T) * (last - first));
    // Inputs t - K + 1 … t - 1 have got a part of their gradient when token t is done; the rest waits here.
    Vector<T> waiting[kPiece / kLanes<T>][K - 1] = {};
    for (Index end = s.tokens; end > 0; end -= std::min(end, kTokens)) {
      const Index begin = end - std::min(end, kTokens);
      const T* inputs[kTokens][K];
      for (Index t = begin; t < end; ++t) meet(s, in, b, t, inputs[t - begin]);
      for (Index c = first; c < last; c += kLanes<T>) {
        const Taps<T, K> taps(s, in, c);
        Vector<T>* rest = waiting[(c - first) / kLanes<T>];
        Vector<T> part[K], dtaps[K] = {}, dbias{};
        for (int k = 0; k < K - 1; ++k) part[k + 1] = rest[k];
        for (Index t = end - 1; t >= begin; --t) {
          const T* const* met = inputs[t - begin];
          Vector<T> dsum = load(dy + (b * s.tokens + t) * s.channels + c);
          if (s.silu) {
            const Vector<T> total = taps.sum(met, c), open = sigmoid(total);
            dsum *= open * (T(1) + total * (T(1) - open));
          }
          dbias += dsum;
          part[0] = Vector<T>{};
          for (int k = 0; k < K; ++k) {
            if (met[k] == nullptr) continue;
            part[k] += dsum * taps.weight[k];
            dtaps[k] += dsum * load(met[k] + c);
          }
          store(target + (t + K - 1) * s.channels + c, part[K - 1]);
          for (int k = K - 1; k > 0; --k) part[k] = part[k - 1];
        }
        for (int k = 0; k < K - 1; ++k) rest[k] = part[k + 1];
        for (int k = 0; k < K; ++k) store(own + k * s.channels + c, load(own + k * s.channels + c) + dtaps[k]);
        store(own + K * s.channels + c, load(own + K * s.channels + c) + dbias);
      }
    }
    for (Index c = first; c < last; c += kLanes<T>)
      for (int k = 0; k < K - 1; ++k) store(target + k * s.channels + c, waiting[(c - first) / kLanes<T>][k]);
  }
}

// Calls f<K>() for the number of taps.
template <class F>
int with_taps(Index taps, F&& f) {
  switch (taps) {
    case 2: f.template operator()<2>(); return kOk;
    case 3: f.template operator()<3>(); return kOk;
    case 4: f.template operator()<4>(); return kOk;
    default: return kUnsupported;
  }
}

}  // namespace
}  // namespace taipan

using Real = TAIPAN_REAL;

// Sizes are the fields of Shape in order; native.py of the op has the shapes of all else.
extern "C" int taipan_conv_forward(const std::ptrdiff_t* sizes, const Real* x, const Real* weight, const Real* bias,
                                   const Real* columns, const std::int32_t* document, Real* y, int threads) {
  taipan::Shape s;
  std::memcpy(&s, sizes, sizeof s);
  return taipan::with_taps(s.taps, [&]<int K>() {
    taipan::forward<Real, K>(s, {x, weight, bias, columns, document}, y, threads);
  });
}

extern "C" int taipan_conv_backward(const std::ptrdiff_t* sizes, const Real* x, const Real* weight, const Real* bias,
                                    const Real* columns, const std::int32_t* document, const Real* dy, Real* dinputs,
                                    Real* dweight, int threads) {
  taipan::Shape s;
  std::memcpy(&s, sizes, sizeof s);
  return taipan::with_taps(s.taps, [&]<int K>() {
    taipan::backward<Real, K>(s, {x, weight, bias, columns, document}, dy, dinputs, dweight, threads);
  });
}
