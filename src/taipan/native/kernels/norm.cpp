// RMSNorm, of u = y · silu(z) or of y alone, forward and backward, each in one pass over memory.
#include <algorithm>

#include "gemm.h"

namespace taipan {
namespace {

struct Shape {
  Index rows, channels, group, y_row, z_row;
};

template <class T>
inline Vector<T> gated(const T* y, const T* z, Index c) {
  if (z == nullptr) return load(y + c);
  const Vector<T> gate = load(z + c);
  return load(y + c) * gate * sigmoid(gate);
}

template <class T>
void forward(const Shape& s, const T* y, const T* z, const T* weight, double eps, T* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index row = 0; row < s.rows; ++row) {
    const T *y_row = y + row * s.y_row, *z_row = z == nullptr ? nullptr : z + row * s.z_row;
    T* out_row = out + row * s.channels;
    for (Index begin = 0; begin < s.channels; begin += s.group) {
      Vector<T> squares{};
      for (Index c = begin; c < begin + s.group; c += kLanes<T>) {
        const Vector<T> u = gated(y_row, z_row, c);
        squares += u * u;
        store(out_row + c, u);
      }
      const T scale = static_cast<T>(1.0 / std::sqrt(static_cast<double>(sum<T>(squares)) / s.group + eps));
      for (Index c = begin; c < begin + s.group; c += kLanes<T>)
        store(out_row + c, scale * load(out_row + c) * load(weight + c));
    }
  }
}

// With n = u · scale and g = dout · weight: du = scale (g - n mean(g n)). dweight is per thread, (threads, C).
template <class T>
int backward(const Shape& s, const T* y, const T* z, const T* weight, double eps, const T* dout, T* dy, T* dz,
             T* dweight, int threads) {
  int status = kOk;
  std::memset(dweight, 0, sizeof(T) * threads * s.channels);
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : status)
  for (Index part = 0; part < threads; ++part) {
    Scratch& scratch = thread_scratch();
    if (!scratch.reserve(Scratch::bytes<T>(s.group))) {
      status = kNoMemory;
      continue;
    }
    T *u = scratch.take<T>(s.group), *own = dweight + part * s.channels;
    for (Index row = s.rows * part / threads; row < s.rows * (part + 1) / threads; ++row) {
      const T *y_row = y + row * s.y_row, *z_row = z == nullptr ? nullptr : z + row * s.z_row;
      const T* gradient = dout + row * s.channels;
      for (Index begin = 0; begin < s.channels; begin += s.group) {
        Vector<T> squares{}, products{};
        for (Index c = 0; c < s.group; c += kLanes<T>) {
          const Vector<T> value = gated(y_row, z_row, begin + c);
          squares += value * value;
          products += value * load(gradient + begin + c) * load(weight + begin + c);
          store(u + c, value);
        }
        const T scale = static_cast<T>(1.0 / std::sqrt(static_cast<double>(sum<T>(squares)) / s.group + eps));
        const T mean = sum<T>(products) * scale * scale / s.group;
        for (Index c = 0; c < s.group; c += kLanes<T>) {
          const Index at = begin + c;
          const Vector<T> value = load(u + c), d = load(gradient + at);
          store(own + at, load(own + at) + d * value * scale);
          const Vector<T> du = scale * (d * load(weight + at) - value * mean);
          if (z == nullptr) {
            store(dy + row * s.channels + at, du);
            continue;
          }
          const Vector<T> gate = load(z_row + at), open = sigmoid(gate);
          store(dy + row * s.channels + at, du * gate * open);
          store(dz + row * s.channels + at, du * load(y_row + at) * open * (T(1) + gate * (T(1) - open)));
        }
      }
    }
  }
  return status;
}

}  // namespace
}  // namespace taipan

using Real = TAIPAN_REAL;

// Sizes are the fields of Shape in order; native.py of the op has the shapes of all else.
extern "C" int taipan_norm_forward(const std::ptrdiff_t* sizes, const Real* y, const Real* z, const Real* weight,
                                   double eps, Real* out, int threads) {
  taipan::Shape s;
  std::memcpy(&s, sizes, sizeof s);
  taipan::forward<Real>(s, y, z, weight, eps, out, threads);
  return taipan::kOk;
}

extern "C" int taipan_norm_backward(const std::ptrdiff_t* sizes, const Real* y, const Real* z, const Real* weight,
                                    double eps, const Real* dout, Real* dy, Real* dz, Real* dweight, int threads) {
  taipan::Shape s;
  std::memcpy(&s, sizes, sizeof s);
  return taipan::backward<Real>(s, y, z, weight, eps, dout, dy, dz, dweight, threads);
}
