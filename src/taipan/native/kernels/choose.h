// The next token from the logits of one row: penalty, temperature, top-k, top-p, min-p, draw; as generation/sampling.py.
//
// Nothing is sorted. What top-k and top-p keep is everything above one value, found by the leading digits of all values
// first and by later digits of those that share them. Of equal values the lowest ids are kept. Sums are in double.
#pragma once

#include <algorithm>
#include <limits>

#include "interface.h"

namespace taipan {

class Chooser {
 public:
  Chooser(Scratch& scratch, Index vocabulary, const Choice& how)
      : how_(how), vocabulary_(vocabulary), whole_(round_up(vocabulary, kLanes<float>)), value_(scratch.take<float>(whole_)),
        mass_(scratch.take<float>(whole_)), key_(scratch.take<std::uint32_t>(whole_)),
        other_key_(scratch.take<std::uint32_t>(whole_)), amount_(scratch.take<float>(whole_)),
        other_amount_(scratch.take<float>(whole_)), sum_(scratch.take<double>(kDigits)) {}

  // The token; -1 where a logit is NaN or, when it is drawn, none is finite. `uniform` is in [0, 1).
  template <class T>
  Index operator()(const T* logits, const std::uint8_t* seen, double uniform) {
    if constexpr (std::is_same_v<T, float>)
      if (!how_.sample && seen == nullptr && how_.excluded_count == 0) return likeliest(logits);
    for (Index i = 0; i < vocabulary_; ++i) value_[i] = static_cast<float>(logits[i]);
    for (Index i = vocabulary_; i < whole_; ++i) value_[i] = kNothing;
    for (Index n = 0; n < how_.excluded_count; ++n) value_[how_.excluded[n]] = kNothing;
    if (seen != nullptr) {
      const float penalty = static_cast<float>(how_.penalty);
      for (Index i = 0; i < vocabulary_; ++i)
        if (seen[i]) value_[i] = value_[i] > 0 ? value_[i] / penalty : value_[i] * penalty;
    }
    if (how_.sample && how_.temperature != 1) {
      const float temperature = static_cast<float>(how_.temperature);
      for (Index i = 0; i < whole_; i += kLanes<float>) store(value_ + i, load(value_ + i) / temperature);
    }
    float highest = 0;
    if (!find_highest(value_, whole_, highest)) return -1;
    if (!how_.sample) return std::find(value_, value_ + vocabulary_, highest) - value_;
    if (!std::isfinite(highest)) return -1;
    for (Index i = 0; i < whole_; i += kLanes<float>) store(mass_ + i, exponential(load(value_ + i) - highest));
    if (how_.top_k > 0 && how_.top_k < vocabulary_) keep_top_k();
    if (how_.top_p < 1) keep_top_p();
    if (how_.min_p > 0) {
      const float low = static_cast<float>(std::log(how_.min_p));
      for (Index i = 0; i < vocabulary_; ++i)
        if (value_[i] - highest < low) mass_[i] = 0;
    }
    return draw(uniform);
  }

 private:
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();
  static constexpr int kShift = 21, kBits = 11;
  static constexpr Index kDigits = Index(1) << kBits, kFew = 48;

  // What is kept: all above a key, and so many of that key.
  struct Limit {
    std::uint32_t key;
    double equal;
  };

  const Choice& how_;
  const Index vocabulary_, whole_;
  float *value_, *mass_;
  std::uint32_t *key_, *other_key_;
  float *amount_, *other_amount_;
  double* sum_;

  // Of `count` values, a multiple of the lanes; false where one is NaN.
  static bool find_highest(const float* values, Index count, float& highest) {
    Vector<float> high = splat(kNothing);
    Simd<float>::Integer bad{};
    for (Index i = 0; i < count; i += kLanes<float>) {
      const Vector<float> value = load(values + i);
      bad |= value != value;
      high = high > value ? high : value;
    }
    highest = high[0];
    for (int lane = 0; lane < kLanes<float>; ++lane) {
      if (bad[lane]) return false;
      highest = std::max(highest, high[lane]);
    }
    return true;
  }

  // The same token without a copy of the logits.
  Index likeliest(const float* logits) const {
    const Index whole = vocabulary_ / kLanes<float> * kLanes<float>;
    float highest = 0;
    if (!find_highest(logits, whole, highest)) return -1;
    if (whole == 0) highest = kNothing;
    for (Index i = whole; i < vocabulary_; ++i) {
      if (std::isnan(logits[i])) return -1;
      highest = std::max(highest, logits[i]);
    }
    return std::find(logits, logits + vocabulary_, highest) - logits;
  }

  static std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
  }

