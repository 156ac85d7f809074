// Row-wise INT8 quantisation, and what comes before it in a transformer (see fastq.h):
//   h = x + residual                                              written, too
//   y = x without its outliers, whose columns are flagged
//   y = h, a norm of h, or activation(x) * up
//   y = y / smooth, each element by its column's
//   y = y with every `rotation` consecutive elements replaced by their product with the Hadamard
//       matrix of that order: butterflies (a + b, a - b) of strides 1, 2, 4, ...
//   q = clamp(round_half_even(y / scale) + zero_point)
//
// A block has a row. Where rows are contiguous and aligned it reads 16 bytes at a time; other
// layouts are read element by element. What memory has is read once and held: in registers
// (quantize_held_rows.cuh), on Hopper by a cluster of blocks where one has too few; else, here, y
// and before it a norm's h as float32 in shared memory. (Rows in flight are what keeps memory busy,
// so registers are few.) Of a row that does not fit there, what remains is read again for each
// step, from L2.
//
// An RMS norm without bias or options takes two steps instead of three: its largest element follows
// from that of h * weight, and its scale multiplies the row's.
//
// Template parameters are the dtype, the source and the vector, which shape the registers, and
// whether there may be what few have (division by smooth, rotation, a product with up and no
// activation but relu; zero points and static scales of what is no plain row), which would double
// the code; all else is a branch that is the same for a whole row.
#pragma once

#include "quantize/quantize_held_rows.cuh"
#include "quantize/quantize_row.cuh"
#include "quantize/row_reduction.cuh"
#include "runtime/dependent_launch.cuh"

namespace fastq::cuda {

// The largest magnitudes of a row's elements; where it is asymmetric, of those above and below 0.
struct Extremes {
  float above = 0, below = 0;

  template <int kVector>
  __device__ void take(const float (&y)[kVector], bool is_asymmetric) {
    if (is_asymmetric) {
#pragma unroll
      for (const float x : y) above = max_or_nan(above, x), below = max_or_nan(below, -x);
    } else {
#pragma unroll
      for (const float x : y) above = max_or_nan(above, fabsf(x));
    }
  }
};

// A row, step by step. Each thread has every n-th vector of it, all the way, n the block's threads.
template <class Traits>
class RowQuantizer {
 public:
  using Index = typename Traits::Index;
  using Floats = typename Traits::Floats;
  static constexpr int kVector = Traits::kVector;

  __device__ RowQuantizer(const QuantizeParams& params, int64_t row, float* held)
      : p_(params.problem),
        row_(params.problem, row),
        step_(static_cast<Index>(blockDim.x) * kVector),
        first_(static_cast<Index>(threadIdx.x) * kVector),
        cols_(static_cast<Index>(params.problem.cols)),
        held_cols_(params.held),
        held_(held) {}

  // Reads the row as far as y, or h and its sum.
  __device__ void begin() {
    const bool is_layer = Traits::kIsNorm && p_.norm == Norm::kLayer;
    for_each([&](Index at, Floats& y) {
      if constexpr (Traits::kIsNorm) sum = add(y, !is_layer, 0, sum);
      if constexpr (!Traits::kIsNorm) end(at, y);
    });
  }

  __device__ void sum_squares() {
    sum = 0;
    for_each_again(
        [&](Index at, const Floats& h) { sum = add(h, true, at < cols_ ? mean : 0, sum); });
  }

  // From h to y.
  __device__ void normalize() {
    for_each_again([&](Index at, Floats& y) {
      end(at, y);
      if (at < held_cols_) put(at, y);
    });
  }

  template <RowRounding kRounding>
  __device__ void store(int8_t* q, const RowScale& scale) const {
    for_each_again([&](Index at, auto& y) {
      if (at >= held_cols_) row_.end(at, mean, norm_scale, y);
      if (at < cols_) store_quantized<kRounding, Traits>(y, scale, q, p_.stride_qc, at);
    });
  }

