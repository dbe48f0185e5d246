// RMSNorm, of u = y · silu(z), of y alone or of the sum of a residual stream and a branch, forward and backward, each in
// one pass over memory.
#include <algorithm>

#include "narrow.h"

namespace taipan {
namespace {

struct Shape {
  Index rows, channels, group, y_row, z_row, narrow;
};

// X is what the rows are in memory.
template <class T, class X>
inline Vector<T> gated(const X* y, const X* z, Index c) {
  if (z == nullptr) return widen<T>(y + c);
  const Vector<T> gate = widen<T>(z + c);
  return widen<T>(y + c) * gate * sigmoid(gate);
}

// Room for u of a group.
template <class T>
T* group_scratch(const Shape& s) {
  Scratch& scratch = thread_scratch();
  return scratch.reserve(Scratch::bytes<T>(s.group)) ? scratch.take<T>(s.group) : nullptr;
}

template <class T>
T scale_of(const Shape& s, double eps, Vector<T> squares) {
  return static_cast<T>(1.0 / std::sqrt(static_cast<double>(sum<T>(squares)) / s.group + eps));
}

template <class T, class X>
int forward(const Shape& s, const X* y, const X* z, const T* weight, double eps, X* out, int threads) {
  int status = kOk;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : status)
  for (Index part = 0; part < threads; ++part) {
    T* u = group_scratch<T>(s);
    if (u == nullptr) {
      status = kNoMemory;
      continue;
    }
    for (Index row = s.rows * part / threads; row < s.rows * (part + 1) / threads; ++row) {
      const X *y_row = y + row * s.y_row, *z_row = z == nullptr ? nullptr : z + row * s.z_row;
      X* out_row = out + row * s.channels;
      for (Index begin = 0; begin < s.channels; begin += s.group) {
        Vector<T> squares{};
        for (Index c = 0; c < s.group; c += kLanes<T>) {
          const Vector<T> value = gated<T>(y_row, z_row, begin + c);
          squares += value * value;
          store(u + c, value);
        }
        const T scale = scale_of<T>(s, eps, squares);
        for (Index c = 0; c < s.group; c += kLanes<T>)
          narrow(out_row + begin + c, scale * load(u + c) * load(weight + begin + c));
      }
    }
  }
  return status;
}

// With n = u · scale and g = dout · weight: du = scale (g - n mean(g n)). dweight is per thread, (threads, C).
template <class T, class X>
int backward(const Shape& s, const X* y, const X* z, const T* weight, double eps, const X* dout, X* dy, X* dz,
             T* dweight, int threads) {
  int status = kOk;
  std::memset(dweight, 0, sizeof(T) * threads * s.channels);
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : status)
  for (Index part = 0; part < threads; ++part) {
    T *u = group_scratch<T>(s), *own = dweight + part * s.channels;
    if (u == nullptr) {
      status = kNoMemory;
      continue;
    }
    for (Index row = s.rows * part / threads; row < s.rows * (part + 1) / threads; ++row) {
      const X *y_row = y + row * s.y_row, *z_row = z == nullptr ? nullptr : z + row * s.z_row;
      const X* gradient = dout + row * s.channels;
      for (Index begin = 0; begin < s.channels; begin += s.group) {
        Vector<T> squares{}, products{};
        for (Index c = 0; c < s.group; c += kLanes<T>) {
          const Vector<T> value = gated<T>(y_row, z_row, begin + c);
          squares += value * value;
          products += value * widen<T>(gradient + begin + c) * load(weight + begin + c);
          store(u + c, value);
        }
        const T scale = scale_of<T>(s, eps, squares);
        const T mean = sum<T>(products) * scale * scale / s.group;
        for (Index c = 0; c < s.group; c += kLanes<T>) {
          const Index at = begin + c;
          const Vector<T> value = load(u + c), d = widen<T>(gradient + at);
          store(own + at, load(own + at) + d * value * scale);
          const Vector<T> du = scale * (d * load(weight + at) - value * mean);
          if (z == nullptr) {
            narrow(dy + row * s.channels + at, du);
            continue;
          }
          const Vector<T> gate = widen<T>(z_row + at), open = sigmoid(gate);
          narrow(dy + row * s.channels + at, du * gate * open);
          narrow(dz + row * s.channels + at, du * widen<T>(y_row + at) * open * (T(1) + gate * (T(1) - open)));
        }
      }
    }
  }
  return status;
}

// The residual stream, in T, a branch of it, which is X in memory, and what is normed, which is O: all contiguous.
struct SumShape {
  Index rows, channels, narrow_branch, narrow_out;
};

