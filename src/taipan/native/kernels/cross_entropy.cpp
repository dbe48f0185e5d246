// Cross-entropy of rows of logits, which become its gradient (softmax − one-hot) in place if it is wanted.
#include "interface.h"
#include "narrow.h"

namespace taipan {
namespace {

template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

// The largest of a row. NaN may be lost: the sum of exponentials keeps it.
template <class T, class X>
T highest_of(Index columns, Index whole, const X* row) {
  constexpr int kChains = 4;  // a comparison and a choice take longer than the next load
  T highest = widen_one<T>(row[0]);
  Vector<T> high[kChains];
  for (auto& each : high) each = splat(highest);
  Index c = 0;
  for (; c + kChains * kLanes<T> <= whole; c += kChains * kLanes<T>)
    for (int n = 0; n < kChains; ++n) high[n] = larger(high[n], widen<T>(row + c + n * kLanes<T>));
  for (; c < whole; c += kLanes<T>) high[0] = larger(high[0], widen<T>(row + c));
  const Vector<T> all = larger(larger(high[0], high[1]), larger(high[2], high[3]));
  for (int lane = 0; lane < kLanes<T>; ++lane) highest = larger(highest, all[lane]);
  for (; c < columns; ++c) highest = larger(highest, widen_one<T>(row[c]));
  return highest;
}

// X is the type of the logits in memory; the softmax of a row is computed in T.
template <bool Learns, class T, class X>
int losses(Index rows, Index columns, X* logits, const std::int64_t* target, double* loss, int threads) {
  const Index whole = columns / kLanes<T> * kLanes<T>;
  int status = kOk;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : status)
  for (Index part = 0; part < threads; ++part) {
    Scratch& scratch = thread_scratch();
    if (Learns && !scratch.reserve(Scratch::bytes<T>(columns))) {
      status = kNoMemory;
      continue;
    }
    T* exponential_of = Learns ? scratch.take<T>(columns) : nullptr;
    for (Index r = rows * part / threads; r < rows * (part + 1) / threads; ++r) {
      X* row = logits + r * columns;
      const T own = widen_one<T>(row[target[r]]), highest = highest_of<T>(columns, whole, row);
      Vector<T> sums{};
      for (Index c = 0; c < whole; c += kLanes<T>) {
        const Vector<T> value = exponential_of_negative(widen<T>(row + c) - highest);
        sums += value;
        if (Learns) store(exponential_of + c, value);
      }
      double total = sum<T>(sums);
      for (Index c = whole; c < columns; ++c) {
        const T value = std::exp(widen_one<T>(row[c]) - highest);
        total += value;
        if (Learns) exponential_of[c] = value;
      }
      loss[r] = std::log(total) + (static_cast<double>(highest) - static_cast<double>(own));
      if (!Learns) continue;
      const T factor = static_cast<T>(1.0 / total);
      for (Index c = 0; c < whole; c += kLanes<T>) narrow(row + c, factor * load(exponential_of + c));
      for (Index c = whole; c < columns; ++c) row[c] = narrow_one<X>(factor * exponential_of[c]);
      row[target[r]] = narrow_one<X>(factor * exponential_of[target[r]] - T(1));
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
    const auto run = call->learns ? losses<true, Real, X> : losses<false, Real, X>;
    return run(call->rows, call->columns, static_cast<X*>(call->logits), call->target, call->loss, threads);
  });
}
