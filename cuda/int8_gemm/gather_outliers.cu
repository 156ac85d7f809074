#include "int8_gemm/gather_outliers.hpp"

#include <algorithm>

#include "int8_gemm/gather_outliers.cuh"
#include "runtime/dependent_launch.cuh"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

constexpr int kThreads = 64;

// The successor waits for this kernel, and so for what came before it, whenever it starts.
__global__ void clear_mask(uint32_t* mask, int words) {
  let_successor_start();
  wait_for_predecessor();
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (at < words) mask[at] = 0;
}

template <bool kIsX>
__device__ inline void gather_rows(const OutlierParams& p, const FoundOutliers& found, int rows,
                                   float* to, int64_t stride) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < rows; row += step) {
    const auto* scales = static_cast<const float*>(p.scale_b.data);
    const float scale = kIsX ? 0 : scales[row * p.scale_b.stride];
    for (int i = 0; i < found.gathered(); ++i) {
      const OutlierColumn<kIsX> column(p, found, i, static_cast<int>(row), 0);
      const float value = outlier_value<kIsX>(p, column.is_kept, *word_of(column.address),
                                              static_cast<uint32_t>(column.address));
      to[i * stride + row] = kIsX || column.is_kept ? value : __fmul_rn(value, scale);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 16)
    gather_kernel(const __grid_constant__ OutlierParams p) {
  wait_for_predecessor();
  let_successor_start();
  __shared__ FoundOutliers found;
  find_outliers(p, found, [] { __syncthreads(); });
  gather_rows<true>(p, found, p.M, p.split.gathered_x, p.split.stride_gx);
  gather_rows<false>(p, found, p.N, p.split.gathered_b, p.split.stride_gb);
}

// By device: whether the kernels' code there can wait for its predecessor.
bool launches_dependent[kMaxDevices] = {};

[[maybe_unused]] const bool registered = register_loader([](const DeviceProps& device) {
  load_kernel(reinterpret_cast<const void*>(&clear_mask));
  const int arch = load_kernel(reinterpret_cast<const void*>(&gather_kernel));
  launches_dependent[device.index] = arch >= kDependentLaunchArch;
});

template <class... Arguments>
void launch(void (*kernel)(Arguments...), int64_t blocks, int device, void* stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kThreads;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = dependent_launch();
  config.attrs = &attribute;
  config.numAttrs = launches_dependent[device] ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launching a kernel for outliers");
}

}  // namespace

int64_t mask_words(int64_t K) { return ceil_div(K, 32); }

void clear_outlier_mask(uint32_t* mask, int64_t words, int device_index, void* stream) {
  launch(&clear_mask, ceil_div(words, kThreads), device_index, stream, mask,
         static_cast<int>(words));
}

void gather_outliers(const Int8GemmProblem& p) {
  const OutlierParams params = outlier_params(p);
  const int64_t blocks = ceil_div(p.M + p.N, kThreads);
  const int sm_count = device_props(p.device_index).sm_count;
  launch(&gather_kernel, std::clamp<int64_t>(blocks, 1, 4 * sm_count), p.device_index, p.stream,
         params);
}

}  // namespace fastq::cuda