template <class T, class X, class O>
int sum_forward(const SumShape& s, const T* x, const X* branch, const T* weight, double eps, T* total, O* out,
                int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index row = 0; row < s.rows; ++row) {
    const Index begin = row * s.channels, end = begin + s.channels;
    Vector<T> squares{};
    for (Index at = begin; at < end; at += kLanes<T>) {
      const Vector<T> value = load(x + at) + widen<T>(branch + at);
      squares += value * value;
      store(total + at, value);
    }
    const T scale = static_cast<T>(1.0 / std::sqrt(static_cast<double>(sum<T>(squares)) / s.channels + eps));
    for (Index at = begin; at < end; at += kLanes<T>)
      narrow(out + at, scale * load(total + at) * load(weight + at - begin));
  }
  return kOk;
}

// As `backward`; both that were added get what the sum gets, through the norm and past it (dtotal, may be null).
template <class T, class X, class O>
int sum_backward(const SumShape& s, const T* total, const T* weight, double eps, const O* dout, const T* dtotal, T* dx,
                 X* dbranch, T* dweight, int threads) {
  std::memset(dweight, 0, sizeof(T) * threads * s.channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index part = 0; part < threads; ++part) {
    T* own = dweight + part * s.channels;
    for (Index row = s.rows * part / threads; row < s.rows * (part + 1) / threads; ++row) {
      const Index begin = row * s.channels, end = begin + s.channels;
      Vector<T> squares{}, products{};
      for (Index at = begin; at < end; at += kLanes<T>) {
        const Vector<T> value = load(total + at);
        squares += value * value;
        products += value * widen<T>(dout + at) * load(weight + at - begin);
      }
      const T scale = static_cast<T>(1.0 / std::sqrt(static_cast<double>(sum<T>(squares)) / s.channels + eps));
      const T mean = sum<T>(products) * scale * scale / s.channels;
      for (Index at = begin; at < end; at += kLanes<T>) {
        const Vector<T> value = load(total + at), d = widen<T>(dout + at);
        store(own + at - begin, load(own + at - begin) + d * value * scale);
        Vector<T> du = scale * (d * load(weight + at - begin) - value * mean);
        if (dtotal != nullptr) du = rounded<T>(du) + load(dtotal + at);  // as where the two are made one after the other
        store(dx + at, du);
        narrow(dbranch + at, du);
      }
    }
  }
  return kOk;
}

// Calls f<X, O>() for what a branch and what is normed are in memory.
template <class Real, class F>
int with_elements(const SumShape& s, F&& f) {
  return with_element<Real>(s.narrow_branch, [&]<class X>() {
    return with_element<Real>(s.narrow_out, [&]<class O>() { return f.template operator()<X, O>(); });
  });
}

}  // namespace
}  // namespace taipan

using Real = TAIPAN_REAL;

// Sizes are the fields of Shape in order; native.py of the op has the shapes of all else.
extern "C" int taipan_norm_forward(const std::ptrdiff_t* sizes, const void* y, const void* z, const Real* weight,
                                   double eps, void* out, int threads) {
  using namespace taipan;
  Shape s;
  std::memcpy(&s, sizes, sizeof s);
  return with_element<Real>(s.narrow, [&]<class X>() {
    return forward<Real, X>(s, static_cast<const X*>(y), static_cast<const X*>(z), weight, eps, static_cast<X*>(out),
                            threads);
  });
}

extern "C" int taipan_norm_backward(const std::ptrdiff_t* sizes, const void* y, const void* z, const Real* weight,
                                    double eps, const void* dout, void* dy, void* dz, Real* dweight, int threads) {
  using namespace taipan;
  Shape s;
  std::memcpy(&s, sizes, sizeof s);
  return with_element<Real>(s.narrow, [&]<class X>() {
    return backward<Real, X>(s, static_cast<const X*>(y), static_cast<const X*>(z), weight, eps,
                             static_cast<const X*>(dout), static_cast<X*>(dy), static_cast<X*>(dz), dweight, threads);
  });
}

extern "C" int taipan_norm_sum_forward(const std::ptrdiff_t* sizes, const Real* x, const void* branch, const Real* weight,
                                       double eps, Real* total, void* out, int threads) {
  using namespace taipan;
  SumShape s;
  std::memcpy(&s, sizes, sizeof s);
  return with_elements<Real>(s, [&]<class X, class O>() {
    return sum_forward(s, x, static_cast<const X*>(branch), weight, eps, total, static_cast<O*>(out), threads);
  });
}

extern "C" int taipan_norm_sum_backward(const std::ptrdiff_t* sizes, const Real* total, const Real* weight, double eps,
                                        const void* dout, const Real* dtotal, Real* dx, void* dbranch, Real* dweight,
                                        int threads) {
  using namespace taipan;
  SumShape s;
  std::memcpy(&s, sizes, sizeof s);
  return with_elements<Real>(s, [&]<class X, class O>() {
    return sum_backward(s, total, weight, eps, static_cast<const O*>(dout), dtotal, dx, static_cast<X*>(dbranch), dweight,
                        threads);
  });
}
