// Rows that lie in registers: each thread has every n-th vector of one, n the threads of its
// blocks. Plain ones are in held_words.cuh; a norm, an activation, or what options make of a plain
// row is held as float32.
//
// Instructions bound these kernels before memory does, so they are counted here: rows whose threads
// are all as busy are spared all questions.
#pragma once

#include "quantize/held_vectors.cuh"
#include "quantize/held_words.cuh"

namespace fastq::cuda {

// A row as float32: a norm, an activation, or what options make of a plain one. kIsUsual:
// symmetric, with a scale of its own, and a norm's weight and bias are as they mostly are.
template <class Traits, int kCount, bool kIsUsual>
class HeldFloats {
 public:
  using T = typename Traits::T;
  using Floats = typename Traits::Floats;
  using Raw = RawVector<Traits>;
  using Vectors = HeldVectors<Traits, kCount>;
  static constexpr int kVector = Traits::kVector, kVectors = Vectors::kVectors;
  static constexpr bool kIsRms = Traits::kIsRms, kIsLayer = Traits::kIsLayer;
  // A usual norm's h and weight stay as memory has them till y: floats would take more registers.
  static constexpr bool kHoldsH = kIsRms || kIsLayer;
  static constexpr bool kHasOther = Traits::kIsNorm || Traits::kMultiplies;

  __device__ HeldFloats(const QuantizeParams& params, RowBlocks& blocks, RowExchange& exchange)
      : params_(params),
        p_(params.problem),
        blocks_(blocks),
        exchange_(exchange),
        vectors_(params, blocks) {}

  __device__ void quantize() {
    begin();
    int8_t* const q = worked_out(p_.q + blocks_.row * p_.stride_qr);
    const bool writes_scale = threadIdx.x == 0 && blocks_.rank == 0;
    if constexpr (Traits::kIsNorm && !kIsRms) normalize();
    if constexpr (Traits::kOptions) finish();
    if (Traits::kOptions && !kIsUsual && p_.is_static) {
      return store<RowRounding::kStatic>(q, static_scale(*p_.scale, p_.zero_point));
    }
    if (Traits::kOptions && !kIsUsual && p_.zero_point != nullptr) {
      const auto [above, below] = extremes();
      const RowScale scale = row_scale(above, below);
      if (writes_scale) {
        p_.scale[blocks_.row * p_.stride_s] = scale.scale;
        p_.zero_point[blocks_.row * p_.stride_z] = scale.zero_point;
      }
      return store<RowRounding::kAsymmetric>(q, scale);
    }
    float absmax;
    if constexpr (kIsRms) {
      absmax = normalize_rms();
    } else {
      absmax = __uint_as_float(exchange_.maximum(blocks_, largest(), 0));
    }
    const float scale = symmetric_scale(__float_as_uint(absmax));
    if (writes_scale) p_.scale[blocks_.row * p_.stride_s] = scale;
    if constexpr (Traits::kExact) {
      return store<RowRounding::kSymmetric>(q, row_with_scale(scale));
    } else {
      if (__float_as_uint(absmax) >= 0x7f800000u) return vectors_.store_zeros(q);
      float factor = reciprocal(scale);
      if constexpr (kIsRms) {
        if (factor * norm_scale_ <= FLT_MAX) {
          factor *= norm_scale_;
        } else {
          multiply(norm_scale_);
        }
      }
      vectors_.for_each([&](int i, int at) {
        if (is_copy_of_none(i)) return;
        store_packed<kVector>(rounded_products(y_[i], factor), q, at);
      });
    }
  }

 private:
  // x, or the sum with the residual, written; activated; times up. All loads come first.
  __device__ void begin() {
    const auto row_of = [&](const void* data, int64_t stride) {
      return worked_out(static_cast<const T*>(data) + blocks_.row * stride);
    };
    const MatrixView& matrix = Traits::kIsNorm ? p_.residual : p_.up;
    const bool has_other = kHasOther && matrix.data != nullptr;
    Raw raw[kVectors], others[kHasOther ? kVectors : 1];
    const auto load = [&](Raw* to, const T* from) {
      vectors_.for_each([&](int i, int at) { to[i].load(from, 1, at, true); });
    };
    // Behind the code for a residual, ptxas would wait for x before it asks for weights. With one
    // they come later: the sum needs the registers.
    const auto load_weights = [&] {
      if constexpr (kHoldsH) load(weights_, static_cast<const T*>(p_.weight.data));
    };
    if (!has_other) load_weights();
    load(raw, row_of(p_.x, p_.stride_xr));
    if (has_other) load(others, row_of(matrix.data, matrix.stride_m));
    if (Traits::kIsNorm && has_other) {
      // The residual may be written in place. Only lanes of the same warp have copies of a vector
      // that is not their own: of a row with less than one a lane, which has one warp.
      __syncwarp();
      T* const out = const_cast<T*>(row_of(p_.residual_out, p_.stride_or));
      vectors_.for_each([&](int i, int at) {
        raw[i].add(others[i]);
        raw[i].store(out, 1, at);
      });
      load_weights();
    }
    const auto convert = [&](const auto& activate) {
      vectors_.for_each([&](int i, int) {
        raw[i].to_floats(y_[i]);
#pragma unroll
        for (float& y : y_[i]) y = activate(y);
        if (!Traits::kMultiplies || !has_other) return;
        Floats up;
        others[kHasOther ? i : 0].to_floats(up);
#pragma unroll
        for (int j = 0; j < kVector; ++j) y_[i][j] = __fmul_rn(y_[i][j], up[j]);
      });
    };
    if constexpr (Traits::kMultiplies) {
      with_quantized_activation<Traits::kIsPlain>(p_.activation, convert);
    } else if constexpr (kHoldsH) {
      vectors_.for_each([&](int i, int) { h_[i] = raw[i]; });
    } else {
      convert([](float y) { return y; });
    }
  }

