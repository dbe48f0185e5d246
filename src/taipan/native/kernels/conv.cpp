// Depthwise causal convolution over time with SiLU, forward and backward, each in one pass over memory: a vector of
// channels walks over the tokens and keeps the inputs its taps meet.
//
// The backward takes a piece of the channels through all tokens, and walks from the last token to the first.
#include <algorithm>

#include "interface.h"
#include "narrow.h"

namespace taipan {
namespace {

using Shape = ConvSizes;

constexpr Index kMultiple = 16;  // of channels, which every vector width divides

// X is the type of the tokens in memory.
template <class T, class X>
struct Arrays {
  const X* x;
  const T *weight, *bias, *columns;  // weight (K, C); columns (B, K - 1, C) or null for zeros
  const std::int32_t* document;      // (B, T): running number of the document, 0 that of the columns; or null
};

// Tokens per block: few enough rows for the processor to prefetch each.
constexpr Index kForward = 4, kBackward = 8;

// The taps of one vector of channels of one row, and their inputs.
template <class T, class X, int K>
class Taps {
 public:
  Vector<T> weight[K], input[K];  // oldest first; those of another document count as 0

  Taps(const Shape& s, const Arrays<T, X>& in, Index b, Index c)
      : bias_(load(in.bias + c)), x_(in.x + b * s.x_b + c), x_t_(s.x_t), channels_(s.channels),
        columns_(in.columns == nullptr ? nullptr : in.columns + (b + 1) * (K - 1) * s.channels + c) {
    for (int k = 0; k < K; ++k) weight[k] = load(in.weight + k * s.channels + c);
  }

  // Of token t, or of the columns before the first.
  Vector<T> at(Index t) const {
    if (t >= 0) return widen<T>(x_ + t * x_t_);
    return columns_ == nullptr ? Vector<T>{} : load(columns_ + t * channels_);
  }

  // Be where `advance(t)` goes on.
  void stand_before(Index t) {
    for (int k = 1; k < K; ++k) input[k] = at(t - K + k);
  }

  // Be where `go_back(t - 1)` goes on.
  void stand_at(Index t) {
    for (int k = 0; k + 1 < K; ++k) input[k] = at(t - K + 1 + k);
  }

  // Move from the inputs of token t - 1 to those of t.
  void advance(Index t) {
    for (int k = 0; k + 1 < K; ++k) input[k] = input[k + 1];
    input[K - 1] = at(t);
  }

  // Move from the inputs of token t + 1 to those of t.
  void go_back(Index t) {
    for (int k = K - 1; k > 0; --k) input[k] = input[k - 1];
    input[0] = at(t - K + 1);
  }

  Vector<T> sum(Index reach) const {
    Vector<T> total = bias_;
    for (int k = 0; k < K; ++k)
      if (k >= K - 1 - reach) total += input[k] * weight[k];
    return total;
  }

