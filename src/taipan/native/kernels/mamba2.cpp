// What lies between the projections of a Mamba-2 mixer, in one call: step sizes, convolution, state space duality and
// gated norm, each by its own kernel. They read what in_proj wrote where it lies, and their gradients write into one
// gradient of it, so that nothing is split, copied or put together again.
#include <algorithm>
#include <cmath>

#include "interface.h"
#include "narrow.h"

namespace taipan {
namespace {

struct Shape : Mamba2Sizes {
  Index inner() const { return heads * head_dim; }
  Index shared() const { return groups * state; }  // of B, and of C
  Index channels() const { return inner() + 2 * shared(); }
  Index row() const { return inner() + channels() + heads; }  // of proj: z; x, B, C; dt
  Index rows() const { return batch * tokens; }
};

// log(1 + e^x): x above 0 apart, and log(1 + t) = 2 artanh(t / (2 + t)), t ≤ 1, by its series.
inline Vector<float> softplus(Vector<float> x) {
  const Vector<float> zero{}, t = exponential(x > zero ? -x : x), s = t / (2.0f + t), square = s * s;
  Vector<float> series = splat(1.0f / 15);
  for (const float factor : {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f})
    series = series * square + factor;
  return (x > zero ? x : zero) + 2.0f * s * series;
}

inline Vector<double> softplus(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane)
    x[lane] = std::fmax(x[lane], 0.0) + std::log1p(std::exp(-std::fabs(x[lane])));
  return x;
}

// Calls f(place, vector, lanes) for the step sizes before softplus, of `count` numbers from `begin` of (rows, heads).
template <class T, class X, class F>
void for_steps(const Shape& s, const X* proj, const T* bias, Index begin, Index end, F&& f) {
  const Index column = s.row() - s.heads;
  Index row = begin / s.heads, head = begin % s.heads;
  for (Index at = begin; at < end; at += kLanes<T>) {
    const int lanes = static_cast<int>(std::min<Index>(kLanes<T>, end - at));
    Vector<T> raw{};
    for (int lane = 0; lane < lanes; ++lane) {
      raw[lane] = widen_one<T>(proj[row * s.row() + column + head]) + bias[head];
      if (++head == s.heads) head = 0, ++row;
    }
    f(at, raw, lanes);
  }
}

template <class T, class X>
void make_steps(const Shape& s, const X* proj, const T* bias, const std::uint8_t* present, T* dt, int threads) {
  const T low = static_cast<T>(s.dt_low), high = static_cast<T>(s.dt_high);
  const Index count = s.rows() * s.heads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index part = 0; part < threads; ++part)
    for_steps(s, proj, bias, count * part / threads, count * (part + 1) / threads,
              [&](Index at, Vector<T> raw, int lanes) {
                const Vector<T> step = at_most(high, at_least(low, softplus(raw)));
                for (int lane = 0; lane < lanes; ++lane)
                  dt[at + lane] = present == nullptr || present[(at + lane) / s.heads] ? step[lane] : T(0);
              });
}

// From the gradient of the steps that of what they were made of: of proj, and of the bias, summed in fp64.
template <class T, class X>
void steps_backward(const Shape& s, const X* proj, const T* bias, const std::uint8_t* present, const T* ddt, X* dproj,
                    double* dbias) {
  const T low = static_cast<T>(s.dt_low), high = static_cast<T>(s.dt_high);
  std::fill(dbias, dbias + s.heads, 0.0);
  for_steps(s, proj, bias, 0, s.rows() * s.heads, [&](Index at, Vector<T> raw, int lanes) {
    const Vector<T> step = softplus(raw), slope = sigmoid(raw);
    for (int lane = 0; lane < lanes; ++lane) {
      const Index row = (at + lane) / s.heads, head = (at + lane) % s.heads;
      const bool moves = step[lane] >= low && step[lane] <= high && (present == nullptr || present[row]);
      const T gradient = moves ? ddt[at + lane] * slope[lane] : T(0);
      dproj[row * s.row() + s.row() - s.heads + head] = narrow_one<X>(gradient);
      dbias[head] += static_cast<double>(gradient);
    }
  });
}

ConvSizes conv_sizes(const Shape& s) {
  return {s.batch, s.tokens, s.channels(), s.taps, s.tokens * s.row(), s.row(), 1, s.narrow};
}

template <class X>
ConvInputs conv_inputs(const Shape& s, const Mamba2Inputs& in) {
  return {static_cast<const X*>(in.proj) + s.inner(), in.taps, in.bias, in.columns, in.document};
}

SsdSizes ssd_sizes(const Shape& s) {
  const Index channels = s.channels(), all = s.tokens * channels;
  return {s.batch, s.tokens, s.heads, s.head_dim, s.groups, s.state, s.chunk, all, channels, s.tokens * s.heads, s.heads,
          all, channels, all, channels, s.narrow};
}