  __device__ float largest() const {
    float largest = 0;
    vectors_.for_each([&](int i, int) {
#pragma unroll
      for (const float x : y_[i]) largest = max_or_nan(largest, fabsf(x));
    });
    return largest;
  }

  // From h to y without the norm's scale, which is left to the quantisation. Returns the largest
  // magnitude with it.
  __device__ float normalize_rms() {
    const float sum = sum_of_squares();
    weigh();
    const auto row = exchange_.sum_and_maximum(blocks_, sum, largest());
    norm_scale_ = rsqrtf(row.sum * params_.inverse_cols + p_.eps);
    return __uint_as_float(row.maximum) * norm_scale_;
  }

  // From h to y. The variance is what the squares' mean is more than the mean's square: both sums
  // are told at once. Where that is less than an eighth, it has lost digits, and is summed again.
  __device__ void normalize() {
    constexpr float kLeast = 0.125f;
    const bool are_usual = kIsUsual || (is_usual<T>(p_.weight) && is_usual<T>(p_.bias));
    float mean = 0, squares = sum_of_squares();
    if (kIsLayer || p_.norm == Norm::kLayer) {
      const float sum = sum_of_elements([](float h, float sum) { return sum + h; });
      const auto row = exchange_.sums(blocks_, sum, squares);
      mean = row.x * params_.inverse_cols;
      squares = fmaf(-mean, row.x, row.y);
      if (!(squares >= kLeast * row.y)) {
        forget();
        squares = exchange_.sum(blocks_, sum_of_elements([&](float h, float sum) {
                                  return fmaf(h - mean, h - mean, sum);
                                }));
      }
    } else {
      squares = exchange_.sum(blocks_, squares);
    }
    norm_scale_ = rsqrtf(squares * params_.inverse_cols + p_.eps);
    forget();
    if (are_usual) {
      vectors_.for_each([&](int i, int at) {
        Floats weight, bias;
        Raw of_columns;
        of_columns.template load<true>(p_.bias.data, 1, at, true);
        of_columns.to_floats(bias);
        if constexpr (kHoldsH) {
          weights_[i].to_floats(weight);
          h_[i].to_floats(y_[i]);
        } else {
          of_columns.template load<true>(p_.weight.data, 1, at, true);
          of_columns.to_floats(weight);
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          y_[i][j] = fmaf(y_[i][j] - mean, weight[j] * norm_scale_, bias[j]);
        }
      });
    } else {
      weigh_and_add(mean);
    }
  }

  // sum(add(h, sum)) over a thread's own elements.
  template <class Add>
  __device__ float sum_of_elements(const Add& add) const {
    float sum = 0;
    vectors_.for_each([&](int i, int) {
      Floats its;
      if constexpr (kHoldsH) h_[i].to_floats(its);
      float of_vector = 0;
#pragma unroll
      for (int j = 0; j < kVector; ++j) of_vector = add(kHoldsH ? its[j] : y_[i][j], of_vector);
      sum += vectors_.is_there(i) ? of_vector : 0;
    });
    return sum;
  }
  __device__ float sum_of_squares() const {
    return sum_of_elements([](float h, float sum) { return fmaf(h, h, sum); });
  }

  // Or the compiler would keep the floats that it has made of h. ptxas does, unless the words
  // change: it cannot know that the rows of this kernel have no rotation, so it is 0.
  __device__ void forget() {
    if constexpr (kHoldsH) vectors_.for_each([&](int i, int) { h_[i].forget(); });
    if constexpr (kIsLayer) {
      vectors_.for_each([&](int i, int) {
        each_word(h_[i].words, [&](uint32_t word, int) { return word ^ p_.rotation; });
      });
    }
  }

  // y = h * weight.
  __device__ void weigh() {
    forget();
    vectors_.for_each([&](int i, int) {
      h_[i].to_floats(y_[i]);
      Floats weight;
      weights_[i].to_floats(weight);
#pragma unroll
      for (int j = 0; j < kVector; ++j) y_[i][j] *= weight[j];
    });
  }

