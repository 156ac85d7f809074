// Row-wise symmetric INT8 quantisation:
//   scale[r] = absmax(x[r,:]) / 127   (1 for a row of zeros, never below FLT_MIN)
//   q[r,c]   = clamp(round_half_even(x[r,c] / scale[r]), -127, 127)
// of x as it is, or with every `rotation` consecutive elements replaced by their product with the
// Hadamard matrix of that order (QuaRot, Ashkboos et al., 2024; in blocks): butterflies
//   (x[i], x[i + stride]) = (x[i] + x[i + stride], x[i] - x[i + stride]),  stride 1, 2, 4, ...
//
// One block a row. When rows are contiguous and aligned, 16-byte loads; a row of up to
// kRegisterVectors vectors a thread stays in registers between the two steps, so memory is read
// once. Longer rows are read again (from L2), other layouts element by element.
//
// A rotation's short strides lie within a thread's vector, its long ones between lanes: a group is
// at most 32 elements and aligned, so it never leaves a warp, and all its lanes lie in the row or
// none. The shuffles want the whole warp, so its lanes go on together past the end of the row, with
// zeros.
#include "quantize/quantize.hpp"

#include <array>
#include <type_traits>

#include "quantize/row_scale.cuh"
#include "runtime/dependent_launch.cuh"
#include "runtime/device.hpp"
#include "runtime/float_io.cuh"

namespace fastq::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kRegisterVectors = 4;

__device__ inline uint32_t block_max(uint32_t value) {
  __shared__ uint32_t of_warp[kMaxThreads / 32];
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  const int warps = blockDim.x / 32;
  value = threadIdx.x % 32 < warps ? of_warp[threadIdx.x % 32] : 0;
  return __reduce_max_sync(0xffffffffu, value);
}

// Rotates kSize consecutive elements in each lane of a full warp; rotation <= 32 * kSize.
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

// What a thread works on: a vector as it lies in memory, or rotated, in float32.
template <int kVectorSize>
struct RotatedVector {
  static constexpr int kSize = kVectorSize;
  float values[kSize];
};
template <class T, bool kRotated>
using Held = std::conditional_t<kRotated, RotatedVector<Vector16<T>::kSize>, Vector16<T>>;

template <bool kRotated, class T>
__device__ inline Held<T, kRotated> held(const Vector16<T>& x, int rotation) {
  if constexpr (kRotated) {
    Held<T, kRotated> result;
#pragma unroll
    for (int i = 0; i < result.kSize; ++i) result.values[i] = to_float(x.values[i]);
    rotate(result.values, rotation);
    return result;
  } else {
    return x;
  }
}

// Where a loop over a row's `count` vectors or elements ends: for a rotation, with a whole warp.
template <bool kRotated, class Index>
__device__ inline Index loop_end(Index count) {
  return kRotated ? (count + 31) / 32 * 32 : count;
}

// x[at], or zeros past the end, which only a rotation reaches.
template <bool kRotated, class T>
__device__ inline Vector16<T> load_vector(const Vector16<T>* x, int at, int vectors) {
  if (!kRotated || at < vectors) return x[at];
  return {};
}

template <class Vector>
__device__ inline uint32_t vector_max(const Vector& v, uint32_t absmax) {
#pragma unroll
  for (int i = 0; i < Vector::kSize; ++i) absmax = max(absmax, abs_bits(to_float(v.values[i])));
  return absmax;
}

template <class Vector>
__device__ inline void store_vector(const Vector& v, const RowScale& row, int8_t* q) {
  constexpr int kSize = Vector::kSize;  // 4 or 8
  float x[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = to_float(v.values[i]);
  struct alignas(kSize) Packed {
    uint32_t words[kSize / 4];
  } packed;
  quantize_elements(x, row, packed.words);
  *reinterpret_cast<Packed*>(q) = packed;
}

template <class T, bool kRotated>
__global__ void __launch_bounds__(kMaxThreads) quantize_rows_vector(QuantizeProblem p) {
  using Vector = Vector16<T>;
  wait_for_predecessor();
  let_successor_start();
  const int64_t row = blockIdx.x;
  const auto* x = reinterpret_cast<const Vector*>(static_cast<const T*>(p.x) + row * p.stride_xr);
  int8_t* q = p.q + row * p.stride_qr;
  const int vectors = static_cast<int>(p.cols / Vector::kSize);
  const int end = loop_end<kRotated>(vectors);
  const int beyond = kRegisterVectors * blockDim.x + threadIdx.x;  // the first not in registers
  Vector loaded[kRegisterVectors];
  Held<T, kRotated> in_registers[kRegisterVectors];
  uint32_t absmax = 0;
#pragma unroll
  for (int i = 0; i < kRegisterVectors; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at < end) loaded[i] = load_vector<kRotated>(x, at, vectors);
  }
#pragma unroll
  for (int i = 0; i < kRegisterVectors; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at >= end) continue;
    in_registers[i] = held<kRotated>(loaded[i], p.rotation);
    absmax = vector_max(in_registers[i], absmax);
  }
  for (int at = beyond; at < end; at += blockDim.x) {
    const Vector v = load_vector<kRotated>(x, at, vectors);
    absmax = vector_max(held<kRotated>(v, p.rotation), absmax);
  }
  const RowScale scale = row_scale(block_max(absmax));
  if (threadIdx.x == 0) p.scale[row * p.stride_s] = scale.scale;
