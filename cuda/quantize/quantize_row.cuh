// How quantize_rows.cuh comes from memory to y: loads, norms, activations, smooth and rotation.
//
// A rotation's short strides lie within a thread's vector, its long ones between lanes: a group is
// at most 32 elements and aligned, so it never leaves a warp, and all its lanes lie in the row or
// none. The shuffles want the whole warp, so all lanes go on together, with zeros past the row.
#pragma once

#include <type_traits>

#include "quantize/quantize_kernels.hpp"
#include "quantize/quantized_activation.cuh"
#include "quantize/row_scale.cuh"
#include "runtime/float_io.cuh"

namespace fastq::cuda {

template <class T_, RowSource kSource_, bool kOptions_, int kVector_, bool kHolds_>
struct QuantizeTraits {
  using T = T_;
  static constexpr RowSource kSource = kSource_;
  static constexpr bool kOptions = kOptions_;
  static constexpr int kVector = kVector_;
  // Whether y is what memory has, but for signs and divisions: then q has no error of its own.
  static constexpr bool kIsPlain = kSource == RowSource::kPlain;
  static constexpr bool kExact = kIsPlain || kSource == RowSource::kOutliers;
  static constexpr bool kActivates =
      kSource == RowSource::kActivation || kSource == RowSource::kLoneActivation;
  static constexpr bool kMultiplies = kSource == RowSource::kActivation || (kIsPlain && kOptions);
  static constexpr bool kIsRms = kSource == RowSource::kRms;
  static constexpr bool kIsLayer = kSource == RowSource::kLayer;
  static constexpr bool kIsNorm = kIsRms || kIsLayer || kSource == RowSource::kNorm;
  // Vectors of a row that each thread has at the most, all in registers; 0: a row of any length.
  // As memory has them; else floats.
  static constexpr bool kHoldsWords =
      (kExact && !kOptions) || kSource == RowSource::kLoneActivation;
  static constexpr int kInRegisters = !kHolds_ ? 0 : kHoldsWords ? 8 : 4;
  // Options take more than the 64 registers that the largest block leaves. Most other rows
  // of 16-bit elements as floats are left 56, so that three blocks with a row of 11008 columns find
  // room.
  static constexpr bool kIsHalf = std::is_same_v<T, __half>;
  static constexpr bool kIsWide = kHolds_ && kOptions && !kIsPlain;
  static constexpr bool kIsTight = kHolds_ && !kHoldsWords && !kIsWide && sizeof(T) == 2 &&
                                   kSource != RowSource::kNorm && !(kIsHalf && kOptions);
  static constexpr int kThreads = kIsWide ? 512 : kIsTight ? 576 : kMaxQuantizeThreads;
#if __CUDA_ARCH__ >= 900
  static constexpr int kResidentBlocks = kIsTight ? 2 : 1;
#else
  static constexpr int kResidentBlocks = 1;
#endif
  // Whether the code of usual rows is apart: not where there would be much of it for few.
  static constexpr bool kHasUsual =
      kHoldsWords ? sizeof(T) == 2 : kIsPlain || (!kOptions && kSource != RowSource::kNorm);
  // Vectors that a thread reads at once, where it does not hold them.
  static constexpr int kAtATime = kVector == 1 ? 1 : 2;
  // Single elements may be in a row of any length.
  using Index = std::conditional_t<kVector == 1, int64_t, int>;
  using Floats = float[kVector];
};

// kSize consecutive elements in each lane of a full warp; rotation <= 32 * kSize.
template <int kSize>
__device__ inline void rotate(float (&v)[kSize], int rotation) {
#pragma unroll
  for (int stride = 1; stride < kSize; stride *= 2) {
    if (stride >= rotation) return;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i & stride) continue;
      const float a = v[i], b = v[i + stride];
      v[i] = __fadd_rn(a, b);
      v[i + stride] = __fsub_rn(a, b);
    }
  }
  for (int lanes = 1; lanes * kSize < rotation; lanes *= 2) {
    const float sign = threadIdx.x & lanes ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, v[i], lanes);
      v[i] = __fmaf_rn(sign, v[i], other);  // the product is exact: one rounding
    }
  }
}

