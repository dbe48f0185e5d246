// How many of the R tokens before each token, of its document, have a score at least as high.
#include <algorithm>

#include "interface.h"

namespace taipan {
namespace {

// Numbers of `from` up to `to` that are at least `score`.
template <class T>
std::int64_t count_from(const T* from, const T* to, T score) {
  typename Simd<T>::Integer counts{};
  for (; from + kLanes<T> <= to; from += kLanes<T>) counts -= load(from) >= splat(score);
  std::int64_t count = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) count += counts[lane];
  for (; from < to; ++from) count += *from >= score;
  return count;
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(outranking, Outranking) {
  using namespace taipan;
  const Index tokens = call->tokens, reach = call->reach;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index b = 0; b < call->batch; ++b) {
    const Real* scores = call->scores + b * (reach + tokens);
    const std::int32_t* document = call->document == nullptr ? nullptr : call->document + b * tokens;
    Index begin = 0;  // of the token's document
    for (Index t = 0; t < tokens; ++t) {
      if (document != nullptr && document[t] != (t > 0 ? document[t - 1] : 0)) begin = reach + t;
      call->counts[b * tokens + t] = count_from(scores + std::min(std::max(t, begin), t + reach), scores + t + reach, scores[reach + t]);
    }
  }
  return kOk;
}
