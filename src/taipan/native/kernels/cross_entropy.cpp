// Cross-entropy of rows of logits, which become its gradient (softmax − one-hot) in place.
#include "gemm.h"

namespace taipan {
namespace {

template <class T>
void loss_and_gradient(Index rows, Index columns, T* logits, const std::int64_t* target, double* loss, int threads) {
  const Index whole = columns / kLanes<T> * kLanes<T>;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index r = 0; r < rows; ++r) {
    T* row = logits + r * columns;
    const T own = row[target[r]];
    T highest = row[0];
    Vector<T> high = splat(highest);
    for (Index c = 0; c < whole; c += kLanes<T>) {
      const Vector<T> value = load(row + c);
      high = high > value ? high : value;
    }
    for (int lane = 0; lane < kLanes<T>; ++lane) highest = highest > high[lane] ? highest : high[lane];
    for (Index c = whole; c < columns; ++c) highest = highest > row[c] ? highest : row[c];
    Vector<T> sums{};
    for (Index c = 0; c < whole; c += kLanes<T>) {
      const Vector<T> value = exponential(load(row + c) - highest);
      sums += value;
      store(row + c, value);
    }
    double total = sum<T>(sums);
    for (Index c = whole; c < columns; ++c) total += row[c] = std::exp(row[c] - highest);
    const T factor = static_cast<T>(1.0 / total);
    for (Index c = 0; c < whole; c += kLanes<T>) store(row + c, factor * load(row + c));
    for (Index c = whole; c < columns; ++c) row[c] *= factor;
    row[target[r]] -= T(1);
    loss[r] = std::log(total) + (static_cast<double>(highest) - static_cast<double>(own));
  }
}

}  // namespace
}  // namespace taipan

using Real = TAIPAN_REAL;

// logits (rows, columns) contiguous, targets in range.
extern "C" int taipan_cross_entropy(std::ptrdiff_t rows, std::ptrdiff_t columns, Real* logits,
                                    const std::int64_t* target, double* loss, int threads) {
  taipan::loss_and_gradient<Real>(rows, columns, logits, target, loss, threads);
  return taipan::kOk;
}