  float sum = 0;                   // of h, or of its squares less the mean
  float mean = 0, norm_scale = 1;  // of a norm
  Extremes extremes;

 private:
  __device__ static float add(const Floats& h, bool squares, float mean, float sum) {
#pragma unroll
    for (const float x : h) sum = squares ? fmaf(x - mean, x - mean, sum) : sum + x;
    return sum;
  }

  __device__ void end(Index at, Floats& y) {
    row_.end(at, mean, norm_scale, y);
    if (!p_.is_static) extremes.take(y, p_.zero_point != nullptr);
  }

  __device__ Index step() const { return step_; }
  __device__ Index first() const { return first_; }

  // Of a vector of eight, the halves lie apart: so neighbours read neighbouring 16 bytes.
  __device__ void put(Index at, const Floats& x) const {
    if constexpr (kVector == 1) {
      held_[at] = x[0];
    } else {
#pragma unroll
      for (int i = 0; i < kVector / 4; ++i) {
        *reinterpret_cast<float4*>(part(at, i)) =
            make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
      }
    }
  }
  __device__ void get(Index at, Floats& x) const {
    if constexpr (kVector == 1) {
      x[0] = held_[at];
    } else {
#pragma unroll
      for (int i = 0; i < kVector / 4; ++i) {
        const float4 four = *reinterpret_cast<const float4*>(part(at, i));
        x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
      }
    }
  }
  __device__ float* part(Index at, int i) const {
    constexpr int kParts = kVector / 4;
    return held_ + i * (held_cols_ / kParts) + at / kParts;
  }

  // All threads together, with zeros past the row. Loads first, then what is made of them.
  template <class Visit>
  __device__ void read(Index begin, Floats* y, const Visit& visit) const {
    constexpr int kCount = Traits::kAtATime;
    typename QuantizeRow<Traits>::Loaded loaded[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (begin + i * step() < cols_) loaded[i] = row_.load(begin + i * step() + first());
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (begin + i * step() >= cols_) continue;
      const Index at = begin + i * step() + first();
      row_.begin(at, loaded[i], y[i]);
      visit(at, y[i]);
    }
  }
  template <class Visit>
  __device__ void for_each(const Visit& visit) const {
#pragma unroll 1
    for (Index begin = 0; begin < cols_; begin += Traits::kAtATime * step()) {
      Floats y[Traits::kAtATime];
      read(begin, y, visit);
#pragma unroll
      for (int i = 0; i < Traits::kAtATime; ++i) {
        const Index at = begin + i * step() + first();
        if (at < held_cols_) put(at, y[i]);
      }
    }
  }

