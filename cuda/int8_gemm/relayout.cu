// A tile of 64 x 64 bytes goes through shared memory, so that reads follow whichever dimension of
// the source is contiguous and writes are 16 bytes wide along K.
#include "int8_gemm/relayout.hpp"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

constexpr int kTile = 64, kThreads = 256;
constexpr int kPitch = kTile + 4;  // keeps a column of the tile out of one bank

__global__ void __launch_bounds__(kThreads)
    relayout_kernel(const int8_t* in, int64_t stride_r, int64_t stride_k, int64_t rows, int64_t K,
                    int8_t* out, int64_t ld, bool k_fastest) {
  __shared__ __align__(16) int8_t tile[kTile * kPitch];
  const int64_t k0 = int64_t{blockIdx.x} * kTile, r0 = int64_t{blockIdx.y} * kTile;
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int r = k_fastest ? i / kTile : i % kTile;
    const int k = k_fastest ? i % kTile : i / kTile;
    int8_t value = 0;
    if (r0 + r < rows && k0 + k < K) value = in[(r0 + r) * stride_r + (k0 + k) * stride_k];
    tile[r * kPitch + k] = value;
  }
  __syncthreads();
  const int r = threadIdx.x / 4, k = threadIdx.x % 4 * 16;
  if (r0 + r >= rows || k0 + k >= ld) return;
  const int* from = reinterpret_cast<const int*>(tile + r * kPitch + k);
  *reinterpret_cast<int4*>(out + (r0 + r) * ld + k0 + k) =
      make_int4(from[0], from[1], from[2], from[3]);
}

[[maybe_unused]] const bool registered = register_loader(
    [](const DeviceProps&) { load_kernel(reinterpret_cast<const void*>(&relayout_kernel)); });

}  // namespace

void relayout(const int8_t* in, int64_t stride_r, int64_t stride_k, int64_t rows, int64_t K,
              int8_t* out, int64_t ld, cudaStream_t stream) {
  // The grid's second dimension holds 65535 tiles at the most: longer operands go in pieces.
  constexpr int64_t kRowsPerLaunch = int64_t{65535} * kTile;
  for (int64_t r0 = 0; r0 < rows; r0 += kRowsPerLaunch) {
    const int64_t piece = rows - r0 < kRowsPerLaunch ? rows - r0 : kRowsPerLaunch;
    const dim3 grid(static_cast<unsigned>((K + kTile - 1) / kTile),
                    static_cast<unsigned>((piece + kTile - 1) / kTile));
    const bool k_fastest = stride_k == 1 || stride_r != 1;
    relayout_kernel<<<grid, kThreads, 0, stream>>>(in + r0 * stride_r, stride_r, stride_k, piece, K,
                                                   out + r0 * ld, ld, k_fastest);
    check(cudaGetLastError(), "launching the copy of an operand to K-major form");
  }
}

}  // namespace fastq::cuda
