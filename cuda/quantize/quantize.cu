// Row-wise symmetric INT8 quantisation:
//   scale[r] = absmax(x[r,:]) / 127   (1 for a row of zeros, never below FLT_MIN)
//   q[r,c]   = clamp(round_half_even(x[r,c] / scale[r]), -127, 127)
//
// One block a row. When rows are contiguous and aligned, 16-byte loads; a row of up to
// kRegisterVectors vectors a thread stays in registers between the two steps, so memory is read
// once. Longer rows are read again (from L2), other layouts element by element.
//
// The absmax is taken over the bits of |x|, as unsigned integers: their order is that of the
// numbers, with Inf above all and NaN above Inf, so neither is lost as fmaxf would lose a NaN.
#include "quantize/quantize.hpp"

#include <cfloat>

#include "runtime/device.hpp"
#include "runtime/float_io.cuh"

namespace fastq::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kRegisterVectors = 4;

__device__ inline uint32_t abs_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ inline uint32_t block_max(uint32_t value) {
  __shared__ uint32_t of_warp[kMaxThreads / 32];
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  const int warps = blockDim.x / 32;
  value = threadIdx.x % 32 < warps ? of_warp[threadIdx.x % 32] : 0;
  return __reduce_max_sync(0xffffffffu, value);
}

struct RowScale {
  float scale;
  bool finite;
};

__device__ inline RowScale row_scale(uint32_t absmax_bits) {
  const float absmax = __uint_as_float(absmax_bits);
  if (absmax_bits >= 0x7f800000u) return {absmax, false};
  if (absmax_bits == 0) return {1.0f, true};
  return {fmaxf(__fdiv_rn(absmax, 127.0f), FLT_MIN), true};
}

__device__ inline int8_t quantize_element(float x, RowScale row) {
  if (!row.finite) return 0;
  return static_cast<int8_t>(max(-127, min(127, __float2int_rn(__fdiv_rn(x, row.scale)))));
}

template <class T>
__device__ inline uint32_t vector_max(const Vector16<T>& v, uint32_t absmax) {
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; ++i)
    absmax = max(absmax, abs_bits(to_float(v.values[i])));
  return absmax;
}

template <class T>
__device__ inline void store_vector(const Vector16<T>& v, RowScale row, int8_t* q) {
  constexpr int kSize = Vector16<T>::kSize;  // 4 or 8
  struct alignas(kSize) Packed {
    int8_t values[kSize];
  } packed;
#pragma unroll
  for (int i = 0; i < kSize; ++i) packed.values[i] = quantize_element(to_float(v.values[i]), row);
  *reinterpret_cast<Packed*>(q) = packed;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) quantize_rows_vector(QuantizeProblem p) {
  using Vector = Vector16<T>;
  const int64_t row = blockIdx.x;
  const auto* x = reinterpret_cast<const Vector*>(static_cast<const T*>(p.x) + row * p.stride_xr);
  int8_t* q = p.q + row * p.stride_qr;
  const int vectors = static_cast<int>(p.cols / Vector::kSize);
  Vector held[kRegisterVectors];
  uint32_t absmax = 0;
#pragma unroll
  for (int i = 0; i < kRegisterVectors; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at < vectors) held[i] = x[at];
  }
#pragma unroll
  for (int i = 0; i < kRegisterVectors; ++i) {
    if (i * blockDim.x + threadIdx.x < vectors) absmax = vector_max(held[i], absmax);
  }
  for (int at = kRegisterVectors * blockDim.x + threadIdx.x; at < vectors; at += blockDim.x) {
    absmax = vector_max(x[at], absmax);
  }
  const RowScale scale = row_scale(block_max(absmax));
  if (threadIdx.x == 0) p.scale[row * p.stride_s] = scale.scale;
#pragma unroll
  for (int i = 0; i < kRegisterVectors; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at < vectors) store_vector(held[i], scale, q + int64_t{at} * Vector::kSize);
  }
  for (int at = kRegisterVectors * blockDim.x + threadIdx.x; at < vectors; at += blockDim.x) {
    store_vector(x[at], scale, q + int64_t{at} * Vector::kSize);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) quantize_rows_strided(QuantizeProblem p) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.stride_xr;
  int8_t* q = p.q + row * p.stride_qr;
  uint32_t absmax = 0;
  for (int64_t c = threadIdx.x; c < p.cols; c += blockDim.x) {
    absmax = max(absmax, abs_bits(to_float(x[c * p.stride_xc])));
  }
  const RowScale scale = row_scale(block_max(absmax));
  if (threadIdx.x == 0) p.scale[row * p.stride_s] = scale.scale;
  for (int64_t c = threadIdx.x; c < p.cols; c += blockDim.x) {
    q[c * p.stride_qc] = quantize_element(to_float(x[c * p.stride_xc]), scale);
  }
}

template <class T>
void launch(const QuantizeProblem& p) {
  constexpr int kSize = Vector16<T>::kSize;
  const auto aligned = [&p](const void* data, int64_t stride, int64_t bytes, int64_t size) {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
           (p.rows == 1 || stride * size % bytes == 0);
  };
  const bool vector = p.stride_xc == 1 && p.stride_qc == 1 && p.cols % kSize == 0 && p.cols > 0 &&
                      p.cols / kSize <= INT32_MAX && aligned(p.x, p.stride_xr, 16, sizeof(T)) &&
                      aligned(p.q, p.stride_qr, kSize, 1);
  const int64_t work = vector ? (p.cols / kSize + 1) / 2 : p.cols;
  int threads = 32;
  while (threads < kMaxThreads && threads < work) threads *= 2;
  const auto stream = static_cast<cudaStream_t>(p.stream);
  const auto blocks = static_cast<unsigned>(p.rows);
  if (vector) {
    quantize_rows_vector<T><<<blocks, threads, 0, stream>>>(p);
  } else {
    quantize_rows_strided<T><<<blocks, threads, 0, stream>>>(p);
  }
  check(cudaGetLastError(), "launching quantize");
}

template <class T>
void load() {
  load_kernel(reinterpret_cast<const void*>(&quantize_rows_vector<T>));
  load_kernel(reinterpret_cast<const void*>(&quantize_rows_strided<T>));
}

[[maybe_unused]] const bool registered = register_loader([](const DeviceProps&) {
  load<float>();
  load<__half>();
  load<__nv_bfloat16>();
});

}  // namespace

void quantize(const QuantizeProblem& problem) {
  const DeviceGuard guard(problem.device_index);
  QuantizeProblem p = problem;
  // The grid holds 2^31 - 1 rows at the most: more go in pieces.
  for (int64_t done = 0; done < problem.rows; done += p.rows) {
    p.rows = problem.rows - done < INT32_MAX ? problem.rows - done : INT32_MAX;
    const int64_t bytes = element_size(problem.x_dtype);
    p.x = static_cast<const char*>(problem.x) + done * problem.stride_xr * bytes;
    p.q = problem.q + done * problem.stride_qr;
    p.scale = problem.scale + done * problem.stride_s;
    if (p.x_dtype == DType::kFloat32) {
      launch<float>(p);
    } else if (p.x_dtype == DType::kFloat16) {
      launch<__half>(p);
    } else {
      launch<__nv_bfloat16>(p);
    }
  }
}

}  // namespace fastq::cuda
