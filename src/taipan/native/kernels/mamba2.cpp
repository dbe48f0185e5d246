// What lies between the projections of a Mamba-2 mixer, in one call: convolution, state space duality and
// gated norm, each by its own kernel. They read what in_proj wrote where it lies, and their gradients write into one
// gradient of it, so that nothing is split, copied or put together again.
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
          in.C_rows, in.entrances};
}

NormSizes norm_sizes(const Shape& s) {
  return {s.rows(), s.inner(), s.inner() / s.groups, s.inner(), s.row(), s.narrow};
}

template <class X>
int forward(const Shape& s, const Mamba2Forward& call, int threads) {
  const Mamba2Inputs& in = call.inputs;
  for (Index k = 0; k < s.taps; ++k)
    for (Index c = 0; c < s.channels(); ++c) in.taps[k * s.channels() + c] = in.weight[c * s.taps + k];
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
    call.dA[h] = static_cast<Real>(through_A);
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
