// The second step of flash_decode: a tile whose keys were divided has several parts, each with the
// references r, the sums of exponentials l and the outputs o of its keys:
//   R = max r,  out = sum 2^(r - R) o / sum 2^(r - R) l,  lse = R + log l
// in an order that depends on their number alone. A row has one warp where there are many rows, and
// eight of them otherwise, which take parts in turn; a lane has four outputs at a time.
#include "core/integers.hpp"
#include "flash_decode/flash_decode_work.cuh"
#include "runtime/dependent_launch.cuh"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kVectors = kMaxHeadDim / 128;  // of a lane

__device__ inline float weight(float reference, float largest) {
  return reference == largest ? 1.0f : fast_exp2(reference - largest);  // both may be -inf
}

// Parts of a row that a warp has added, some at a time. A lane has every 32nd vector of outputs.
template <int kAtATime>
struct PartialSum {
  float reference = -INFINITY, sum = 0;
  float4 x[kVectors] = {};

  // Parts `first`, first + step, and so on.
  __device__ void add(const FlashDecodeParams& params, int2 parts, int column, int first,
                      int step) {
    const int lane = threadIdx.x % 32, vectors = params.padded_head_dim / 4;
    for (; first < parts.y; first += step * kAtATime) {
      // Loads first, all of them.
      float2 its[kAtATime];
      float4 y[kAtATime][kVectors];
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
        const int at = first + i * step;
        its[i] = make_float2(-INFINITY, 0);
#pragma unroll
        for (float4& z : y[i]) z = make_float4(0, 0, 0, 0);
        if (at >= parts.y) continue;
        // The first part may be its block's second; those after it are their blocks' first.
        const float* const part = part_of(params, at == 0 ? parts.x : parts.x / 2 * 2 + 2 * at);
        its[i] = reinterpret_cast<const float2*>(part)[params.columns * vectors * 2 + column];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          if (lane + 32 * j >= vectors) continue;
          y[i][j] = reinterpret_cast<const float4*>(part)[column * vectors + lane + 32 * j];
        }
      }
      float largest = reference;
#pragma unroll
      for (const float2& part : its) largest = fmaxf(largest, part.x);
      const float before = weight(reference, largest);
      reference = largest;
      sum *= before;
#pragma unroll
      for (float4& z : x) z.x *= before, z.y *= before, z.z *= before, z.w *= before;
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
        const float by = weight(its[i].x, reference);
        sum += its[i].y * by;
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          x[j].x += by * y[i][j].x, x[j].y += by * y[i][j].y;
          x[j].z += by * y[i][j].z, x[j].w += by * y[i][j].w;
        }
      }
    }
  }
};

template <class T, int kWarpsOfRow>
__global__ void __launch_bounds__(kThreads)
    combine(const __grid_constant__ FlashDecodeParams params) {
  wait_for_predecessor(params.is_settled);
  const FlashDecodeProblem& p = params.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int heads_k = static_cast<int>(p.num_heads_k);
  const int rows = static_cast<int>(p.seqlen_q) * params.group.divisor;  // of a key head
  const int at = blockIdx.x * (kWarps / kWarpsOfRow) + warp / kWarpsOfRow;
  if (at >= p.batch * heads_k * rows) return;
  const int of_rows = at / rows, row = at - of_rows * rows;
  const int batch = of_rows / heads_k, head_k = of_rows - batch * heads_k;
  const int tile_of_rows = row / params.columns, column = row - tile_of_rows * params.columns;
  const int index = batch * params.tiles.divisor + tile_of_rows;
  const int2 parts = params.parts_of_tile[index * heads_k + head_k];
  const DecodeTile tile = decode_tile(params, index);
  if (parts.y < 2) return;

  // Few at a time leave registers for more rows, which all fit beside the kernel before.
  PartialSum<kWarpsOfRow == 1 ? 2 : 4> mine;
  mine.add(params, parts, column, warp % kWarpsOfRow, kWarpsOfRow);
  if constexpr (kWarpsOfRow == 1) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const float4& x = mine.x[j];
      const float out[4] = {x.x, x.y, x.z, x.w};
      store_row<T>(params, tile, head_k, column, mine.reference, mine.sum, 4 * lane + 128 * j, 1,
                   out);
    }
  } else {
    __shared__ float2 of_warp[kWarps];
    __shared__ float4 outputs[kWarps][kMaxHeadDim / 4];
    if (lane == 0) of_warp[warp] = make_float2(mine.reference, mine.sum);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) outputs[warp][lane + 32 * j] = mine.x[j];
    __syncthreads();
    float reference = -INFINITY, sum = 0, out[1] = {0};
#pragma unroll
    for (const float2& its : of_warp) reference = fmaxf(reference, its.x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float by = weight(of_warp[w].x, reference);
      sum += of_warp[w].y * by;
      out[0] += reinterpret_cast<const float*>(outputs[w])[threadIdx.x] * by;
    }
    store_row<T>(params, tile, head_k, column, reference, sum, threadIdx.x, 1, out);
  }
}
static_assert(kThreads == kMaxHeadDim);

template <class T>
void launch(const FlashDecodeParams& params, cudaStream_t stream) {
  const FlashDecodeProblem& p = params.problem;
  const int64_t rows = p.batch * p.num_heads * p.seqlen_q;
  const bool has_many_rows = rows > params.at_a_time.divisor;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(has_many_rows ? ceil_div(rows, kWarps) : rows);
  config.blockDim = kThreads;
  config.stream = stream;
  cudaLaunchAttribute attribute = dependent_launch();
  config.attrs = &attribute;
  config.numAttrs = params.launches_dependent ? 1 : 0;
  const auto kernel = has_many_rows ? &combine<T, 1> : &combine<T, kWarps>;
  check(cudaLaunchKernelEx(&config, kernel, params), "launching flash_decode's sum");
}

template <class T>
int load() {
  load_kernel(reinterpret_cast<const void*>(&combine<T, 1>));
  return load_kernel(reinterpret_cast<const void*>(&combine<T, kWarps>));
}

}  // namespace

void launch_flash_decode_combine(const FlashDecodeParams& params, cudaStream_t stream) {
  if (params.problem.dtype == DType::kFloat16) {
    launch<__half>(params, stream);
  } else {
    launch<__nv_bfloat16>(params, stream);
  }
}

int load_flash_decode_combine() {
  load<__half>();
  return load<__nv_bfloat16>();
}

}  // namespace fastq::cuda