template <class X>
SsdInputs ssd_inputs(const Shape& s, const Mamba2Inputs& in) {
  const X* x = static_cast<const X*>(in.xbc);
  return {x, in.dt, in.A, x + s.inner(), x + s.inner() + s.shared(), in.D, in.initial, in.document, in.scores, in.B_rows,
          in.C_rows};
}

NormSizes norm_sizes(const Shape& s) {
  return {s.rows(), s.inner(), s.inner() / s.groups, s.inner(), s.row(), s.narrow};
}

template <class X>
int forward(const Shape& s, const Mamba2Forward& call, int threads) {
  const Mamba2Inputs& in = call.inputs;
  for (Index k = 0; k < s.taps; ++k)
    for (Index c = 0; c < s.channels(); ++c) in.taps[k * s.channels() + c] = in.weight[c * s.taps + k];
  for (Index h = 0; h < s.heads; ++h) in.A[h] = -std::exp(in.A_log[h]);
  make_steps(s, static_cast<const X*>(in.proj), in.dt_bias, in.present, in.dt, threads);
  const ConvForward conv{conv_sizes(s), conv_inputs<X>(s, in), in.xbc};
  if (const int status = taipan_conv_forward(&conv, threads)) return status;
  const SsdForward ssd{ssd_sizes(s), ssd_inputs<X>(s, in), in.y, call.final};
  if (const int status = taipan_ssd_forward(&ssd, threads)) return status;
  const NormForward norm{norm_sizes(s), s.eps, in.y, in.proj, in.norm, call.out};
  return taipan_norm_forward(&norm, threads);
}

template <class X>
int backward(const Shape& s, const Mamba2Backward& call, int threads) {
  const Mamba2Inputs& in = call.inputs;
  const Index inner = s.inner(), channels = s.channels();
  X *dproj = static_cast<X*>(call.dproj), *dxbc = static_cast<X*>(call.dxbc);
  const NormBackward norm{norm_sizes(s), s.eps,   in.y,    in.proj, in.norm,
                          call.dout,     call.dy, s.row(), dproj,   call.dnorm_of_threads};
  if (const int status = taipan_norm_backward(&norm, threads)) return status;
  const SsdBackward ssd{ssd_sizes(s),      ssd_inputs<X>(s, in), call.B_columns,
                        call.C_columns,    call.dy,              call.dfinal,
                        call.slices_dB,    call.slices_dC,       call.slices_dscores,
                        call.slices,       channels,             dxbc,
                        call.ddt,          channels,             dxbc + inner,
                        dxbc + inner + s.shared(), call.dinitial, call.dA_of_rows,
                        call.dD_of_rows};
  if (const int status = taipan_ssd_backward(&ssd, threads)) return status;
  const ConvBackward conv{conv_sizes(s), conv_inputs<X>(s, in), dxbc, s.row(), dproj + inner, call.dcolumns,
                          call.dtaps_of_rows};
  if (const int status = taipan_conv_backward(&conv, threads)) return status;
  steps_backward(s, static_cast<const X*>(in.proj), in.dt_bias, in.present, call.ddt, dproj, call.ddt_bias);
  for (Index c = 0; c < inner; ++c) {
    Real total = 0;
    for (int part = 0; part < threads; ++part) total += call.dnorm_of_threads[part * inner + c];
    call.dnorm[c] = total;
  }
  const Index of_row = (s.taps + 1) * channels;
  for (Index k = 0; k <= s.taps; ++k)
    for (Index c = 0; c < channels; ++c) {
      Real total = 0;
      for (Index b = 0; b < s.batch; ++b) total += call.dtaps_of_rows[b * of_row + k * channels + c];
      (k < s.taps ? call.dweight[c * s.taps + k] : call.dbias[c]) = total;
    }
  for (Index h = 0; h < s.heads; ++h) {
    double through_A = 0, through_D = 0;
    for (Index b = 0; b < s.batch; ++b) {
      through_A += call.dA_of_rows[b * s.heads + h];
      through_D += call.dD_of_rows[b * s.heads + h];
    }
    call.dA_log[h] = static_cast<Real>(through_A * static_cast<double>(in.A[h]));
    call.dD[h] = static_cast<Real>(through_D);
  }
  return kOk;
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(mamba2_forward, Mamba2Forward) {
  using namespace taipan;
  const Shape s{call->sizes};
  return with_element<Real>(s.narrow, [&]<class X>() { return forward<X>(s, *call, threads); });
}

TAIPAN_FUNCTION(mamba2_backward, Mamba2Backward) {
  using namespace taipan;
  const Shape s{call->sizes};
  return with_element<Real>(s.narrow, [&]<class X>() { return backward<X>(s, *call, threads); });
}
