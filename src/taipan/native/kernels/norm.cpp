// RMSNorm, of u = y · silu(z), of y alone or of the sum of a residual stream and a branch, forward and backward, each in
// one pass over memory.
#include <algorithm>

#include "interface.h"
#include "narrow.h"

namespace taipan {
namespace {

using Shape = NormSizes;

constexpr Index kMultiple = 16;  // of a group, which every vector width divides

inline bool fits(const NormSizes& s) { return s.group > 0 && s.channels % s.group == 0 && s.group % kMultiple == 0; }

// X is the type of the rows in memory.
template <class T, class X>
inline Vector<T> gated(const X* y, const X* z, Index c) {
  if (z == nullptr) return widen<T>(y + c);
  const Vector<T> gate = widen<T>(z + c);
  return widen<T>(y + c) * gate * sigmoid(gate);
}

// Room for u of a group, and for as much again.
template <class T>
T* group_scratch(const Shape& s) {
  Scratch& scratch = thread_scratch();
  return scratch.reserve(2 * Scratch::bytes<T>(s.group)) ? scratch.take<T>(2 * s.group) : nullptr;
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
int backward(const Shape& s, const X* y, const X* z, const T* weight, double eps, const X* dout, X* dy, Index dy_row,
             X* dz, Index dz_row, T* dweight, int threads) {
  int status = kOk;
  std::memset(dweight, 0, sizeof(T) * threads * s.channels);
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : status)
  for (Index part = 0; part < threads; ++part) {
    T *u = group_scratch<T>(s), *opening = u + s.group, *own = dweight + part * s.channels;
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
          Vector<T> value = widen<T>(y_row + begin + c);
          if (z != nullptr) {
            const Vector<T> gate = widen<T>(z_row + begin + c), open = sigmoid(gate);
            value = value * gate * open;
            store(opening + c, open);
          }
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
            narrow(dy + row * dy_row + at, du);
            continue;
          }
          const Vector<T> gate = widen<T>(z_row + at), open = load(opening + c);
          narrow(dy + row * dy_row + at, du * gate * open);
          narrow(dz + row * dz_row + at, du * widen<T>(y_row + at) * open * (T(1) + gate * (T(1) - open)));
        }
      }
    }
  }
  return status;
}

using SumShape = NormSumSizes;

// X is the type of the branch in memory, O that of the normed result.
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

// As `backward`; both addends get the gradient of the sum, through the norm and past it (dtotal, may be null).
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
        if (dtotal != nullptr) du = rounded<T>(du) + load(dtotal + at);  // as in two separate steps
        store(dx + at, du);
        narrow(dbranch + at, du);
      }
    }
  }
  return kOk;
}

// Calls f<X, O>() with the types in memory of the branch and of the normed result.
template <class Real, class F>
int with_elements(const SumShape& s, F&& f) {
  return with_element<Real>(s.narrow_branch, [&]<class X>() {
    return with_element<Real>(s.narrow_out, [&]<class O>() { return f.template operator()<X, O>(); });
  });
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(norm_forward, NormForward) {
  using namespace taipan;
  const NormSizes s = call->sizes;
  if (!fits(s)) return kUnsupported;
  return with_element<Real>(s.narrow, [&]<class X>() {
    return forward<Real, X>(s, static_cast<const X*>(call->y), static_cast<const X*>(call->z), call->weight, call->eps,
                            static_cast<X*>(call->out), threads);
  });
}

TAIPAN_FUNCTION(norm_backward, NormBackward) {
  using namespace taipan;
  const NormSizes s = call->sizes;
  if (!fits(s) || (call->z == nullptr) != (call->dz == nullptr)) return kUnsupported;
  return with_element<Real>(s.narrow, [&]<class X>() {
    return backward<Real, X>(s, static_cast<const X*>(call->y), static_cast<const X*>(call->z), call->weight, call->eps,
                             static_cast<const X*>(call->dout), static_cast<X*>(call->dy), call->dy_row,
                             static_cast<X*>(call->dz), call->dz_row, call->dweight, threads);
  });
}

TAIPAN_FUNCTION(norm_sum_forward, NormSumForward) {
  using namespace taipan;
  const NormSumSizes s = call->sizes;
  if (s.channels % kMultiple != 0) return kUnsupported;
  return with_elements<Real>(s, [&]<class X, class O>() {
    return sum_forward(s, call->x, static_cast<const X*>(call->branch), call->weight, call->eps, call->total,
                       static_cast<O*>(call->out), threads);
  });
}

TAIPAN_FUNCTION(norm_sum_backward, NormSumBackward) {
  using namespace taipan;
  const NormSumSizes s = call->sizes;
  if (s.channels % kMultiple != 0) return kUnsupported;
  return with_elements<Real>(s, [&]<class X, class O>() {
    return sum_backward(s, call->total, call->weight, call->eps, static_cast<const O*>(call->dout), call->dtotal, call->dx,
                        static_cast<X*>(call->dbranch), call->dweight, threads);
  });
}