#pragma unroll
  for (int i = 0; i < kRegisterVectors; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at < vectors) store_vector(in_registers[i], scale, q + int64_t{at} * Vector::kSize);
  }
  for (int at = beyond; at < end; at += blockDim.x) {
    const auto v = held<kRotated>(load_vector<kRotated>(x, at, vectors), p.rotation);
    if (at < vectors) store_vector(v, scale, q + int64_t{at} * Vector::kSize);
  }
}

// Element c of a strided row, rotated with those of the other lanes; 0 past the end.
template <bool kRotated, class T>
__device__ inline float load_element(const T* x, int64_t c, const QuantizeProblem& p) {
  float v[1] = {!kRotated || c < p.cols ? to_float(x[c * p.stride_xc]) : 0.0f};
  if constexpr (kRotated) rotate(v, p.rotation);
  return v[0];
}

template <class T, bool kRotated>
__global__ void __launch_bounds__(kMaxThreads) quantize_rows_strided(QuantizeProblem p) {
  wait_for_predecessor();
  let_successor_start();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.stride_xr;
  int8_t* q = p.q + row * p.stride_qr;
  const int64_t end = loop_end<kRotated>(p.cols);
  uint32_t absmax = 0;
  for (int64_t c = threadIdx.x; c < end; c += blockDim.x) {
    absmax = max(absmax, abs_bits(load_element<kRotated>(x, c, p)));
  }
  const RowScale scale = row_scale(block_max(absmax));
  if (threadIdx.x == 0) p.scale[row * p.stride_s] = scale.scale;
  for (int64_t c = threadIdx.x; c < end; c += blockDim.x) {
    const float v = load_element<kRotated>(x, c, p);
    if (c < p.cols) q[c * p.stride_qc] = quantize_element(v, scale);
  }
}

// By device: whether the kernels' code there can wait for its predecessor.
std::array<bool, kMaxDevices> launches_dependent{};

template <class T, bool kRotated>
void launch(const QuantizeProblem& p, bool vector, int threads) {
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(p.rows);
  config.blockDim = static_cast<unsigned>(threads);
  config.stream = static_cast<cudaStream_t>(p.stream);
  cudaLaunchAttribute attribute = dependent_launch();
  config.attrs = &attribute;
  config.numAttrs = launches_dependent[p.device_index] ? 1 : 0;
  const auto kernel =
      vector ? &quantize_rows_vector<T, kRotated> : &quantize_rows_strided<T, kRotated>;
  check(cudaLaunchKernelEx(&config, kernel, p), "launching quantize");
}

template <class T>
void launch(const QuantizeProblem& p) {
  constexpr int kSize = Vector16<T>::kSize;
  const auto aligned = [&p](const void* data, int64_t stride, int64_t bytes, int64_t size) {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
           (p.rows == 1 || stride * size % bytes == 0);
  };
  const bool vector = p.stride_xc == 1 && p.stride_qc == 1 && p.cols % kSize == 0 && p.cols > 0 &&
                      p.cols / kSize <= INT32_MAX / 2 && aligned(p.x, p.stride_xr, 16, sizeof(T)) &&
                      aligned(p.q, p.stride_qr, kSize, 1);
  const int64_t work = vector ? (p.cols / kSize + 1) / 2 : p.cols;
  int threads = 32;
  while (threads < kMaxThreads && threads < work) threads *= 2;
  if (p.rotation != 0) {
    launch<T, true>(p, vector, threads);
  } else {
    launch<T, false>(p, vector, threads);
  }
}

template <class T, bool kRotated>
int load() {
  load_kernel(reinterpret_cast<const void*>(&quantize_rows_vector<T, kRotated>));
  return load_kernel(reinterpret_cast<const void*>(&quantize_rows_strided<T, kRotated>));
}

[[maybe_unused]] const bool registered = register_loader([](const DeviceProps& device) {
  int arch = 0;  // the same for every kernel of this file
  for (const auto load_pair :
       {&load<float, false>, &load<float, true>, &load<__half, false>, &load<__half, true>,
        &load<__nv_bfloat16, false>, &load<__nv_bfloat16, true>}) {
    arch = load_pair();
  }
  launches_dependent[device.index] = arch >= kDependentLaunchArch;
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
