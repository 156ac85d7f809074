// A plain row that lies in registers as the words that memory has: half of what floats take, so
// twice the elements in flight; extremes, outliers and bounds are found in pairs. What is rounded
// is one product an element, where the row has been found to give what the division would.
#pragma once

#include "quantize/held_vectors.cuh"

namespace fastq::cuda {

// What is done to all four words of a vector.
template <class Function>
__device__ inline void each_word(uint4& words, const Function& function) {
  words.x = function(words.x, 0), words.y = function(words.y, 1);
  words.z = function(words.z, 2), words.w = function(words.w, 3);
}

// A word as one float32 or as two smaller ones: what is below 0 becomes 0, a NaN stays.
template <class T>
__device__ inline uint32_t word_above_zero(uint32_t word) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(max_or_nan(__uint_as_float(word), 0.0f));
  } else {
    return word_of<T>(__hmax2_nan(pair_of<T>(word), pair_of<T>(0)));
  }
}

// The extremes in words. Hopper has an instruction for the extreme of three pairs, but not of their
// magnitudes.
template <class T>
class ExtremesOfWords {
 public:
  __device__ void take(uint4 words) {
    each_word(words, [&](uint32_t word, int) {
      if constexpr (std::is_same_v<T, float>) {
        most_ = __float_as_uint(max_or_nan(__uint_as_float(most_), __uint_as_float(word)));
        least_ = __float_as_uint(-max_or_nan(-__uint_as_float(least_), -__uint_as_float(word)));
      } else {
        most_ = word_of<T>(__hmax2_nan(pair_of<T>(most_), pair_of<T>(word)));
        least_ = word_of<T>(__hmin2_nan(pair_of<T>(least_), pair_of<T>(word)));
      }
      return word;
    });
  }
  // Magnitudes of the largest number above 0 and of the smallest below.
  __device__ float above() const { return fabsf(largest(most_)); }
  __device__ float below() const { return fabsf(largest(least_ ^ kSigns)); }
  __device__ float magnitude() const { return max_or_nan(above(), below()); }

 private:
  static constexpr uint32_t kSigns = std::is_same_v<T, float> ? 0x80000000u : 0x80008000u;

  __device__ static float largest(uint32_t word) {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(word);
    } else {
      const Pair<T> two = pair_of<T>(word);
      return max_or_nan(to_float(two.x), to_float(two.y));
    }
  }

  uint32_t most_ = 0, least_ = 0;
};

// Takes the outliers out of a vector, and tells which they are by one bit each.
template <class T>
class OutlierFilter {
 public:
  // |x| >= threshold exactly where |x| is at least the next T that is not below it.
  __device__ explicit OutlierFilter(float threshold) {
    if constexpr (std::is_same_v<T, float>) {
      threshold_ = __float_as_uint(threshold);
    } else if constexpr (std::is_same_v<T, __half>) {
      threshold_ = word_of<T>(__half2half2(__float2half_ru(threshold)));
    } else {
      threshold_ = word_of<T>(__bfloat162bfloat162(__float2bfloat16_ru(threshold)));
    }
  }
  __device__ uint32_t take(uint4& words) const {
    uint32_t found = 0;
    each_word(words, [&](uint32_t word, int i) {
      if constexpr (std::is_same_v<T, float>) {
        const bool is_outlier = fabsf(__uint_as_float(word)) >= __uint_as_float(threshold_);
        found |= static_cast<uint32_t>(is_outlier) << i;
        return is_outlier ? 0u : word;
      } else {
        const uint32_t outliers = __hge2_mask(__habs2(pair_of<T>(word)), pair_of<T>(threshold_));
        found |= outliers & 0x00020001u << 2 * i;  // the high half's bit comes 16 too high
        return word & ~outliers;
      }
    });
    return (found | found >> 16) & 0xffu;
  }

 private:
  uint32_t threshold_;
};

