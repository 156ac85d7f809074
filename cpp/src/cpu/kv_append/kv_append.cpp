#include "cpu/kv_append/kv_append.hpp"

#include <algorithm>

#include "core/integers.hpp"
#include "cpu/isa.hpp"
#include "cpu/kv_append/kv_append_kernels.hpp"
#include "cpu/thread_pool.hpp"

namespace fastq::cpu {
namespace {

constexpr int64_t kElementsPerTask = 64 * 1024;  // a few microseconds of work

AppendRows kernel_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512Vnni && isa != Isa::kNeon) return kAppendRowsAvx512;
  if (isa == Isa::kAvx2) return kAppendRowsAvx2;
#endif
  (void)isa;
  return kAppendRowsScalar;
}

}  // namespace

void kv_append(const KvAppendProblem& p) {
  const AppendRows kernel = kernel_for(active_isa());
  const int64_t rows = p.batch * p.seqlen_new;
  const int64_t elements = (p.num_heads + 2 * p.num_heads_k) * p.head_dim;
  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / elements);
  parallel_for(ceil_div(rows, rows_per_task), get_num_threads(), [&](int64_t task, int) {
    const int64_t first = task * rows_per_task;
    kernel(p, first, std::min(first + rows_per_task, rows));
  });
}

}  // namespace fastq::cpu
