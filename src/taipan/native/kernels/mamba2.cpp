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
  Index row() const { return inner() + channels() + heads; }  // of dproj: z; x, B, C; dt
  Index rows() const { return batch * tokens; }
};

ConvSizes conv_sizes(const Shape& s) {
  return {s.batch, s.tokens, s.channels(), s.taps, s.tokens * s.proj_row, s.proj_row, 1, s.narrow};
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
  return {s.rows(), s.inner(), s.inner() / s.groups, s.inner(), s.proj_row, s.narrow};
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
  const Index inner = s.inner(), row = s.row();
  // The gradients of y, of the convolution's result and of what it read follow each other in one place.
  X *dproj = static_cast<X*>(call.dproj), *dxbc = dproj + inner;
  const NormBackward norm{norm_sizes(s), s.eps,   in.y,    in.proj, in.norm,
                          call.dout,     row,     dxbc,    row,     dproj,   call.dnorm};
  if (const int status = taipan_norm_backward(&norm, threads)) return status;
  const SsdBackward ssd{ssd_sizes(s),      ssd_inputs<X>(s, in), call.B_columns,
                        call.C_columns,    dxbc,                 row,            call.dfinal,
                        call.slices_dB,    call.slices_dC,       call.slices_dscores,
                        call.slices,       row,                  dxbc,
                        call.ddt,          row,                  dxbc + inner,
                        dxbc + inner + s.shared(), call.dinitial, call.dA,
                        call.dD};
  if (const int status = taipan_ssd_backward(&ssd, threads)) return status;
  const ConvBackward conv{conv_sizes(s), conv_inputs<X>(s, in), dxbc, row, row, dxbc, call.dcolumns, call.dtaps};
  return taipan_conv_backward(&conv, threads);
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
