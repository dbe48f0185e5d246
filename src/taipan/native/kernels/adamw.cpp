// A step of AdamW whose moments are kept in 8 bits (training/step/adamw8.py says how).
#include <algorithm>
#include <bit>

#include "interface.h"

namespace taipan {
namespace {

constexpr Index kMostInBlock = 256;

// Codes are the leading bits of a float32 between 2^-8 and 1, counted from below; 0 is 0.
constexpr std::int32_t kFirstShift = 19, kFirstOffset = 1905;    // sign, 4 bits of mantissa
constexpr std::int32_t kSecondShift = 18, kSecondOffset = 3809;  // 5 bits of mantissa

inline float first_level(std::int32_t code) {
  const std::int32_t size = code < 0 ? -code : code;
  const float level = std::bit_cast<float>((size + kFirstOffset) << kFirstShift);
  const float signed_level = code < 0 ? -level : level;
  return code == 0 ? 0.0f : signed_level;
}

inline float second_level(std::int32_t code) {
  const float level = std::bit_cast<float>((code + kSecondOffset) << kSecondShift);
  return code == 0 ? 0.0f : level;
}

inline std::int32_t first_code(float x) {
  const float size = x < 0.0f ? -x : x;
  const std::int32_t bits = std::bit_cast<std::int32_t>(size);
  const std::int32_t code = ((bits + (1 << (kFirstShift - 1))) >> kFirstShift) - kFirstOffset;
  const std::int32_t least = size >= 0.5f * 1.125f / 256.0f ? 1 : 0;
  const std::int32_t kept = code < 1 ? least : code;
  return x < 0.0f ? -kept : kept;
}

inline std::int32_t second_code(float x) {
  const std::int32_t bits = std::bit_cast<std::int32_t>(x);
  const std::int32_t code = ((bits + (1 << (kSecondShift - 1))) >> kSecondShift) - kSecondOffset;
  const std::int32_t least = x > 0.0f ? 1 : 0;  // rounded up: a root too small would make a step too large
  return code < 1 ? least : code;
}

// The largest of numbers that are not negative, whose bits are ordered as they are.
inline float largest(const float* x, Index count) {
  std::int32_t most = 0;
  for (Index i = 0; i < count; ++i) {
    const std::int32_t bits = std::bit_cast<std::int32_t>(x[i]);
    most = most > bits ? most : bits;
  }
  return std::bit_cast<float>(most);
}

void step_of_block(const AdamW& call, Index block) {
  const Index start = block * call.block, count = std::min(call.block, call.count - start);
  Real* parameter = call.parameter + start;
  const Real* gradient = call.gradient + start;
  std::int8_t* first = call.first + start;
  std::uint8_t* second = call.second + start;
  const Real beta1 = call.beta1, beta2 = call.beta2, rest1 = 1.0 - call.beta1, rest2 = 1.0 - call.beta2;
  const Real shrink = call.shrink, rate = call.rate, root = call.root, eps = call.eps;
  const float first_scale = call.first_scale[block], second_scale = call.second_scale[block];
  alignas(64) float mean[kMostInBlock], size[kMostInBlock], spread[kMostInBlock];
  for (Index i = 0; i < count; ++i) {
    const Real g = gradient[i];
    const Real before = first_level(first[i]) * first_scale, root_before = second_level(second[i]) * second_scale;
    const Real m = beta1 * before + rest1 * g;
    const Real r = std::sqrt(beta2 * (root_before * root_before) + rest2 * (g * g));
    parameter[i] = parameter[i] * shrink - rate * m / (r * root + eps);
    mean[i] = static_cast<float>(m);
    size[i] = mean[i] < 0.0f ? -mean[i] : mean[i];
    spread[i] = static_cast<float>(r);
  }
  const float most = largest(size, count), widest = largest(spread, count);
  call.first_scale[block] = most;
  call.second_scale[block] = widest;
  const float by_first = most > 0.0f ? most : 1.0f, by_second = widest > 0.0f ? widest : 1.0f;
  for (Index i = 0; i < count; ++i) first[i] = static_cast<std::int8_t>(first_code(mean[i] / by_first));
  for (Index i = 0; i < count; ++i) second[i] = static_cast<std::uint8_t>(second_code(spread[i] / by_second));
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(adamw, AdamW) {
  using namespace taipan;
  if (call->count < 0 || call->block < 1 || call->block > kMostInBlock) return kUnsupported;
  const Index blocks = (call->count + call->block - 1) / call->block;
#pragma omp parallel for num_threads(threads) schedule(static) if (blocks > 64)
  for (Index block = 0; block < blocks; ++block) step_of_block(*call, block);
  return kOk;
}