 private:
  Vector<T> bias_;
  const X* x_;
  Index x_t_, channels_;
  const T* columns_;  // behind the last
};

// Number of inputs before token t in its document.
template <class T, class X>
Index reach_of(const Shape& s, const Arrays<T, X>& in, Index b, Index t) {
  const std::int32_t* document = in.document == nullptr ? nullptr : in.document + b * s.tokens;
  Index reach = 0;
  for (; reach < s.taps - 1; ++reach) {
    const Index from = t - 1 - reach;
    if (from >= 0 ? document != nullptr && document[from] != document[t]
                  : in.columns == nullptr || (document != nullptr && document[t] != 0))
      break;
  }
  return reach;
}

template <class T, class X, int K>
void forward(const Shape& s, const Arrays<T, X>& in, X* y, int threads) {
  const Index parts = (s.tokens + kForward - 1) / kForward;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index task = 0; task < s.batch * parts; ++task) {
    const Index b = task / parts, begin = task % parts * kForward, end = std::min(s.tokens, begin + kForward);
    Index reach[kForward];
    for (Index t = begin; t < end; ++t) reach[t - begin] = reach_of(s, in, b, t);
    for (Index c = 0; c < s.channels; c += kLanes<T>) {
      Taps<T, X, K> taps(s, in, b, c);
      taps.stand_before(begin);
      for (Index t = begin; t < end; ++t) {
        taps.advance(t);
        const Vector<T> total = taps.sum(reach[t - begin]);
        narrow(y + (b * s.tokens + t) * s.channels + c, s.silu ? total * sigmoid(total) : total);
      }
    }
  }
}

template <class T, class X>
struct Gradients {
  const X* dy;          // rows of C, `dy_t` apart
  X* dx;                // `dx_t` apart; may be dy, of which each number is read before its place is written
  Index dy_t, dx_t;
  T *dcolumns, *dtaps;  // (B, K - 1, C); of weight and bias by row of the batch, (B, K + 1, C), bias last
};

template <class T, class X, int K>
void backward(const Shape& s, const Arrays<T, X>& in, const Gradients<T, X>& out, int threads) {
  constexpr Index kMost = 64;  // vectors of channels at once
  Index pieces = (s.channels + kMost * kLanes<T> - 1) / (kMost * kLanes<T>);
  if (s.batch * pieces % threads != 0) pieces = round_up(pieces, threads);
  const Index piece = round_up((s.channels + pieces - 1) / pieces, kLanes<T>);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index task = 0; task < s.batch * pieces; ++task) {
    const Index b = task / pieces, first = task % pieces * piece, last = std::min(s.channels, first + piece);
    if (first >= last) continue;
    T *dcolumns = out.dcolumns + b * (K - 1) * s.channels, *own = out.dtaps + b * (K + 1) * s.channels;
    for (Index k = 0; k <= K; ++k) std::memset(own + k * s.channels + first, 0, sizeof(T) * (last - first));
    // After token t, inputs t - K + 1 … t - 1 have a part of their gradient; it is kept here.
    Vector<T> waiting[kMost][K - 1] = {};
    for (Index end = s.tokens; end > 0; end -= std::min(end, kBackward)) {
      const Index begin = end - std::min(end, kBackward);
      Index reach[kBackward];
      for (Index t = begin; t < end; ++t) reach[t - begin] = reach_of(s, in, b, t);
      for (Index c = first; c < last; c += kLanes<T>) {
        Taps<T, X, K> taps(s, in, b, c);
        Vector<T>* rest = waiting[(c - first) / kLanes<T>];
        Vector<T> part[K], dtaps[K] = {}, dbias{};
        for (int k = 0; k < K - 1; ++k) part[k + 1] = rest[k];
        taps.stand_at(end);
        for (Index t = end - 1; t >= begin; --t) {
          taps.go_back(t);
          const Index token = b * s.tokens + t, reached = reach[t - begin];
          Vector<T> dsum = widen<T>(out.dy + token * out.dy_t + c);
          if (s.silu) {
            const Vector<T> total = taps.sum(reached), open = sigmoid(total);
            dsum *= open * (T(1) + total * (T(1) - open));
          }
          dbias += dsum;
          part[0] = Vector<T>{};
          for (int k = 0; k < K; ++k) {
            if (k < K - 1 - reached) continue;
            part[k] += dsum * taps.weight[k];
            dtaps[k] += dsum * taps.input[k];
          }
          narrow(out.dx + token * out.dx_t + c, part[K - 1]);
          for (int k = K - 1; k > 0; --k) part[k] = part[k - 1];
        }
        for (int k = 0; k < K - 1; ++k) rest[k] = part[k + 1];
        for (int k = 0; k < K; ++k) store(own + k * s.channels + c, load(own + k * s.channels + c) + dtaps[k]);
        store(own + K * s.channels + c, load(own + K * s.channels + c) + dbias);
      }
    }
    for (Index c = first; c < last; c += kLanes<T>)
      for (int k = 0; k < K - 1; ++k) store(dcolumns + k * s.channels + c, waiting[(c - first) / kLanes<T>][k]);
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

// In their type in memory.
template <class X>
Arrays<Real, X> arrays(const ConvInputs& in) {
  return {static_cast<const X*>(in.x), in.weight, in.bias, in.columns, in.document};
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(conv_forward, ConvForward) {
  using namespace taipan;
  const ConvSizes s = call->sizes;
  if (s.channels % kMultiple != 0) return kUnsupported;
  return with_element<Real>(s.narrow, [&]<class X>() {
    return with_taps(s.taps, [&]<int K>() {
      forward<Real, X, K>(s, arrays<X>(call->inputs), static_cast<X*>(call->y), threads);
    });
  });
}

TAIPAN_FUNCTION(conv_backward, ConvBackward) {
  using namespace taipan;
  const ConvSizes s = call->sizes;
  if (s.channels % kMultiple != 0) return kUnsupported;
  return with_element<Real>(s.narrow, [&]<class X>() {
    return with_taps(s.taps, [&]<int K>() {
      const Gradients<Real, X> out{static_cast<const X*>(call->dy), static_cast<X*>(call->dx), call->dy_t, call->dx_t,
                                   call->dcolumns, call->dtaps};
      backward<Real, X, K>(s, arrays<X>(call->inputs), out, threads);
    });
  });
}
