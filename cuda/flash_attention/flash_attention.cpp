#include "flash_attention/flash_attention.hpp"

#include "core/error.hpp"
#include "flash_attention/flash_attention_kernels.hpp"

namespace fastq::cuda {
namespace {

std::vector<AttentionKernel>& kernels() {
  static std::vector<AttentionKernel> list;
  return list;
}

const AttentionKernel& choose(const FlashAttentionProblem& p) {
  const AttentionKernel* best = nullptr;
  for (const AttentionKernel& kernel : kernels()) {
    if (kernel.dtype != p.dtype || kernel.head_dim < p.head_dim) continue;
    if (best == nullptr || kernel.head_dim < best->head_dim) best = &kernel;
  }
  if (best == nullptr) {
    not_implemented("flash_attention: q has dtype " + std::string(dtype_name(p.dtype)) +
                    ", expected float16 or bfloat16 on CUDA");
  }
  return *best;
}

[[maybe_unused]] const bool registered = register_loader([](const DeviceProps&) {
  for (const AttentionKernel& kernel : kernels()) kernel.load();
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
  choose(p);
  return 0;
}

void flash_attention(const FlashAttentionProblem& p, Workspace&) {
  const AttentionKernel& kernel = choose(p);
  const DeviceGuard guard(p.device_index);
  kernel.launch(p);
}

std::vector<std::string> flash_attention_instances() {
  std::vector<std::string> names;
  for (const AttentionKernel& kernel : kernels()) {
    names.push_back(std::string(family_name(kernel.family)) + "/" + dtype_name(kernel.dtype) + "_" +
                    std::to_string(kernel.head_dim));
  }
  return names;
}

}  // namespace fastq::cuda