  // Rises with x.
  static std::uint32_t rising(float x) {
    const std::uint32_t bits = bits_of(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
  }

  // Of `count` keys with their amounts: from the highest, so many that what comes before each is less than `most`.
  Limit limit_of(Index count, double most) {
    double before = 0;
    std::uint32_t prefix = 0;
    for (int shift = kShift; ; shift -= kBits) {
      if (count <= kFew) return limit_of_few(count, most, before);
      const int down = std::max(shift, 0);
      const std::uint32_t digits = shift >= 0 ? kDigits - 1 : (1u << (kBits + shift)) - 1;
      std::uint32_t digit = 0;  // the highest there is
      for (Index n = 0; n < count; ++n) digit = std::max(digit, key_[n] >> down & digits);
      std::fill(sum_, sum_ + digit + 1, 0.0);
      for (Index n = 0; n < count; ++n) sum_[key_[n] >> down & digits] += static_cast<double>(amount_[n]);
      while (digit > 0 && before + sum_[digit] < most) before += sum_[digit--];
      prefix |= digit << down;
      Index kept = 0;
      for (Index n = 0; n < count; ++n) {
        if ((key_[n] >> down & digits) != digit) continue;
        other_key_[kept] = key_[n];
        other_amount_[kept++] = amount_[n];
      }
      std::swap(key_, other_key_);
      std::swap(amount_, other_amount_);
      count = kept;
      if (down == 0) break;
    }
    const double each = count > 0 ? static_cast<double>(amount_[0]) : 0.0;
    return {prefix, each > 0 ? std::max(1.0, std::ceil((most - before) / each)) : 1.0};
  }

  // The same by sorting them; so much comes `before` them.
  Limit limit_of_few(Index count, double most, double before) {
    for (Index n = 1; n < count; ++n) {
      const std::uint32_t key = key_[n];
      const float amount = amount_[n];
      Index to = n;
      for (; to > 0 && key_[to - 1] < key; --to) {
        key_[to] = key_[to - 1];
        amount_[to] = amount_[to - 1];
      }
      key_[to] = key;
      amount_[to] = amount;
    }
    double equal = 0;
    std::uint32_t last = 0;
    for (Index n = 0; n < count && (n == 0 || before < most); ++n) {
      equal = n > 0 && key_[n] == last ? equal + 1 : 1;
      last = key_[n];
      before += static_cast<double>(amount_[n]);
    }
    return {last, equal};
  }

  template <class Key>
  void keep(const Limit& limit, Key&& key_of) {
    double equal = limit.equal;
    for (Index i = 0; i < vocabulary_; ++i) {
      const std::uint32_t key = key_of(i);
      if (key < limit.key || (key == limit.key && equal-- < 1)) mass_[i] = 0;
    }
  }

  void keep_top_k() {
    const auto key_of = [this](Index i) { return rising(value_[i]); };
    for (Index i = 0; i < vocabulary_; ++i) {
      key_[i] = key_of(i);
      amount_[i] = 1;
    }
    keep(limit_of(vocabulary_, static_cast<double>(how_.top_k)), key_of);
  }

  void keep_top_p() {
    const double total = total_mass(), most = how_.top_p * total;
    // All that are less likely than this make up less than what may be left out.
    const float least = static_cast<float>((1 - how_.top_p) * total / static_cast<double>(vocabulary_) * 0.999);
    Index count = 0;
    for (Index i = 0; i < vocabulary_; ++i) {  // without a branch: they are hard to foresee
      key_[count] = bits_of(mass_[i]);
      amount_[count] = mass_[i];
      count += mass_[i] >= least && mass_[i] > 0;
    }
    keep(limit_of(count, most), [this](Index i) { return bits_of(mass_[i]); });
  }

  double mass_of(Index begin) const {
    double sum = 0;
    for (Index i = begin; i < begin + kLanes<float>; ++i) sum += static_cast<double>(mass_[i]);
    return sum;
  }

  double total_mass() const {
    double total = 0;
    for (Index i = 0; i < whole_; i += kLanes<float>) total += mass_of(i);
    return total;
  }

  // By inversion of the cumulative distribution in the order of the ids.
  Index draw(double uniform) const {
    const double point = uniform * total_mass();
    double before = 0;
    Index last = 0;
    for (Index begin = 0; begin < whole_; begin += kLanes<float>) {
      const double own = mass_of(begin);
      if (own == 0) continue;
      double sum = before;
      for (Index i = begin; i < begin + kLanes<float>; ++i) {
        if (mass_[i] == 0) continue;
        sum += static_cast<double>(mass_[i]);
        last = i;
        if (before + own > point && sum > point) return i;
      }
      if (before + own > point) return last;  // the sums of a block were rounded in another order
      before += own;
    }
    return last;
  }
};

}  // namespace taipan
