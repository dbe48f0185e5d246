// Choosing tokens, and writing several of one row in a single call: choose, read, choose, …
#include "choose.h"

namespace taipan {
namespace {

bool fits(const Choice& how, Index vocabulary) {
  for (Index n = 0; n < how.excluded_count; ++n)
    if (how.excluded[n] < 0 || how.excluded[n] >= vocabulary) return false;
  return vocabulary > 0;
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(choose, Choose) {
  using namespace taipan;
  const Index columns = call->columns;
  if (!fits(call->how, columns)) return kOutOfRange;
  int status = kOk;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : status) if (call->rows > 1)
  for (Index row = 0; row < call->rows; ++row) {
    auto chooser = thread_scratch().lay_out<Chooser>(columns, call->how);
    if (!chooser) {
      status = kNoMemory;
      continue;
    }
    const std::uint8_t* seen = call->seen == nullptr ? nullptr : call->seen + row * columns;
    call->tokens[row] = (*chooser)(call->logits + row * columns, seen, call->how.sample ? call->uniform[row] : 0.0);
  }
  return status;
}

TAIPAN_FUNCTION(write, Write) {
  using namespace taipan;
  const Index vocabulary = call->decode.sizes.vocabulary;
  Decode step = call->decode;
  std::int64_t token = call->token;
  step.tokens = &token;
  *call->written = 0;
  if (step.batch != 1 || step.count != 1) return kUnsupported;
  if (!fits(call->how, vocabulary)) return kOutOfRange;
  for (Index n = 0; n < call->steps; ++n) {
    if (n > 0 || call->unread)
      if (const int status = taipan_decode(&step, threads); status != kOk) return status;
    auto chooser = thread_scratch().lay_out<Chooser>(vocabulary, call->how);
    if (!chooser) return kNoMemory;
    token = (*chooser)(step.logits, call->seen, call->how.sample ? call->uniform[n] : 0.0);
    call->tokens[n] = token;
    *call->written = n + 1;
    if (token < 0) break;
    if (call->seen != nullptr) call->seen[token] = 1;
    if (std::find(call->ends, call->ends + call->end_count, token) != call->ends + call->end_count) break;
  }
  return kOk;
}
