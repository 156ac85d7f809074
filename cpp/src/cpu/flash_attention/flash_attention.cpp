#include "cpu/flash_attention/flash_attention.hpp"

#include <algorithm>

#include "cpu/flash_attention/flash_attention_kernels.hpp"
#include "cpu/isa.hpp"
#include "cpu/thread_pool.hpp"

namespace fastq::cpu {
namespace {

AttendRows kernel_for(Isa isa, DType dtype) {
#if defined(__x86_64__)
  if (isa == Isa::kAmx && dtype == DType::kBFloat16) return kAttendRowsAmx;
  if (isa >= Isa::kAvx512Vnni && isa != Isa::kNeon) return kAttendRowsAvx512;
  if (isa == Isa::kAvx2) return kAttendRowsAvx2;
#endif
  (void)isa, (void)dtype;
  return kAttendRowsScalar;
}

// Rows of a task: few enough that every thread gets some tasks.
int64_t rows_per_task(const FlashAttentionProblem& p, int threads) {
  const int64_t group = p.num_heads / p.num_heads_k;
  int64_t rows = kAttentionRows;
  const auto tasks = [&] {
    return p.batch * p.num_heads_k * ((p.seqlen_q * group + rows - 1) / rows);
  };
  while (rows > 32 && tasks() < 4 * threads) rows /= 2;
  return rows;
}

size_t scratch_bytes(const FlashAttentionProblem& p) {
  // Threads write to lines of their own.
  return (attention_scratch(p.head_dim) * sizeof(float) + 63) / 64 * 64;
}

}  // namespace

size_t flash_attention_workspace_size(const FlashAttentionProblem& p) {
  return get_num_threads() * scratch_bytes(p);
}

void flash_attention(const FlashAttentionProblem& p, Workspace& workspace) {
  const AttendRows kernel = kernel_for(active_isa(), p.dtype);
  const int threads = get_num_threads();
  const size_t bytes = scratch_bytes(p);
  char* const scratch = static_cast<char*>(workspace.get("flash_attention", threads * bytes));
  const int64_t group = p.num_heads / p.num_heads_k, step = rows_per_task(p, threads);
  const int64_t blocks = (p.seqlen_q * group + step - 1) / step;
  const int64_t heads = p.batch * p.num_heads_k;
  parallel_for(heads * blocks, threads, [&](int64_t index, int slot) {
    // With a causal mask the last rows of a sequence have the most to do: they come first.
    const int64_t block = blocks - 1 - index / heads;
    AttentionTask task{};
    task.batch = index % heads / p.num_heads_k, task.head_k = index % heads % p.num_heads_k;
    const int64_t b = task.batch, h = task.head_k * group;
    int64_t begin_q = 0, begin_k = 0;
    task.seqlen_q = p.seqlen_q, task.seqlen_k = p.seqlen_k;
    if (p.cu_seqlens_q != nullptr) {
      begin_q = p.cu_seqlens_q[b], begin_k = p.cu_seqlens_k[b];
      task.seqlen_q = p.cu_seqlens_q[b + 1] - begin_q;
      task.seqlen_k = p.cu_seqlens_k[b + 1] - begin_k;
    }
    task.last_key = task.seqlen_k;
    task.first_row = block * step;
    task.last_row = std::min(task.first_row + step, task.seqlen_q * group);
    if (task.first_row >= task.last_row) return;
    const auto first = [b](const AttentionTensor& t, int64_t seqlen, int64_t head) {
      return b * t.stride_batch + seqlen * t.stride_seqlen + head * t.stride_head;
    };
    task.q = first(p.q, begin_q, h), task.out = first(p.out, begin_q, h);
    task.k = first(p.k, begin_k, task.head_k), task.v = first(p.v, begin_k, task.head_k);
    task.lse = b * p.stride_lb + begin_q * p.stride_lq + h * p.stride_lh;
    kernel(p, task, reinterpret_cast<float*>(scratch + slot * bytes));
  });
}

}  // namespace fastq::cpu