// Two 16-bit floats in a word.
template <class T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
template <class T>
__device__ inline Pair<T> pair_of(uint32_t word) {
  Pair<T> pair;
  memcpy(&pair, &word, 4);
  return pair;
}
template <class T>
__device__ inline uint32_t word_of(Pair<T> pair) {
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

// A vector of T as it lies in memory; zeros past the row. Words are taken apart only when all loads
// are on their way: the first use of a load waits for it.
template <class Traits>
struct RawVector {
  using T = typename Traits::T;
  std::conditional_t<Traits::kVector == 1, T, uint4> words;

  // What nothing writes meanwhile may be read out of order.
  template <bool kIsConstant = false>
  __device__ void load(const void* row, int64_t stride, typename Traits::Index at, bool is_there) {
    const auto* from = static_cast<const T*>(row);
    if constexpr (Traits::kVector == 1) {
      words = is_there ? from[at * stride] : from_float<T>(0);
    } else {
      words = make_uint4(0, 0, 0, 0);
      const auto* vector = reinterpret_cast<const uint4*>(from + at);
      if (is_there) words = kIsConstant ? __ldg(vector) : *vector;
    }
  }
  __device__ void store(void* row, int64_t stride, typename Traits::Index at) const {
    auto* const to = static_cast<T*>(row);
    if constexpr (Traits::kVector == 1) {
      to[at * stride] = words;
    } else {
      *reinterpret_cast<uint4*>(to + at) = words;
    }
  }
  __device__ void to_floats(typename Traits::Floats& x) const {
    if constexpr (Traits::kVector == 1) {
      x[0] = to_float(words);
    } else {
      unpack_16_bytes<T>(words, x);
    }
  }
  __device__ void clear() { words = {}; }
  // What the compiler has made of it.
  __device__ void forget() {
    if constexpr (Traits::kVector > 1) {
      asm("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
    }
  }
  // In one rounding to T, as the sum's rounding to float32 is never half-way between two of T.
  __device__ void add(const RawVector& other) {
    if constexpr (Traits::kVector == 1 || std::is_same_v<T, float>) {
      typename Traits::Floats x, y;
      to_floats(x), other.to_floats(y);
#pragma unroll
      for (int i = 0; i < Traits::kVector; ++i) x[i] += y[i];
      from_floats(x);
    } else {
      add_pairs(words.x, other.words.x), add_pairs(words.y, other.words.y);
      add_pairs(words.z, other.words.z), add_pairs(words.w, other.words.w);
    }
  }
  __device__ void from_floats(const typename Traits::Floats& x) {
    if constexpr (Traits::kVector == 1) {
      words = from_float<T>(x[0]);
    } else {
      words = pack_16_bytes<T>(x);
    }
  }

 private:
  __device__ static void add_pairs(uint32_t& word, uint32_t other) {
    word = word_of<T>(__hadd2_rn(pair_of<T>(word), pair_of<T>(other)));
  }
};

// Elements of a vector along the columns: weight, bias or smooth; zeros past them.
template <class Traits, bool kIsT>
__device__ inline void load_columns_as(const VectorView& v, typename Traits::Index at,
                                       bool is_there, typename Traits::Floats& x) {
  if constexpr (kIsT) {
    RawVector<Traits> raw;
    raw.template load<true>(v.data, v.stride, at, is_there);
    raw.to_floats(x);
  } else if constexpr (Traits::kVector == 1) {
    x[0] = is_there ? __ldg(static_cast<const float*>(v.data) + at * v.stride) : 0;
  } else {
    const float* const from = static_cast<const float*>(v.data) + at;
#pragma unroll
    for (int i = 0; i < Traits::kVector; i += 4) {
      float4 four = {};
      if (is_there) four = __ldg(reinterpret_cast<const float4*>(from + i));
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  }
}
template <class Traits>
__device__ inline void load_columns(const VectorView& v, typename Traits::Index at, bool is_there,
                                    typename Traits::Floats& x) {
  if (std::is_same_v<typename Traits::T, float> || v.dtype != DType::kFloat32) {
    load_columns_as<Traits, true>(v, at, is_there, x);
  } else {
    load_columns_as<Traits, false>(v, at, is_there, x);
  }
}

// Flags the outliers of a vector, given by one bit each. All lanes of a warp together.
template <class Traits>
__device__ inline void flag_outliers(const QuantizeProblem& p, int64_t row,
                                     typename Traits::Index at, uint32_t found) {
  constexpr int kVector = Traits::kVector;
  if (p.stride_mask == 0) {
    if (found != 0) atomicOr(p.outlier_mask + at / 32, found << at % 32);
    return;
  }
  // A byte at a time: by a thread with eight elements, by the first of two or of eight.
  if constexpr (kVector < 8) {
#pragma unroll
    for (int lanes = 1; lanes * kVector < 8; lanes *= 2) {
      found |= __shfl_down_sync(0xffffffffu, found, lanes) << lanes * kVector;
    }
    if (at % 8 != 0) return;
  }
  if (at >= p.cols) return;
  auto* const mask = reinterpret_cast<uint8_t*>(p.outlier_mask + row * p.stride_mask);
  mask[at / 8] = static_cast<uint8_t>(found);
}

template <RowRounding kRounding, class Traits>
__device__ inline void store_quantized(const typename Traits::Floats& y, const RowScale& scale,
                                       int8_t* q, int64_t stride, typename Traits::Index at) {
  if constexpr (Traits::kVector == 1) {
    q[at * stride] = quantize_element<kRounding, Traits::kExact>(y[0], scale);
  } else {
    PackedBytes<Traits::kVector> packed;
    quantize_elements<kRounding, Traits::kExact>(y, scale, packed.words);
    *reinterpret_cast<PackedBytes<Traits::kVector>*>(q + at) = packed;
  }
}

// A row on its way from memory to y.
template <class Traits>
class QuantizeRow {
 public:
  using T = typename Traits::T;
  using Index = typename Traits::Index;
  using Floats = typename Traits::Floats;
  using Raw = RawVector<Traits>;
  static constexpr int kVector = Traits::kVector;

  __device__ QuantizeRow(const QuantizeProblem& problem, int64_t row)
      : p_(problem),
        row_index_(row),
        cols_(static_cast<Index>(problem.cols)),
        x_(row_of(p_.x, row * p_.stride_xr)),
        up_(row_of(p_.up.data, row * p_.up.stride_m)),
        residual_(row_of(p_.residual.data, row * p_.residual.stride_m)),
        residual_out_(const_cast<T*>(row_of(p_.residual_out, row * p_.stride_or))) {}

  // What memory has for y, or for a norm; zeros past the row.
  struct Loaded {
    Raw x, other;
  };
  __device__ Loaded load(Index at) const {
    const bool is_there = at < cols_;
    Loaded its;
    its.x.load(x_, p_.stride_xc, at, is_there);
    if (Traits::kSource == RowSource::kActivation && up_ != nullptr) {
      its.other.load(up_, p_.up.stride_n, at, is_there);
    }
    if (Traits::kIsNorm && residual_ != nullptr) {
      its.other.load(residual_, p_.residual.stride_n, at, is_there);
    }
    return its;
  }

  // x, activated, or the sum with the residual, written.
  __device__ void begin(Index at, const Loaded& its, Floats& y) const {
    its.x.to_floats(y);
    if (Traits::kSource == RowSource::kPlain && p_.activation == Activation::kRelu) {
#pragma unroll
      for (float& x : y) x = max_or_nan(x, 0.0f);
    }
    if constexpr (Traits::kSource == RowSource::kOutliers) take_outliers(at, y);
    if constexpr (Traits::kSource == RowSource::kActivation) {
      activate_quantized(p_.activation, y);
    }
    if constexpr (Traits::kMultiplies) {
      if (up_ == nullptr) return;
      Floats up;
      Raw other = its.other;
      if (Traits::kSource == RowSource::kPlain) {
        other.load(up_, p_.up.stride_n, at, at < cols_);
      }
      other.to_floats(up);
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = __fmul_rn(y[i], up[i]);
    }
    if constexpr (Traits::kIsNorm) {
      if (residual_ == nullptr) return;
      Floats other;
      its.other.to_floats(other);
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] += other[i];
      Raw sum;
      sum.from_floats(y);
      if (at < cols_) sum.store(residual_out_, p_.stride_oc, at);
      sum.to_floats(y);
    }
  }

  // For what this thread has begun with before.
  __device__ Loaded load_again(Index at) const {
    if (!Traits::kIsNorm || residual_ == nullptr) return load(at);
    Loaded its;
    its.x.load(residual_out_, p_.stride_oc, at, at < cols_);
    return its;
  }
  __device__ void begin_again(Index at, const Loaded& its, Floats& y) const {
    if constexpr (Traits::kIsNorm) {
      its.x.to_floats(y);
    } else {
      begin(at, its, y);
    }
  }

  // What remains till y. A norm takes mean and scale.
  __device__ void end(Index at, float mean, float scale, Floats& y) const {
    const bool is_there = at < cols_;
    Floats of_columns;
    if constexpr (Traits::kIsNorm) {
      const bool has_mean = p_.norm == Norm::kLayer;
#pragma unroll
      for (float& x : y) x = (has_mean ? x - mean : x) * scale;
      if (p_.weight.data != nullptr) {
        load_columns<Traits>(p_.weight, at, is_there, of_columns);
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] *= of_columns[i];
      } else if (!is_there) {
#pragma unroll
        for (float& x : y) x = 0;
      }
      if (p_.bias.data != nullptr) {
        load_columns<Traits>(p_.bias, at, is_there, of_columns);
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] += of_columns[i];
      }
    }
    if (p_.smooth.data != nullptr) {
      load_columns<Traits>(p_.smooth, at, is_there, of_columns);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        y[i] = is_there ? __fmul_rn(y[i], reciprocal(of_columns[i])) : 0.0f;
      }
    }
    if (p_.rotation != 0) rotate(y, p_.rotation);
  }

 private:
  __device__ static const T* row_of(const void* data, int64_t offset) {
    return data == nullptr ? nullptr : static_cast<const T*>(data) + offset;
  }

  // Outliers are flagged, and zero from here on. All lanes of a warp together.
  __device__ void take_outliers(Index at, Floats& y) const {
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool is_outlier = fabsf(y[i]) >= p_.threshold;
      found |= static_cast<uint32_t>(is_outlier) << i;
      y[i] = is_outlier ? 0.0f : y[i];
    }
    flag_outliers<Traits>(p_, row_index_, at, found);
  }

  const QuantizeProblem& p_;
  const int64_t row_index_;
  const Index cols_;
  const T *x_, *up_, *residual_;
  T* residual_out_;
};

}  // namespace fastq::cuda
