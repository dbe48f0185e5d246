// silu(gate) · up in bfloat16, forward and backward, each in one pass over memory and rounded once.
#include "interface.h"
#include "narrow.h"

namespace taipan {
namespace {

constexpr Index kStep = 16;  // which every vector width divides

// Calls f(at) for every vector of `count` elements.
template <class F>
void for_vectors(Index count, int threads, F&& f) {
  const Index steps = count / kStep;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index part = 0; part < threads; ++part)
    for (Index at = steps * part / threads * kStep; at < steps * (part + 1) / threads * kStep; at += kLanes<float>) f(at);
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(swiglu_forward, SwigluForward) {
  using namespace taipan;
  if (call->count % kStep != 0) return kUnsupported;
  const auto of = [](const void* p) { return static_cast<const Bfloat16*>(p); };
  const Bfloat16 *gate = of(call->gate), *up = of(call->up);
  Bfloat16* out = static_cast<Bfloat16*>(call->out);
  for_vectors(call->count, threads, [=](Index at) {
    const Vector<float> value = widen<float>(gate + at);
    narrow(out + at, value * sigmoid(value) * widen<float>(up + at));
  });
  return kOk;
}

TAIPAN_FUNCTION(swiglu_backward, SwigluBackward) {
  using namespace taipan;
  if (call->count % kStep != 0) return kUnsupported;
  const auto of = [](const void* p) { return static_cast<const Bfloat16*>(p); };
  const Bfloat16 *gate = of(call->gate), *up = of(call->up), *dout = of(call->dout);
  Bfloat16 *dgate = static_cast<Bfloat16*>(call->dgate), *dup = static_cast<Bfloat16*>(call->dup);
  for_vectors(call->count, threads, [=](Index at) {
    const Vector<float> value = widen<float>(gate + at), open = sigmoid(value), gradient = widen<float>(dout + at);
    narrow(dup + at, gradient * value * open);
    narrow(dgate + at, gradient * widen<float>(up + at) * open * (1.0f + value * (1.0f - open)));
  });
  return kOk;
}
