#include "int8_gemm/gather_outliers.hpp"

#include <algorithm>

#include "int8_gemm/gather_outliers.cuh"
#include "runtime/dependent_launch.cuh"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

constexpr int kThreads = 64;

// The successor waits for this kernel, and so for what came before it, whenever it starts.
__global__ void clear_mask(uint32_t* mask, int words, int32_t* counters) {
  let_successor_start();
  wait_for_predecessor();
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (at < words) mask[at] = 0;
  if (counters != nullptr && at < 2) counters[at] = 0;
}

__global__ void __launch_bounds__(kThreads, 16)
    gather_kernel(const __grid_constant__ OutlierParams p) {
  wait_for_predecessor();
  let_successor_start();
  __shared__ FoundOutliers found;
  find_outliers(p, found, [] { __syncthreads(); });
  const int warp = threadIdx.x / 32, warps = kThreads / 32;
  for (int64_t row = 32 * (int64_t{blockIdx.x} * warps + warp); row < std::max(p.M, p.N);
       row += int64_t{gridDim.x} * kThreads) {
    gather_rows<true>(p, found, static_cast<int>(row));
    gather_rows<false>(p, found, static_cast<int>(row));
  }
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

void clear_outlier_mask(uint32_t* mask, int64_t words, int32_t* counters, int device_index,
                        void* stream) {
  launch(&clear_mask, ceil_div(words, kThreads), device_index, stream, mask,
         static_cast<int>(words), counters);
}

void gather_outliers(const Int8GemmProblem& p) {
  const OutlierParams params = outlier_params(p);
  const int64_t blocks = ceil_div(std::max(p.M, p.N), kThreads);
  const int sm_count = device_props(p.device_index).sm_count;
  launch(&gather_kernel, std::clamp<int64_t>(blocks, 1, 4 * sm_count), p.device_index, p.stream,
         params);
}

}  // namespace fastq::cuda