  // Once more: what is held, and the rest from memory.
  template <class Visit>
  __device__ void for_each_again(const Visit& visit) const {
#pragma unroll 1
    for (Index begin = 0; begin < cols_; begin += Traits::kAtATime * step()) {
      Floats x[Traits::kAtATime];
#pragma unroll
      for (int i = 0; i < Traits::kAtATime; ++i) {
        const Index at = begin + i * step() + first();
        if (begin + i * step() < held_cols_) {
          get(at, x[i]);
        } else if (begin + i * step() < cols_) {
          row_.begin_again(at, row_.load_again(at), x[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < Traits::kAtATime; ++i) {
        if (begin + i * step() < cols_) visit(begin + i * step() + first(), x[i]);
      }
    }
  }

  const QuantizeProblem& p_;
  const QuantizeRow<Traits> row_;
  const Index step_, first_;
  const Index cols_, held_cols_;
  float* const held_;
};

template <class Traits>
__device__ inline void quantize_row(const QuantizeParams& params, float* held) {
  // Each is used once.
  __shared__ alignas(16) float sums[2][kMaxQuantizeThreads / 32];
  __shared__ uint32_t maxima[2][kMaxQuantizeThreads / 32];
  const QuantizeProblem& p = params.problem;
  const int64_t index = blockIdx.x;
  RowQuantizer<Traits> row(params, index, held);
  row.begin();
  if constexpr (Traits::kIsNorm) {
    if (p.norm == Norm::kLayer) {
      row.mean = sum_of_block(row.sum, sums[0]) * params.inverse_cols;
      row.sum_squares();
    }
    const float sum = sum_of_block(row.sum, sums[1]);
    row.norm_scale = rsqrtf(sum * params.inverse_cols + p.eps);
    row.normalize();
  }
  int8_t* const q = p.q + index * p.stride_qr;
  if (Traits::kSource == RowSource::kOutliers && p.cols + threadIdx.x < p.padded_cols) {
    q[p.cols + threadIdx.x] = 0;
  }
  if (p.is_static) {
    return row.template store<RowRounding::kStatic>(q, static_scale(*p.scale, p.zero_point));
  }
  const uint32_t above = maximum_of_block(row.extremes.above, maxima[0]);
  if (p.zero_point != nullptr) {
    const uint32_t below = maximum_of_block(row.extremes.below, maxima[1]);
    const RowScale scale = row_scale(above, below);
    if (threadIdx.x == 0) {
      p.scale[index * p.stride_s] = scale.scale;
      p.zero_point[index * p.stride_z] = scale.zero_point;
    }
    return row.template store<RowRounding::kAsymmetric>(q, scale);
  }
  const RowScale scale = row_scale(above);
  if (threadIdx.x == 0) p.scale[index * p.stride_s] = scale.scale;
  row.template store<RowRounding::kSymmetric>(q, scale);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResidentBlocks)
    quantize_rows(const __grid_constant__ QuantizeParams params) {
  extern __shared__ __align__(16) float held[];
  if constexpr (Traits::kInRegisters > 0) {
    __shared__ RowExchange exchange;
    RowBlocks blocks;
    exchange.open(blocks);
    wait_for_predecessor(params.starts_successor_early);
    quantize_held_row<Traits>(params, blocks, exchange);
  } else {
    wait_for_predecessor(params.starts_successor_early);
    quantize_row<Traits>(params, held);
  }
}

template <class T>
bool register_quantize_kernels(DType dtype) {
  const auto add = [dtype](auto traits) {
    using Traits = decltype(traits);
    register_quantize_kernel({dtype, Traits::kSource, Traits::kOptions, Traits::kVector,
                              Traits::kInRegisters, Traits::kThreads, &quantize_rows<Traits>});
  };
  constexpr int kVector = 16 / sizeof(T);
  add(QuantizeTraits<T, RowSource::kPlain, false, kVector, true>{});
  add(QuantizeTraits<T, RowSource::kPlain, true, kVector, true>{});
  add(QuantizeTraits<T, RowSource::kPlain, true, kVector, false>{});
  add(QuantizeTraits<T, RowSource::kPlain, true, 1, false>{});
  add(QuantizeTraits<T, RowSource::kOutliers, false, kVector, true>{});
  add(QuantizeTraits<T, RowSource::kOutliers, true, kVector, false>{});
  add(QuantizeTraits<T, RowSource::kOutliers, true, 1, false>{});
  add(QuantizeTraits<T, RowSource::kActivation, false, kVector, true>{});
  add(QuantizeTraits<T, RowSource::kLoneActivation, false, kVector, true>{});
  add(QuantizeTraits<T, RowSource::kActivation, true, kVector, true>{});
  add(QuantizeTraits<T, RowSource::kActivation, true, kVector, false>{});
  add(QuantizeTraits<T, RowSource::kActivation, true, 1, false>{});
  add(QuantizeTraits<T, RowSource::kRms, false, kVector, true>{});
  add(QuantizeTraits<T, RowSource::kLayer, false, kVector, true>{});
  add(QuantizeTraits<T, RowSource::kNorm, false, kVector, true>{});
  add(QuantizeTraits<T, RowSource::kNorm, true, kVector, true>{});
  add(QuantizeTraits<T, RowSource::kNorm, true, kVector, false>{});
  add(QuantizeTraits<T, RowSource::kNorm, true, 1, false>{});
  return true;
}

}  // namespace fastq::cuda
