// One token of every row through the whole decoder, in one call: the memory of weights and states is read once, and
// states are written in place.
//
// Threads split every product by rows and wait for each other between stages; each computes short steps (norms, gates) by
// itself. All sums are in Real, whatever the format of the weights.
#include "decode_attention.h"
#include "decode_check.h"
#include "decode_mamba2.h"
#include "decode_mlp.h"
#include "decode_recall.h"

namespace taipan {
namespace {

// All layers, and the logits (count, V).
void run(const Decode& call, Step<Real>& step, Own<Real>& own) {
  const Mamba2Layer<Real> mamba2(step);
  const AttentionLayer<Real> attention(step);
  const SwigluLayer<Real> mlp(step);
  for (Index n = 0; n < step.s.layers; ++n) {
    const Layer& layer = call.layers[n];
    if (layer.kind == kMamba2)
      mamba2.run(layer, call.states[n], own);
    else if (layer.kind != kClosed)
      attention.run(layer, call.states[n], own);
    if (layer.mlp_norm != nullptr) mlp.run(layer, own);
  }
  step.normalise(call.norm, own.x);
  step.product(call.head, own.x, step.s.hidden, step.count, own, {call.logits, step.s.vocabulary, false});
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(decode, Decode) {
  using namespace taipan;
  if (const int status = DecodeCheck(*call).status(); status != kOk) return status;
  if (call->count == 0) return kOk;
  Step<Real> step(*call);
  static thread_local Scratch shared;
  if (!step.reserve(shared, threads)) return kNoMemory;
  step.embed(call->embedding, call->tokens);
  const Recall<Real> recall(step, *call);
  if (const int status = recall.look_back(); status != kOk) return status;
  std::atomic<bool> enough = true;
#pragma omp parallel num_threads(threads) shared(enough)
  {
    Part part{0, 1};
#ifdef _OPENMP
    part = {omp_get_thread_num(), omp_get_num_threads()};
#endif
    Own<Real> own;
    if (!step.reserve(thread_scratch(), part, own)) enough = false;
    step.team->wait(own.me);
    if (enough) run(*call, step, own);
  }
  if (!enough) return kNoMemory;
  recall.remember();
  for (Index i = 0; i < call->count; ++i) {
    const std::int64_t row = call->rows[i];
    ++call->position[row];
    call->behind[row] = call->behind[row] == call->most_behind ? 0 : call->behind[row] + 1;
  }
  return kOk;
}

TAIPAN_FUNCTION(settle, Settle) {
  using namespace taipan;
  const Decode& decode = call->decode;
  const DecodeSizes& s = decode.sizes;
  if (const int status = DecodeCheck(decode).status_of_rows(); status != kOk) return status;
#pragma omp parallel num_threads(threads)
  for (Index n = 0; n < s.layers; ++n) {
    if (decode.layers[n].kind != kMamba2) continue;
    const Recurrence<Real> recurrence{s, decode.states[n], decode.most_behind};
#pragma omp for schedule(static) nowait
    for (Index task = 0; task < decode.count * s.heads; ++task) {
      const std::int64_t row = decode.rows[task / s.heads];
      recurrence.settle(row, task % s.heads, decode.behind[row]);
    }
  }
  for (Index i = 0; i < decode.count; ++i) decode.behind[decode.rows[i]] = 0;
  return kOk;
}
