#include "flash_decode/flash_decode.hpp"

#include <algorithm>
#include <array>

#include "core/error.hpp"
#include "core/integers.hpp"
#include "core/settled_weights.hpp"
#include "flash_decode/flash_decode_kernels.hpp"
#include "runtime/dependent_launch.cuh"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

std::vector<FlashDecodeKernel>& kernels() {
  static std::vector<FlashDecodeKernel> list;
  return list;
}

// By device: whether the kernels' code there can wait for its predecessor.
std::array<bool, kMaxDevices> launches_dependent{};

[[maybe_unused]] const bool registered = register_loader([](const DeviceProps& props) {
  int arch = load_flash_decode_combine();
  for (const FlashDecodeKernel& kernel : kernels()) arch = std::min(arch, kernel.load(props));
  launches_dependent[props.index] = arch >= kDependentLaunchArch;
});

// How many columns are fast: those that hold all queries of a key head, and no more. But more than
// 8 take longer to begin and to end, so where there are few keys, several tiles read them instead.
// Measured on an H200: the second time they come from L2. An int8 cache's 16 columns gain nothing.
int64_t wanted_columns(const FlashDecodeProblem& p) {
  const int64_t rows = p.seqlen_q * (p.num_heads / p.num_heads_k);
  const int64_t bytes = 2 * p.batch * p.cache.capacity * p.num_heads_k * p.head_dim *
                        static_cast<int64_t>(element_size(p.cache.dtype));
  const int64_t few = p.cache.dtype == DType::kInt8 ? 24 << 20 : 48 << 20;
  const int64_t some = p.cache.dtype == DType::kInt8 ? few : 160 << 20;
  return std::min<int64_t>(rows, bytes <= few ? 8 : bytes <= some ? 16 : rows);
}

// The smallest head_dim that holds the problem's; of those the fewest columns that hold as many as
// are wanted, or the most there are; of those the most stages that fit.
const FlashDecodeKernel& choose(const FlashDecodeProblem& p) {
  const int64_t wanted = wanted_columns(p);
  const auto prefers = [&](const FlashDecodeKernel& x, const FlashDecodeKernel& y) {
    if (x.head_dim != y.head_dim) return x.head_dim < y.head_dim;
    if (x.columns == y.columns) return x.stages > y.stages;
    return wanted <= std::min(x.columns, y.columns) ? x.columns < y.columns : x.columns > y.columns;
  };
  const FlashDecodeKernel* best = nullptr;
  for (const FlashDecodeKernel& kernel : kernels()) {
    if (kernel.dtype != p.dtype || kernel.cache_dtype != p.cache.dtype ||
        kernel.head_dim < p.head_dim || kernel.blocks_per_sm(p.device_index) == 0) {
      continue;
    }
    if (best == nullptr || prefers(kernel, *best)) best = &kernel;
  }
  if (best == nullptr) {
    not_implemented("flash_decode: q has dtype " + std::string(dtype_name(p.dtype)) +
                    ", expected float16 or bfloat16 on CUDA");
  }
  return *best;
}

// Rows of the cache begin at multiples of 16 bytes.
bool is_vectorizable(const FlashDecodeProblem& p) {
  const int64_t elements = 16 / element_size(p.cache.dtype);
  const auto is_aligned = [&](const AttentionTensor& t) {
    return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride_batch % elements == 0 &&
           t.stride_seqlen % elements == 0 && t.stride_head % elements == 0;
  };
  return p.head_dim % elements == 0 && is_aligned(p.cache.k) && is_aligned(p.cache.v);
}

// How many blocks of threads share a tile, of so many that the device holds; 0: pieces of all work
// are divided. That is for several sequences, whose lengths only the device knows, and where
// clusters would leave much of the device idle over many keys.
//
// All clusters must find room at a time, for a second wave of a few takes as long as the first; and
// in whatever order the blocks of the kernel before make room, so a sixth more than that must fit.
// What is idle and what are many keys was measured on an H200, in steps of LLaMA-7B with 32 and 8
// key heads, LLaMA-13B and OPT-30B.
int cluster_of(const FlashDecodeProblem& p, const FlashDecodeKernel& kernel, int64_t tiles,
               int64_t blocks) {
  if (p.batch > 1 || !launches_dependent[p.device_index]) return 0;
  const int64_t blocks_of_keys = ceil_div(p.cache.capacity, kernel.block_keys);
  int64_t most = std::min<int64_t>(blocks / tiles, kMaxDecodeCluster);
  const auto find_room = [&](int64_t size) {
    return 6 * kernel.clusters(p.device_index, static_cast<int>(size)) >= 7 * tiles;
  };
  while (most > 1 && !find_room(most)) --most;
  if (most < 2 || blocks_of_keys < 2) return 0;
  if (5 * most * tiles < 3 * blocks && blocks_of_keys > 6 * most) return 0;
  return static_cast<int>(ceil_div(blocks_of_keys, ceil_div(blocks_of_keys, most)));
}