// A row as memory has it, but for outliers and relu; activated as it is stored. kIsUsual:
// symmetric, with a scale of its own.
template <class Traits, int kCount, bool kIsUsual>
class HeldWords {
 public:
  using T = typename Traits::T;
  static constexpr int kVector = Traits::kVector;
  static constexpr bool kIsHalf = sizeof(T) == 2;

  __device__ HeldWords(const QuantizeParams& params, RowBlocks& blocks, RowExchange& exchange)
      : p_(params.problem), blocks_(blocks), exchange_(exchange), vectors_(params, blocks) {}

  __device__ void quantize() {
    const T* const x = worked_out(static_cast<const T*>(p_.x) + blocks_.row * p_.stride_xr);
    vectors_.for_each([&](int i, int at) { held_[i].load(x, 1, at, true); });
    if (Traits::kSource == RowSource::kPlain && p_.activation == Activation::kRelu) {
      vectors_.for_each([&](int i, int) {
        each_word(held_[i].words, [](uint32_t word, int) { return word_above_zero<T>(word); });
      });
    }
    if constexpr (Traits::kSource == RowSource::kOutliers) take_outliers();
    if constexpr (Traits::kSource == RowSource::kLoneActivation) {
      return with_curved_activation(p_.activation,
                                    [&](const auto& activate) { store_activated(activate, x); });
    }
    if constexpr (Traits::kSource == RowSource::kPlain && !kIsUsual) {
      if (p_.is_static) return store_static();
      if (p_.zero_point != nullptr) return store_asymmetric();
    }
    store_symmetric();
  }

 private:
  __device__ void take_outliers() {
    const OutlierFilter<T> filter(p_.threshold);
    vectors_.for_each([&](int i, int at) {
      const uint32_t found = filter.take(held_[i].words);
      const bool is_there = vectors_.is_there(i);
      flag_outliers<Traits>(p_, blocks_.row, is_there ? at : vectors_.last + kVector,
                            is_there ? found : 0);
    });
    if (blocks_.rank == 0 && p_.cols + threadIdx.x < p_.padded_cols) {
      p_.q[blocks_.row * p_.stride_qr + p_.cols + threadIdx.x] = 0;
    }
  }

  __device__ ExtremesOfWords<T> extremes() const {
    ExtremesOfWords<T> its;
    vectors_.for_each([&](int i, int) { its.take(held_[i].words); });
    return its;
  }
  __device__ int8_t* q() const { return worked_out(p_.q + blocks_.row * p_.stride_qr); }
  __device__ bool writes_scale() const { return threadIdx.x == 0 && blocks_.rank == 0; }

  __device__ void store_symmetric() const {
    const uint32_t absmax = exchange_.maximum(blocks_, extremes().magnitude(), 0);
    const float scale = symmetric_scale(absmax);
    if (writes_scale()) p_.scale[blocks_.row * p_.stride_s] = scale;
    if (absmax >= 0x7f800000u) return vectors_.store_zeros(q());
    if constexpr (kIsHalf) {
      const float factor = factor_of_halves<T>(__uint_as_float(absmax), scale);
      if (!std::is_same_v<T, __half> || factor != 0) {
        return store([&](const auto& y) { return rounded_products(y, factor); });
      }
    }
    store_exactly<RowRounding::kSymmetric>(row_with_scale(scale));
  }

