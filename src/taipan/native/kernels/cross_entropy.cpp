// Cross-entropy of rows of logits, which become its gradient (softmax − one-hot) in place.
#include "interface.h"
#include "narrow.h"

namespace taipan {
namespace {

// X is the type of the logits in memory; the softmax of a row is computed in T.
template <class T, class X>
int loss_and_gradient(Index rows, Index columns, X* logits, const std::int64_t* target, double* loss, int threads) {
  const Index whole = columns / kLanes<T> * kLanes<T>;
  int status = kOk;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : status)
  for (Index part = 0; part < threads; ++part) {
    Scratch& scratch = thread_scratch();
    if (!scratch.reserve(Scratch::bytes<T>(columns))) {
      status = kNoMemory;
      continue;
    }
    T* exponential_of = scratch.take<T>(columns);
    for (Index r = rows * part / threads; r < rows * (part + 1) / threads; ++r) {
      X* row = logits + r * columns;
      const T own = widen_one<T>(row[target[r]]);
      T highest = widen_one<T>(row[0]);
      Vector<T> high = splat(highest);
      for (Index c = 0; c < whole; c += kLanes<T>) {
        const Vector<T> value = widen<T>(row + c);
        high = high > value ? high : value;
      }
      for (int lane = 0; lane < kLanes<T>; ++lane) highest = highest > high[lane] ? highest : high[lane];
      for (Index c = whole; c < columns; ++c) {
        const T value = widen_one<T>(row[c]);
        highest = highest > value ? highest : value;
      }
      Vector<T> sums{};
      for (Index c = 0; c < whole; c += kLanes<T>) {
        const Vector<T> value = exponential(widen<T>(row + c) - highest);
        sums += value;
        store(exponential_of + c, value);
      }
      double total = sum<T>(sums);
      for (Index c = whole; c < columns; ++c)
        total += exponential_of[c] = std::exp(widen_one<T>(row[c]) - highest);
      const T factor = static_cast<T>(1.0 / total);
      for (Index c = 0; c < whole; c += kLanes<T>) narrow(row + c, factor * load(exponential_of + c));
      for (Index c = whole; c < columns; ++c) row[c] = narrow_one<X>(factor * exponential_of[c]);
      row[target[r]] = narrow_one<X>(factor * exponential_of[target[r]] - T(1));
      loss[r] = std::log(total) + (static_cast<double>(highest) - static_cast<double>(own));
    }
  }
  return status;
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(cross_entropy, CrossEntropy) {
  using namespace taipan;
  for (Index r = 0; r < call->rows; ++r)
    if (call->target[r] < 0 || call->target[r] >= call->columns) return kOutOfRange;
  return with_element<Real>(call->narrow, [&]<class X>() {
    return loss_and_gradient<Real, X>(call->rows, call->columns, static_cast<X*>(call->logits), call->target, call->loss,
                                      threads);
  });
}
