// Depthwise causal convolution over time with SiLU, forward and backward, each in one pass over memory.
//
// The backward takes a piece of the channels through all tokens, so that neighbouring tokens find their inputs in
// the cache, and walks from the last token to the first.
#include <algorithm>

#include "gemm.h"

namespace taipan {
namespace {

constexpr int kMaxTaps = 8;

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

template <class T>
inline Vector<T> taps_sum(const Shape& s, const Arrays<T>& in, const T* const* inputs, Index c) {
  Vector<T> total = load(in.bias + c);
  for (Index k = 0; k < s.taps; ++k)
    if (inputs[k] != nullptr) total += load(inputs[k] + c) * load(in.weight + k * s.channels + c);
  return total;
}

template <class T>
void forward(const Shape& s, const Arrays<T>& in, T* y, int threads) {
  const Index tasks = s.batch * s.tokens;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index task = 0; task < tasks; ++task) {
    const T* inputs[kMaxTaps];
    meet(s, in, task / s.tokens, task % s.tokens, inputs);
    T* out = y + task * s.channels;
    for (Index c = 0; c < s.channels; c += kLanes<T>) {
      const Vector<T> total = taps_sum(s, in, inputs, c);
      store(out + c, s.silu ? total * sigmoid<T>(total) : total);
    }
  }
}

// Gradients of x and the columns (one after the other, (B, K - 1 + T, C)), of the weight and of the bias. The latter
// two are per row of the batch, (B, K + 1, C), bias last.
template <class T>
void backward(const Shape& s, const Arrays<T>& in, const T* dy, T* dinputs, T* dweight, int threads) {
  constexpr Index kPiece = 8 * kLanes<T>;
  const Index pieces = (s.channels + kPiece - 1) / kPiece, before = s.taps - 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index task = 0; task < s.batch * pieces; ++task) {
    const Index b = task / pieces, first = task % pieces * kPiece, last = std::min(s.channels, first + kPiece);
    T* target = dinputs + b * (before + s.tokens) * s.channels;
    T* own = dweight + b * (s.taps + 1) * s.channels;
    for (Index k = 0; k <= s.taps; ++k)
      for (Index c = first; c < last; ++c) own[k * s.channels + c] = 0;
    // Place r is first reached by token r (or the last one) and complete when K - 1 tokens before that are done.
    for (Index t = s.tokens - 1; t >= 0; --t) {
      const T* inputs[kMaxTaps];
      meet(s, in, b, t, inputs);
      const T* gradient = dy + (b * s.tokens + t) * s.channels;
      for (Index c = first; c < last; c += kLanes<T>) {
        Vector<T> dsum = load(gradient + c);
        if (s.silu) {
          const Vector<T> total = taps_sum(s, in, inputs, c), open = sigmoid<T>(total);
          dsum *= open * (T(1) + total * (T(1) - open));
        }
        store(own + s.taps * s.channels + c, load(own + s.taps * s.channels + c) + dsum);
        for (Index k = 0; k < s.taps; ++k) {
          T* place = target + (t + k) * s.channels + c;  // of the input t - K + 1 + k
          // The oldest tap is the first to reach its place; at the last token no place was reached before.
          Vector<T> so_far = k == 0 || t == s.tokens - 1 ? Vector<T>{} : load(place);
          if (inputs[k] != nullptr) {
            so_far += dsum * load(in.weight + k * s.channels + c);
            store(own + k * s.channels + c, load(own + k * s.channels + c) + dsum * load(inputs[k] + c));
          }
          store(place, so_far);
        }
      }
    }
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
  taipan::forward<Real>(s, {x, weight, bias, columns, document}, y, threads);
  return taipan::kOk;
}

extern "C" int taipan_conv_backward(const std::ptrdiff_t* sizes, const Real* x, const Real* weight, const Real* bias,
                                    const Real* columns, const std::int32_t* document, const Real* dy, Real* dinputs,
                                    Real* dweight, int threads) {
  taipan::Shape s;
  std::memcpy(&s, sizes, sizeof s);
  taipan::backward<Real>(s, {x, weight, bias, columns, document}, dy, dinputs, dweight, threads);
  return taipan::kOk;
}
