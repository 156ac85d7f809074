// out[r,c] = round_to(out_dtype, f32(q[r,c]) * scale[r])
//
// A grid-stride loop over vectors of 8 elements where rows are contiguous and aligned, over single
// elements otherwise.
#include "dequantize/dequantize.hpp"

#include <algorithm>

#include "runtime/device.hpp"
#include "runtime/float_io.cuh"

namespace fastq::cuda {
namespace {

constexpr int kThreads = 256, kVector = 8;

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_vector(DequantizeProblem p) {
  struct alignas(kVector) Quantized {
    int8_t values[kVector];
  };
  struct alignas(16) Result {
    T values[kVector];
  };
  const int64_t per_row = p.cols / kVector, total = per_row * p.rows;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t row = i / per_row, c = i % per_row * kVector;
    const auto q = *reinterpret_cast<const Quantized*>(p.q + row * p.stride_qr + c);
    const float scale = p.scale[row * p.stride_s];
    Result result;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      result.values[j] = from_float<T>(__fmul_rn(static_cast<float>(q.values[j]), scale));
    }
    *reinterpret_cast<Result*>(static_cast<T*>(p.out) + row * p.stride_or + c) = result;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_strided(DequantizeProblem p) {
  const int64_t total = p.cols * p.rows, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t row = i / p.cols, c = i % p.cols;
    const float q = static_cast<float>(p.q[row * p.stride_qr + c * p.stride_qc]);
    static_cast<T*>(p.out)[row * p.stride_or + c * p.stride_oc] =
        from_float<T>(__fmul_rn(q, p.scale[row * p.stride_s]));
  }
}

template <class T>
void launch(const DequantizeProblem& p) {
  const auto aligned = [&p](const void* data, int64_t stride, int64_t bytes, int64_t size) {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
           (p.rows == 1 || stride * size % bytes == 0);
  };
  const bool vector = p.stride_qc == 1 && p.stride_oc == 1 && p.cols % kVector == 0 &&
                      aligned(p.q, p.stride_qr, kVector, 1) &&
                      aligned(p.out, p.stride_or, 16, sizeof(T));
  const int64_t items = p.rows * (vector ? p.cols / kVector : p.cols);
  const int64_t resident = int64_t{16} * device_props(p.device_index).sm_count;
  const int64_t blocks = std::min((items + kThreads - 1) / kThreads, resident);
  const auto stream = static_cast<cudaStream_t>(p.stream);
  if (vector) {
    dequantize_vector<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  } else {
    dequantize_strided<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  }
  check(cudaGetLastError(), "launching dequantize");
}

template <class T>
void load() {
  load_kernel(reinterpret_cast<const void*>(&dequantize_vector<T>));
  load_kernel(reinterpret_cast<const void*>(&dequantize_strided<T>));
}

[[maybe_unused]] const bool registered = register_loader([](const DeviceProps&) {
  load<float>();
  load<__half>();
  load<__nv_bfloat16>();
});

}  // namespace

void dequantize(const DequantizeProblem& p) {
  const DeviceGuard guard(p.device_index);
  if (p.out_dtype == DType::kFloat32) {
    launch<float>(p);
  } else if (p.out_dtype == DType::kFloat16) {
    launch<__half>(p);
  } else {
    launch<__nv_bfloat16>(p);
  }
}

}  // namespace fastq::cuda
