// A thread adds up eight columns of a row, and finishes them as every GEMM does.
#include "int8_gemm/partial_sums.hpp"

#include "epilogue/output.cuh"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    finish_kernel(const int32_t* data, int64_t part_stride, int64_t ld, int parts,
                  const __grid_constant__ OutputParams output) {
  const int m = blockIdx.y, n = (blockIdx.x * kThreads + threadIdx.x) * kOutputColumns;
  if (n >= output.N) return;
  OutputColumns columns;
  load_columns(output, n, columns);
  const OutputRow row = load_row(output, m);
  int32_t sums[kOutputColumns] = {};
  const int32_t* from = data + m * ld + n;
  for (int part = 0; part < parts; ++part, from += part_stride) {
    const int4 x = reinterpret_cast<const int4*>(from)[0];
    const int4 y = reinterpret_cast<const int4*>(from)[1];
    sums[0] += x.x, sums[1] += x.y, sums[2] += x.z, sums[3] += x.w;
    sums[4] += y.x, sums[5] += y.y, sums[6] += y.z, sums[7] += y.w;
  }
  store_row(output, columns, row, m, n, sums, gathered_outliers(output));
}

[[maybe_unused]] const bool registered = register_loader(
    [](const DeviceProps&) { load_kernel(reinterpret_cast<const void*>(&finish_kernel)); });

}  // namespace

void finish_partial_sums(const PartialSums& sums, const Int8GemmProblem& problem,
                         cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(sums.N, kThreads * kOutputColumns)),
                  static_cast<unsigned>(sums.M));
  finish_kernel<<<grid, kThreads, 0, stream>>>(sums.data, sums.part_stride(), sums.ld(), sums.parts,
                                               output_params(problem));
  check(cudaGetLastError(), "launching the sum of the parts of an INT8 GEMM");
}

}  // namespace fastq::cuda