struct Plan {
  FlashDecodeParams params;
  int64_t part_bytes, workspace_bytes;
};

Plan make_plan(const FlashDecodeProblem& p, const FlashDecodeKernel& kernel) {
  Plan plan{};
  FlashDecodeParams& params = plan.params;
  params.problem = p;
  params.appends = p.append != nullptr;
  if (params.appends) params.append = *p.append;
  const int group = static_cast<int>(p.num_heads / p.num_heads_k);
  params.group = cutlass::FastDivmod(group);
  params.columns = kernel.columns;
  params.padded_head_dim = kernel.head_dim;
  const int64_t rows = p.seqlen_q * group;
  const int64_t tiles = p.batch * ceil_div(rows, kernel.columns) * p.num_heads_k;
  if (rows > INT32_MAX || p.batch * p.num_heads * p.seqlen_q > INT32_MAX ||
      tiles * ceil_div(p.cache.capacity, kernel.block_keys) > INT32_MAX) {
    not_implemented("flash_decode: " + std::to_string(tiles) + " tiles of queries with up to " +
                    std::to_string(p.cache.capacity) + " tokens each are too many on CUDA");
  }
  params.tiles = cutlass::FastDivmod(static_cast<int>(ceil_div(rows, kernel.columns)));
  while (p.cache.page_size > 1 << params.page_shift) ++params.page_shift;
  params.is_vectorizable = is_vectorizable(p);
  params.launches_dependent = launches_dependent[p.device_index];
  params.is_settled = weights_are_settled;
  const int blocks = device_props(p.device_index).sm_count * kernel.blocks_per_sm(p.device_index);
  params.at_a_time = cutlass::FastDivmod(blocks);
  // Measured: what a multiprocessor gains by another piece of work is less than its start costs
  // where there is less to read.
  constexpr int64_t kLongLine = 6 << 20;  // bytes
  const int64_t bytes =
      2 * tiles * p.cache.capacity * p.head_dim * static_cast<int64_t>(element_size(p.cache.dtype));
  params.waves = bytes >= kLongLine * blocks ? kDecodeWaves : 1;
  params.cluster = cluster_of(p, kernel, tiles, blocks);
  if (params.cluster > 1) return plan;
  plan.part_bytes = 2 * params.waves * blocks * int64_t{kernel.columns} * (kernel.head_dim + 2) * 4;
  plan.workspace_bytes = plan.part_bytes + tiles * static_cast<int64_t>(sizeof(int2));
  return plan;
}

}  // namespace

bool register_flash_decode_kernel(const FlashDecodeKernel& kernel) {
  kernels().push_back(kernel);
  return true;
}

// Measured on an H200, in steps of LLaMA-7B: with one sequence one kernel for both takes 1 to 3 %
// of a step less, and with two to eight as much more.
bool flash_decode_appends(const FlashDecodeProblem& p) { return p.batch == 1 && p.seqlen_q == 1; }

size_t flash_decode_workspace_size(const FlashDecodeProblem& p) {
  const DeviceGuard guard(p.device_index);  // the kernels are loaded
  return make_plan(p, choose(p)).workspace_bytes;
}

void flash_decode(const FlashDecodeProblem& p, Workspace& workspace) {
  const DeviceGuard guard(p.device_index);
  const FlashDecodeKernel& kernel = choose(p);
  Plan plan = make_plan(p, kernel);
  auto* const memory = static_cast<char*>(workspace.get("flash_decode", plan.workspace_bytes));
  plan.params.parts = reinterpret_cast<float*>(memory);
  plan.params.parts_of_tile = reinterpret_cast<int2*>(memory + plan.part_bytes);
  const auto stream = static_cast<cudaStream_t>(p.stream);
  kernel.launch(plan.params, stream);
  if (plan.params.cluster <= 1) launch_flash_decode_combine(plan.params, stream);
}

std::vector<std::string> flash_decode_instances() {
  std::vector<std::string> names;
  for (const FlashDecodeKernel& kernel : kernels()) {
    names.push_back(std::string(dtype_name(kernel.dtype)) + "_" + dtype_name(kernel.cache_dtype) +
                    "_" + std::to_string(kernel.head_dim) + "x" + std::to_string(kernel.columns) +
                    "_" + std::to_string(kernel.stages));
  }
  return names;
}

}  // namespace fastq::cuda