  // Each element is activated once, on its way out, as the largest result is known before: it is
  // that of the largest element, unless none is large, since results below 0 are no less than
  // -0.28.
  template <class Activate>
  __device__ void store_activated(const Activate& activate, const T* x) const {
    constexpr float kLeast = 0.28f;
    const uint32_t most = exchange_.maximum(blocks_, extremes().above(), 0);
    float absmax = fabsf(activate(__uint_as_float(most)));
    if (absmax < kLeast) {
      float largest = 0;
#pragma unroll 1
      for (int i = 0; i < vectors_.count; ++i) {
        RawVector<Traits> raw;
        typename Traits::Floats y;
        raw.load(x, 1, vectors_.at(i), true);
        raw.to_floats(y);
#pragma unroll
        for (const float its : y) largest = fmaxf(largest, fabsf(activate(its)));
      }
      absmax = __uint_as_float(exchange_.maximum(blocks_, largest, 1));
    }
    const float scale = symmetric_scale(__float_as_uint(absmax));
    if (writes_scale()) p_.scale[blocks_.row * p_.stride_s] = scale;
    if (__float_as_uint(absmax) >= 0x7f800000u) return vectors_.store_zeros(q());
    const float factor = reciprocal(scale);
    store([&](auto& y) {
#pragma unroll
      for (float& its : y) its = activate(its);
      return rounded_products(y, factor);
    });
  }

  __device__ void store_asymmetric() const {
    const ExtremesOfWords<T> its = extremes();
    const uint32_t above = exchange_.maximum(blocks_, its.above(), 0);
    const uint32_t below = exchange_.maximum(blocks_, its.below(), 1);
    const RowScale scale = row_scale(above, below);
    if (writes_scale()) {
      p_.scale[blocks_.row * p_.stride_s] = scale.scale;
      p_.zero_point[blocks_.row * p_.stride_z] = scale.zero_point;
    }
    if (max(above, below) >= 0x7f800000u) return vectors_.store_zeros(q());
    if constexpr (kIsHalf) {
      const float factor = factor_of_any<T>(scale.scale);
      if (factor != 0) {
        return store([&](const auto& y) { return shifted_products(y, factor, scale.zero_point); });
      }
    }
    store_exactly<RowRounding::kAsymmetric>(scale);
  }

  __device__ void store_static() {
    const RowScale scale = static_scale(*p_.scale, p_.zero_point);
    // 127 and 512 scales are within the normal numbers of T.
    const bool is_usual = kIsHalf && scale.scale >= 0x1p-20f && scale.scale <= 0x1p6f;
    if constexpr (kIsHalf) {
      const float factor = is_usual ? factor_of_any<T>(scale.scale) : 0;
      if (factor != 0) {
        if (p_.zero_point != nullptr) {
          // A NaN gives way to the bound.
          clamp(-512 * scale.scale, 512 * scale.scale);
          return store(
              [&](const auto& y) { return shifted_products(y, factor, scale.zero_point); });
        }
        if (!isnan(extremes().above())) {
          clamp(-127 * scale.scale, 127 * scale.scale);  // in T, within a quarter of a step
          return store([&](const auto& y) { return rounded_products(y, factor); });
        }
      }
    }
    store_exactly<RowRounding::kStatic>(scale);
  }

  __device__ void clamp(float low, float high) {
    if constexpr (kIsHalf) {
      const T both[2] = {from_float<T>(low), from_float<T>(high)};
      const Pair<T> least{both[0], both[0]}, most{both[1], both[1]};
      vectors_.for_each([&](int i, int) {
        each_word(held_[i].words, [&](uint32_t word, int) {
          return word_of<T>(__hmin2(__hmax2(pair_of<T>(word), least), most));
        });
      });
    }
  }

  // packed(y), of y as floats.
  template <class Pack>
  __device__ void store(const Pack& packed) const {
    int8_t* const to = q();
    vectors_.for_each([&](int i, int at) {
      typename Traits::Floats y;
      held_[i].to_floats(y);
      store_packed<kVector>(packed(y), to, at);
    });
  }
  template <RowRounding kRounding>
  __device__ void store_exactly(const RowScale& scale) const {
    store([&](const auto& y) {
      PackedBytes<kVector> q;
      quantize_elements<kRounding, true>(y, scale, q.words);
      return q;
    });
  }

  const QuantizeProblem& p_;
  RowBlocks& blocks_;
  RowExchange& exchange_;
  const HeldVectors<Traits, kCount> vectors_;
  RawVector<Traits> held_[HeldVectors<Traits, kCount>::kVectors];
};

}  // namespace fastq::cuda
