#include "flash_attention/flash_attention.hpp"

#include <algorithm>
#include <cstdlib>

#include "core/error.hpp"
#include "flash_attention/flash_attention_kernels.hpp"

namespace fastq::cuda {
namespace {

std::vector<AttentionKernel>& kernels() {
  static std::vector<AttentionKernel> list;
  return list;
}

// Why the kernels for Hopper do not take a problem, or null.
const char* sm90_problem(const FlashAttentionProblem& p) {
  const DeviceProps& props = device_props(p.device_index);
  if (props.cc_major != 9) return "the GPU is no Hopper";
  if (!built_for_sm90a()) return "this build has no code for sm_90a";
  if (p.softcap > 0 || p.alibi_slopes != nullptr || p.softmax_scale < 0) {
    return "softcap, ALiBi and negative scales are left to sm80";
  }
  if (p.rows_k == 0) return "there are no keys";
  // What TMA can read.
  for (const AttentionTensor* t : {&p.q, &p.k, &p.v}) {
    if (p.head_dim % 8 != 0 || !is_aligned(*t, 8)) {
      return "rows do not begin at multiples of 16 bytes";
    }
    if (!tma_can_address(*t)) {
      return "a stride is 2^40 bytes or more";
    }
  }
  return nullptr;
}

// FASTQ_KERNELS may name a family; a configuration of another op has no effect here.
const AttentionKernel& choose(const FlashAttentionProblem& p) {
  if (p.seqlen_q + p.seqlen_k > INT32_MAX) {
    not_implemented("flash_attention: sequences of " + std::to_string(p.seqlen_q) + " and " +
                    std::to_string(p.seqlen_k) + " tokens, expected at most 2147483647 on CUDA");
  }
  const char* variable = std::getenv("FASTQ_KERNELS");
  const std::string forced = variable != nullptr ? variable : "";
  KernelFamily family = KernelFamily::kSm80;
  if (forced != "sm80") {
    const char* const problem = sm90_problem(p);
    if (problem == nullptr) family = KernelFamily::kSm90;
    if (forced == "sm90" && problem != nullptr) {
      not_implemented(std::string("flash_attention: FASTQ_KERNELS=sm90, but ") + problem);
    }
  }
  // Large tiles are faster where sequences are long, but a mask makes them compute scores that they
  // drop, and there may be too few of them. Measured on an H200: where the two of a head_dim meet.
  const bool is_masked = p.window_left >= 0 || p.window_right >= 0;
  const int64_t few_keys = is_masked ? 6144 : 1536;
  const auto prefers = [&](const AttentionKernel& x, const AttentionKernel& y) {
    if (x.head_dim != y.head_dim) return x.head_dim < y.head_dim;
    const int largest = std::max(x.tile_m, y.tile_m);
    const bool fills = p.batch * p.num_heads * ceil_div(p.seqlen_q, largest) >=
                       device_props(p.device_index).sm_count;
    return fills && p.seqlen_k > few_keys ? x.tile_m > y.tile_m : x.tile_m < y.tile_m;
  };
  const AttentionKernel* best = nullptr;
  for (const AttentionKernel& kernel : kernels()) {
    if (kernel.family != family || kernel.dtype != p.dtype || kernel.head_dim < p.head_dim) {
      continue;
    }
    if (best == nullptr || prefers(kernel, *best)) best = &kernel;
  }
  if (best == nullptr) {
    not_implemented("flash_attention: q has dtype " + std::string(dtype_name(p.dtype)) +
                    ", expected float16 or bfloat16 on CUDA");
  }
  return *best;
}

[[maybe_unused]] const bool registered = register_loader([](const DeviceProps& props) {
  for (const AttentionKernel& kernel : kernels()) {
    if (kernel.family == KernelFamily::kSm80 || props.cc_major == 9) kernel.load();
  }
});

}  // namespace

bool register_attention_kernel(const AttentionKernel& kernel) {
  kernels().push_back(kernel);
  return true;
}

unsigned attention_grid(int64_t blocks) {
  if (blocks > INT32_MAX) {
    not_implemented("flash_attention: " + std::to_string(blocks) +
                    " tiles of queries, expected at most 2147483647 on CUDA");
  }
  return static_cast<unsigned>(blocks);
}

size_t flash_attention_workspace_size(const FlashAttentionProblem& p) {
  return choose(p).workspace_size;
}

void flash_attention(const FlashAttentionProblem& p, Workspace& workspace) {
  const AttentionKernel& kernel = choose(p);
  const DeviceGuard guard(p.device_index);
  kernel.launch(p, workspace.get("flash_attention", kernel.workspace_size));
}

std::vector<std::string> flash_attention_instances() {
  std::vector<std::string> names;
  for (const AttentionKernel& kernel : kernels()) {
    names.push_back(std::string(family_name(kernel.family)) + "/" + dtype_name(kernel.dtype) + "_" +
                    std::to_string(kernel.head_dim) + "x" + std::to_string(kernel.tile_m));
  }
  return names;
}

}  // namespace fastq::cuda