  // (y - mean) * weight * scale + bias, of any kind.
  __device__ void weigh_and_add(float mean) {
    vectors_.for_each([&](int i, int at) {
      Floats of_columns;
#pragma unroll
      for (float& y : y_[i]) y -= mean;
      if (p_.weight.data != nullptr) {
        load_columns<Traits>(p_.weight, at, true, of_columns);
#pragma unroll
        for (int j = 0; j < kVector; ++j) y_[i][j] *= of_columns[j];
      }
#pragma unroll
      for (float& y : y_[i]) y *= norm_scale_;
      if (p_.bias.data != nullptr) {
        load_columns<Traits>(p_.bias, at, true, of_columns);
#pragma unroll
        for (int j = 0; j < kVector; ++j) y_[i][j] += of_columns[j];
      }
    });
  }

  // smooth and rotation.
  __device__ void finish() {
    if (p_.smooth.data != nullptr) {
      if (is_usual<T>(p_.smooth)) {
        divide<true>();
      } else {
        divide<false>();
      }
    }
    if (p_.rotation != 0) {
      if (!vectors_.is_there(0)) clear(0);  // groups end with the row: no other has lanes of these
      vectors_.for_each([&](int i, int) { rotate(y_[i], p_.rotation); });
    }
  }

  // By smooth, which has x's dtype or is float32.
  template <bool kIsT>
  __device__ void divide() {
    vectors_.for_each([&](int i, int at) {
      Floats smooth;
      load_columns_as<Traits, kIsT>(p_.smooth, at, true, smooth);
#pragma unroll
      for (int j = 0; j < kVector; ++j) y_[i][j] = __fmul_rn(y_[i][j], reciprocal(smooth[j]));
    });
  }

  struct Bits {
    uint32_t above, below;
  };
  __device__ Bits extremes() {
    float above = 0, below = 0;
    vectors_.for_each([&](int i, int) {
#pragma unroll
      for (const float x : y_[i]) above = max_or_nan(above, x), below = max_or_nan(below, -x);
    });
    return {exchange_.maximum(blocks_, above, 0), exchange_.maximum(blocks_, below, 1)};
  }

  __device__ void clear(int i) {
#pragma unroll
    for (float& y : y_[i]) y = 0;
  }

  // Of a rotation: copies of the row's last vector make no group.
  __device__ bool is_copy_of_none(int i) const {
    return Traits::kOptions && i == 0 && !vectors_.is_there(0);
  }

  // Seldom. (The compiler would rather select each product than branch.)
  __device__ void multiply(float factor) {
    asm volatile("");
    vectors_.for_each([&](int i, int) {
#pragma unroll
      for (float& y : y_[i]) y *= factor;
    });
  }

  template <RowRounding kRounding>
  __device__ void store(int8_t* q, const RowScale& scale) {
    if (scale.kept == 0) return vectors_.store_zeros(q);
    if (scale.lift != 1) multiply(scale.lift);
    vectors_.for_each([&](int i, int at) {
      if (is_copy_of_none(i)) return;
      store_packed<kVector>(quantized_bytes<kRounding, Traits::kExact>(y_[i], scale), q, at);
    });
  }

  const QuantizeParams& params_;
  const QuantizeProblem& p_;
  RowBlocks& blocks_;
  RowExchange& exchange_;
  const Vectors vectors_;
  float norm_scale_ = 1;
  Raw h_[kHoldsH ? kVectors : 1], weights_[kHoldsH ? kVectors : 1];
  Floats y_[kVectors];
};

template <class Traits, int kCount, bool kIsUsual>
__device__ inline void quantize_held_row(const QuantizeParams& params, RowBlocks& blocks,
                                         RowExchange& exchange) {
  if constexpr (Traits::kHoldsWords) {
    HeldWords<Traits, kCount, kIsUsual>(params, blocks, exchange).quantize();
  } else {
    HeldFloats<Traits, kCount, kIsUsual>(params, blocks, exchange).quantize();
  }
}

// The code of usual rows is written out by the number of a thread's vectors.
template <class Traits>
__device__ inline void quantize_held_row(const QuantizeParams& params, RowBlocks& blocks,
                                         RowExchange& exchange) {
#if __CUDA_ARCH__ >= 900
  constexpr bool kHasMost = true;
#else
  constexpr bool kHasMost = false;  // would take more registers
#endif
  constexpr int kMost = Traits::kInRegisters;
  if constexpr (Traits::kIsRms || Traits::kIsLayer) {
    return quantize_held_row<Traits, kMost, true>(params, blocks, exchange);
  } else if constexpr (Traits::kHasUsual) {
    const int count = params.usual_vectors;
    if (count == 1) return quantize_held_row<Traits, 1, true>(params, blocks, exchange);
    if (count == 2) return quantize_held_row<Traits, 2, true>(params, blocks, exchange);
    if constexpr (Traits::kSource != RowSource::kOutliers) {  // would take more registers
      if (count == 4) return quantize_held_row<Traits, 4, true>(params, blocks, exchange);
      if constexpr (kMost > 4 && kHasMost) {
        if (count == kMost) return quantize_held_row<Traits, kMost, true>(params, blocks, exchange);
      }
    }
  }
  if constexpr (!Traits::kIsRms && !Traits::kIsLayer) {
    quantize_held_row<Traits, 0, false>(params, blocks, exchange);
  }
}

}  // namespace fastq::cuda
