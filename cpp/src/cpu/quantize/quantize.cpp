#include "cpu/quantize/quantize.hpp"

#include <algorithm>

#include "cpu/isa.hpp"
#include "cpu/quantize/quantize_kernels.hpp"
#include "cpu/thread_pool.hpp"

namespace fastq::cpu {
namespace {

constexpr int64_t kElementsPerTask = 64 * 1024;  // a few microseconds of work

// A norm or an activation is several times the work of the quantisation after it.
int64_t elements_per_task(const QuantizeProblem& p) {
  const bool is_costly = p.norm != Norm::kNone || p.activation != Activation::kNone;
  return is_costly ? kElementsPerTask / 4 : kElementsPerTask;
}

QuantizeRows kernel_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512Vnni) return kQuantizeRowsAvx512;
  if (isa == Isa::kAvx2) return kQuantizeRowsAvx2;
#endif
  (void)isa;
  return kQuantizeRowsScalar;
}

}  // namespace

void quantize(const QuantizeProblem& problem) {
  const QuantizeRows kernel = kernel_for(active_isa());
  const int64_t rows_per_task =
      std::max<int64_t>(1, elements_per_task(problem) / std::max<int64_t>(1, problem.cols));
  const int64_t tasks = (problem.rows + rows_per_task - 1) / rows_per_task;
  parallel_for(tasks, get_num_threads(), [&](int64_t task, int) {
    const int64_t first = task * rows_per_task;
    kernel(problem, first, std::min(first + rows_per_task, problem.rows));
  });
}

}  // namespace fastq::cpu
