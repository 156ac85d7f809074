// Every block finds all flagged columns from the masks; then a thread has one row of x or one
// column of b, and gathers there what belongs to the first kOutlierCapacity of them.
#include "llm_int8_matmul/gather_outliers.hpp"

#include <algorithm>

#include "core/integers.hpp"
#include "epilogue/outliers.cuh"
#include "runtime/dependent_launch.cuh"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

struct GatherParams {
  OutlierParams from;
  int64_t M, N, K;
  int32_t* outlier_count;  // may be null
  GatheredOutliers to;
};

__global__ void clear_mask(uint32_t* mask, int words) {
  wait_for_predecessor();
  let_successor_start();
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (at < words) mask[at] = 0;
}

// The bits of all masks, of columns 32 * word and on.
__device__ inline uint32_t flags(const GatherParams& g, int64_t words, int64_t word) {
  uint32_t bits = 0;
  if (word < words) {
#pragma unroll 8
    for (int row = 0; row < g.to.mask_rows; ++row) bits |= g.to.masks[row * words + word];
  }
  const int64_t left = g.K - 32 * word;
  return left >= 32 ? bits : left <= 0 ? 0 : bits & ((1u << left) - 1);
}

// The number of flagged columns, the first of which go to `columns`; block 0 writes them all.
__device__ inline int find_columns(const GatherParams& g, int (&columns)[kOutlierCapacity]) {
  __shared__ int of_warp[kWarps];
  const int64_t words = ceil_div(g.K, 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int found = 0;
  for (int64_t first = 0; first < words; first += kThreads) {
    const int64_t word = first + threadIdx.x;
    uint32_t bits = flags(g, words, word);
    const int count = __popc(bits);
    int up_to = count;  // this lane
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, up_to, lanes);
      if (lane >= lanes) up_to += other;
    }
    if (lane == 31) of_warp[warp] = up_to;
    __syncthreads();
    int at = found + up_to - count;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) at += of_warp[i];
      found += of_warp[i];
    }
    for (; bits != 0; bits &= bits - 1, ++at) {
      const int column = static_cast<int>(32 * word) + __ffs(bits) - 1;
      if (at < kOutlierCapacity) columns[at] = column;
      if (blockIdx.x == 0) g.to.columns[at] = column;
    }
    __syncthreads();
  }
  return found;
}

__global__ void __launch_bounds__(kThreads) gather(const __grid_constant__ GatherParams g) {
  // The product waits for this kernel. All that it reads before is b, and whatever wrote that has
  // finished, since the kernel before this one has waited for it.
  let_successor_start();
  wait_for_predecessor();
  __shared__ int columns[kOutlierCapacity];
  __shared__ int64_t kept[kOutlierCapacity];
  const int found = find_columns(g, columns);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *g.to.num_columns = found;
    if (g.outlier_count != nullptr) *g.outlier_count = found;
  }
  const int count = min(found, kOutlierCapacity);
  const int64_t blocks_m = ceil_div(g.M, kThreads);
  if (blockIdx.x < blocks_m) {
    const int64_t m = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (m >= g.M) return;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      g.to.x[i * g.to.stride_x + m] = outlier(g.from.split, m, columns[i]);
    }
    return;
  }
  if (threadIdx.x < count) kept[threadIdx.x] = kept_column(g.from.split, columns[threadIdx.x]);
  __syncthreads();
  const int64_t n = (blockIdx.x - blocks_m) * kThreads + threadIdx.x;
  if (n >= g.N) return;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    g.to.b[i * g.to.stride_b + n] = outlier_weight(g.from, columns[i], kept[i], n);
  }
}

// By device: whether the kernels' code there can wait for its predecessor.
bool launches_dependent[kMaxDevices] = {};

[[maybe_unused]] const bool registered = register_loader([](const DeviceProps& device) {
  load_kernel(reinterpret_cast<const void*>(&clear_mask));
  const int arch = load_kernel(reinterpret_cast<const void*>(&gather));
  launches_dependent[device.index] = arch >= kDependentLaunchArch;
});

template <class... Arguments>
void launch(void (*kernel)(Arguments...), int64_t blocks, int device, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kThreads;
  config.stream = stream;
  cudaLaunchAttribute attribute = dependent_launch();
  config.attrs = &attribute;
  config.numAttrs = launches_dependent[device] ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launching llm_int8_matmul's gather");
}

}  // namespace

int64_t mask_words(int64_t K) { return ceil_div(K, 32); }

void clear_outlier_mask(const LlmInt8MatmulProblem& p, const GatheredOutliers& to) {
  const int words = static_cast<int>(mask_words(p.K));
  if (words == 0) return;
  launch(&clear_mask, ceil_div(words, kThreads), p.device_index,
         static_cast<cudaStream_t>(p.stream), to.masks, words);
}

void gather_outliers(const LlmInt8MatmulProblem& p, const GatheredOutliers& to) {
  const GatherParams params{
      {p.split, p.b, p.stride_bk, p.stride_bn, p.scale_b}, p.M, p.N, p.K, p.outlier_count, to};
  const int64_t blocks = std::max<int64_t>(ceil_div(p.M, kThreads) + ceil_div(p.N, kThreads), 1);
  launch(&gather, blocks, p.device_index, static_cast<cudaStream_t>(p.stream), params);
}

}  // namespace fastq::cuda
