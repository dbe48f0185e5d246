// Choosing tokens, and writing several of each row in a single call: choose, read, choose, …
#include "choose.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace taipan {
namespace {

bool fits(const Choice& how, Index vocabulary) {
  for (Index n = 0; n < how.excluded_count; ++n)
    if (how.excluded[n] < 0 || how.excluded[n] >= vocabulary) return false;
  return vocabulary > 0;
}

// The next token of every row from its logits; `step` says which random number.
int choose_all(const Write& call, Index step, int threads) {
  const Index rows = call.decode.count, vocabulary = call.decode.sizes.vocabulary;
  int status = kOk;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : status) if (rows > 1)
  for (Index row = 0; row < rows; ++row) {
    const Pen& pen = call.pens[row];
    auto chooser = thread_scratch().lay_out<Chooser>(vocabulary, pen.how);
    if (!chooser) {
      status = kNoMemory;
      continue;
    }
    const double uniform = pen.how.sample ? pen.uniform[step] : 0.0;
    call.tokens[step * rows + row] = (*chooser)(call.decode.logits + row * vocabulary, pen.seen, uniform);
  }
  return status;
}

// Takes the tokens of a step over; whether all rows go on.
bool go_on(const Write& call, Index step) {
  const Index rows = call.decode.count;
  bool all = true;
  for (Index row = 0; row < rows; ++row) {
    const Pen& pen = call.pens[row];
    const std::int64_t token = call.tokens[step * rows + row];
    call.next[call.decode.rows[row]] = token;
    if (token >= 0 && pen.seen != nullptr) pen.seen[token] = 1;
    all = all && token >= 0 && std::find(pen.ends, pen.ends + pen.end_count, token) == pen.ends + pen.end_count;
  }
  return all;
}

// Tells whoever watches that a step's tokens are there.
void tell(const Write& call, Index written) {
  __atomic_store_n(call.written, written, __ATOMIC_SEQ_CST);
#if !defined(_WIN32)
  if (call.signal < 0 || __atomic_exchange_n(call.signalled, 1, __ATOMIC_SEQ_CST) != 0) return;
  const char byte = 0;
  if (::write(static_cast<int>(call.signal), &byte, 1) < 0) return;  // full: there is something to be read already
#endif
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
  Decode step = call->decode;
  step.tokens = call->next;
  *call->written = 0;
  for (Index row = 0; row < step.count; ++row)
    if (!fits(call->pens[row].how, step.sizes.vocabulary)) return kOutOfRange;
  for (Index n = 0; n < call->steps; ++n) {
    if (n > 0 && call->halt != nullptr && __atomic_load_n(call->halt, __ATOMIC_SEQ_CST) != 0) break;
    if (n > 0 || call->unread)
      if (const int status = taipan_decode(&step, threads); status != kOk) return status;
    if (const int status = choose_all(*call, n, threads); status != kOk) return status;
    const bool more = go_on(*call, n);
    tell(*call, n + 1);
    if (!more) break;
  }
  return kOk;
}
