// New keys and values, rotated and quantised on their way to a cache, and queries rotated:
//   (x, y) -> (x cos - y sin, y cos + x sin)   of each pair of the first rotary_dim elements
//   q = clamp(round_half_even(x / scale), -127, 127),  scale = absmax / 127
//
// A warp has a row: a key, a value or a query of one token and head. Every product and sum is
// rounded on its own, and nothing is written before all of a row has been read: queries may be
// rotated where they lie.
#include "kv_append/kv_append.hpp"

#include <array>

#include "core/error.hpp"
#include "core/integers.hpp"
#include "quantize/row_scale.cuh"
#include "runtime/dependent_launch.cuh"
#include "runtime/device.hpp"
#include "runtime/float_io.cuh"

namespace fastq::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kPerLane = kMaxHeadDim / 32;

struct Params {
  KvAppendProblem problem;
  int page_shift;
  int64_t rows;  // (batch, seqlen_new, heads of q, k and v)
};

template <class T>
__device__ inline float table_value(const MatrixView& table, int token, int pair) {
  const int64_t at = token * table.stride_m + pair * table.stride_n;
  if (table.dtype == DType::kFloat32) return static_cast<const float*>(table.data)[at];
  return to_float(static_cast<const T*>(table.data)[at]);
}

// Elements lane, lane + 32, ... of a row, rotated as that of `token`.
template <class T>
__device__ inline void load_row(const KvAppendProblem& p, const T* row, int token, bool rotates,
                                float (&x)[kPerLane]) {
  const int rotary_dim = rotates ? static_cast<int>(p.rotary_dim) : 0;
  const int position = min(token, static_cast<int>(p.max_seqlen) - 1);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int d = threadIdx.x % 32 + 32 * i;
    x[i] = 0;
    if (d >= p.head_dim) continue;
    x[i] = to_float(row[d]);
    if (d >= rotary_dim) continue;
    const int half = rotary_dim / 2;
    const bool is_second = p.rotary_interleaved ? d % 2 != 0 : d >= half;
    const int pair = p.rotary_interleaved ? d / 2 : d % half;
    const int step = p.rotary_interleaved ? 1 : half;
    const float other = to_float(row[is_second ? d - step : d + step]);
    const float sine = table_value<T>(p.rotary_sin, position, pair);
    const float cosine = table_value<T>(p.rotary_cos, position, pair);
    x[i] = __fadd_rn(__fmul_rn(x[i], cosine), __fmul_rn(other, is_second ? sine : -sine));
  }
}

template <class T>
__device__ inline void store_row(T* out, int head_dim, const float (&x)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int d = threadIdx.x % 32 + 32 * i;
    if (d < head_dim) out[d] = from_float<T>(x[i]);
  }
}

__device__ inline void store_quantized(int8_t* out, float* scale, int head_dim,
                                       const float (&x)[kPerLane]) {
  uint32_t absmax = 0;
#pragma unroll
  for (const float y : x) absmax = max(absmax, abs_bits(y));
  const RowScale row = row_scale(__reduce_max_sync(0xffffffffu, absmax));
  if (threadIdx.x % 32 == 0) *scale = row.scale;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int d = threadIdx.x % 32 + 32 * i;
    if (d < head_dim) out[d] = quantize_element(x[i], row);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) append_rows(const __grid_constant__ Params params) {
  wait_for_predecessor();
  let_successor_start();
  const KvAppendProblem& p = params.problem;
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (index >= params.rows) return;
  const int heads = static_cast<int>(p.num_heads), heads_k = static_cast<int>(p.num_heads_k);
  const int all_heads = heads + 2 * heads_k;
  const int64_t of_batch = index / all_heads;
  const int head = static_cast<int>(index % all_heads);
  const int batch = static_cast<int>(of_batch / p.seqlen_new);
  const int row = static_cast<int>(of_batch % p.seqlen_new);
  const int length = p.cache.seqlens[batch * p.cache.stride_seqlens];
  const int token = length - static_cast<int>(p.seqlen_new) + row;
  const int head_dim = static_cast<int>(p.head_dim);
  const auto row_of = [&](const AttentionTensor& t, int its_head) {
    return static_cast<T*>(t.data) + batch * t.stride_batch + row * t.stride_seqlen +
           its_head * t.stride_head;
  };
  float x[kPerLane];
  if (head < heads) {
    load_row<T>(p, row_of(p.q, head), max(token, 0), token >= 0, x);
    __syncwarp();  // `out` may be q
    store_row<T>(row_of(p.out, head), head_dim, x);
    return;
  }
  if (token < 0 || token >= p.cache.capacity) return;
  const bool is_key = head < heads + heads_k;
  const int head_k = (head - heads) % heads_k;
  load_row<T>(p, row_of(is_key ? p.k : p.v, head_k), token, is_key, x);
  int64_t page = batch;
  int at = token;
  if (p.cache.page_size != 0) {
    page = p.cache.block_table[batch * p.cache.stride_table + (token >> params.page_shift)];
    at = token & (p.cache.page_size - 1);
  }
  const AttentionTensor& cache = is_key ? p.cache.k : p.cache.v;
  const int64_t to =
      page * cache.stride_batch + at * cache.stride_seqlen + head_k * cache.stride_head;
  if (p.cache.dtype == DType::kInt8) {
    const CacheScales& scales = is_key ? p.cache.k_scale : p.cache.v_scale;
    float* const scale = scales.data + page * scales.stride_batch + at * scales.stride_seqlen +
                         head_k * scales.stride_head;
    store_quantized(static_cast<int8_t*>(cache.data) + to, scale, head_dim, x);
  } else {
    store_row<T>(static_cast<T*>(cache.data) + to, head_dim, x);
  }
}

// By device: whether the kernels' code there can wait for its predecessor.
std::array<bool, kMaxDevices> launches_dependent{};

[[maybe_unused]] const bool registered = register_loader([](const DeviceProps& props) {
  load_kernel(reinterpret_cast<const void*>(&append_rows<__half>));
  const int arch = load_kernel(reinterpret_cast<const void*>(&append_rows<__nv_bfloat16>));
  launches_dependent[props.index] = arch >= kDependentLaunchArch;
});

}  // namespace

void kv_append(const KvAppendProblem& p) {
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) {
    not_implemented("kv_append: k has dtype " + std::string(dtype_name(p.dtype)) +
                    ", expected float16 or bfloat16 on CUDA");
  }
  const DeviceGuard guard(p.device_index);
  Params params{};
  params.problem = p;
  while (p.cache.page_size > 1 << params.page_shift) ++params.page_shift;
  params.rows = p.batch * p.seqlen_new * (p.num_heads + 2 * p.num_heads_k);
  const int64_t blocks = ceil_div(params.rows, kWarps);
  if (blocks > INT32_MAX) {
    not_implemented("kv_append: " + std::to_string(params.rows) +
                    " rows of keys, values and queries are too many on CUDA");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = 32 * kWarps;
  config.stream = static_cast<cudaStream_t>(p.stream);
  cudaLaunchAttribute attribute = dependent_launch();
  config.attrs = &attribute;
  config.numAttrs = launches_dependent[p.device_index] ? 1 : 0;
  const auto kernel =
      p.dtype == DType::kFloat16 ? &append_rows<__half> : &append_rows<__nv_bfloat16>;
  check(cudaLaunchKernelEx(&config, kernel, params), "launching kv_append");
}

}  // namespace fastq::cuda
