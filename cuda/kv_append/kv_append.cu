// New keys and values, rotated and quantised on their way to a cache, and queries rotated:
//   (x, y) -> (x cos - y sin, y cos + x sin)   of each pair of the first rotary_dim elements
//   q = clamp(round_half_even(x / scale), -127, 127),  scale = absmax / 127
//
// A row is a key, a value or a query of one token and head, and some lanes of a warp have it, whole
// pairs each: so no lane needs another's elements, and queries may be rotated where they lie. A
// block of threads has rows of one token, whose sines and cosines serve all of a thread's. Where
// rows are aligned, four elements are read and written at a time. Every product and sum is rounded
// on its own.
#include "kv_append/kv_append.hpp"

#include <array>

#include "core/error.hpp"
#include "core/integers.hpp"
#include "core/settled_weights.hpp"
#include "core/tensor.hpp"
#include "kv_append/rotation.cuh"
#include "quantize/row_scale.cuh"
#include "runtime/dependent_launch.cuh"
#include "runtime/device.hpp"
#include "runtime/float_io.cuh"

namespace fastq::cuda {
namespace {

constexpr int kThreads = 256;

struct Params {
  KvAppendProblem problem;
  int page_shift;
  bool is_settled;  // core/settled_weights.hpp
};

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Elements {
  T values[kCount];
};

template <int kCount, class T>
__device__ inline void load_elements(const T* from, float (&x)[kCount]) {
  const auto elements = *reinterpret_cast<const Elements<T, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = to_float(elements.values[i]);
}

template <int kCount, class T>
__device__ inline void store_elements(T* to, const float (&x)[kCount]) {
  Elements<T, kCount> elements;
#pragma unroll
  for (int i = 0; i < kCount; ++i) elements.values[i] = from_float<T>(x[i]);
  *reinterpret_cast<Elements<T, kCount>*>(to) = elements;
}

__device__ inline void store_quantized(int8_t* to, const float (&x)[4], const RowScale& scale) {
  uint32_t q[1];
  quantize_elements<RowRounding::kSymmetric, true>(x, scale, q);
  *reinterpret_cast<uint32_t*>(to) = q[0];
}
__device__ inline void store_quantized(int8_t* to, const float (&x)[1], const RowScale& scale) {
  *to = quantize_element<RowRounding::kSymmetric, true>(x[0], scale);
}

// kVector elements are read at a time, kLanes lanes have a row, and a thread some of kRows rows.
template <class T_, int kVector_, int kLanes_, int kRows_>
struct Traits {
  using T = T_;
  static constexpr int kVector = kVector_, kLanes = kLanes_, kRows = kRows_;
  static constexpr int kVectors = kMaxHeadDim / (2 * kVector * 32);  // pairs of a lane
  static constexpr int kRowsOfBlock = kThreads / kLanes * kRows;
  static constexpr int kHeadDim = 2 * kVector * kLanes * kVectors;  // and every smaller one
};

// The pairs of a row that a lane has: kVectors times two vectors. Where pairs are halves apart
// those are a vector of first elements and that of their second ones; else they are neighbours.
template <class Traits>
struct Pairs {
  static constexpr int kVector = Traits::kVector, kVectors = Traits::kVectors;
  using Table = float[kVectors][kVector];

  int at[kVectors][2];
  bool rotates[kVectors];
  int number[kVectors];  // of the first pair

  __device__ Pairs(const KvAppendProblem& p) {
    const int half = static_cast<int>(p.rotary_dim) / 2;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      number[i] = (static_cast<int>(threadIdx.x) % Traits::kLanes + Traits::kLanes * i) * kVector;
      rotates[i] = number[i] < half;
      const bool is_apart = rotates[i] && !p.rotary_interleaved;
      at[i][0] = is_apart ? number[i] : 2 * number[i];
      at[i][1] = is_apart ? number[i] + half : 2 * number[i] + kVector;
    }
  }

  __device__ void load_table(const MatrixView& table, int position, Table& x) const {
    const int64_t row = position * table.stride_m;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!rotates[i]) continue;
      const int64_t from = row + number[i] * table.stride_n;
      if (table.dtype == DType::kFloat32) {
        load_elements(static_cast<const float*>(table.data) + from, x[i]);
      } else {
        load_elements(static_cast<const typename Traits::T*>(table.data) + from, x[i]);
      }
    }
  }
};

__device__ inline void rotate_pair(float& x, float& y, float cosine, float sine) {
  const float first = x, second = y;
  x = rotated(first, second, cosine, -sine);
  y = rotated(second, first, cosine, sine);
}

template <class Traits>
struct Row {
  float x[Traits::kVectors][2][Traits::kVector];

  __device__ void load(const Pairs<Traits>& pairs, const typename Traits::T* from, int head_dim) {
#pragma unroll
    for (int i = 0; i < Traits::kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (pairs.at[i][j] < head_dim) load_elements(from + pairs.at[i][j], x[i][j]);
      }
    }
  }

  __device__ void rotate(const Pairs<Traits>& pairs, bool is_interleaved,
                         const typename Pairs<Traits>::Table& cosine,
                         const typename Pairs<Traits>::Table& sine) {
#pragma unroll
    for (int i = 0; i < Traits::kVectors; ++i) {
      if (!pairs.rotates[i]) continue;
      float (&a)[Traits::kVector] = x[i][0], (&b)[Traits::kVector] = x[i][1];
      const auto& c = cosine[i];
      const auto& s = sine[i];
      // Each branch with indices of its own: registers have no others.
      if (is_interleaved && Traits::kVector > 1) {
#pragma unroll
        for (int pair = 0; pair < Traits::kVector / 2; ++pair) {
          constexpr int kHalf = Traits::kVector / 2;
          rotate_pair(a[2 * pair], a[2 * pair + 1], c[pair], s[pair]);
          rotate_pair(b[2 * pair], b[2 * pair + 1], c[kHalf + pair], s[kHalf + pair]);
        }
      } else {
#pragma unroll
        for (int pair = 0; pair < Traits::kVector; ++pair) {
          rotate_pair(a[pair], b[pair], c[pair], s[pair]);
        }
      }
    }
  }

  // The scale of all of the row.
  __device__ RowScale scale() const {
    uint32_t absmax = 0;
#pragma unroll
    for (const auto& vectors : x) {
#pragma unroll
      for (const auto& vector : vectors) {
#pragma unroll
        for (const float y : vector) absmax = max(absmax, abs_bits(y));
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < Traits::kLanes; lanes *= 2) {
      absmax = max(absmax, __shfl_xor_sync(0xffffffffu, absmax, lanes));
    }
    return row_scale(absmax);
  }

  __device__ void store(const Pairs<Traits>& pairs, typename Traits::T* to, int head_dim) const {
#pragma unroll
    for (int i = 0; i < Traits::kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (pairs.at[i][j] < head_dim) store_elements(to + pairs.at[i][j], x[i][j]);
      }
    }
  }
  __device__ void store(const Pairs<Traits>& pairs, int8_t* to, int head_dim,
                        const RowScale& scale) const {
#pragma unroll
    for (int i = 0; i < Traits::kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (pairs.at[i][j] < head_dim) store_quantized(to + pairs.at[i][j], x[i][j], scale);
      }
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(kThreads) append_rows(const __grid_constant__ Params params) {
  using T = typename Traits::T;
  // What is settled is read before the turn of the kernel has come.
  if (!params.is_settled) wait_for_predecessor();
  let_successor_start();
  const KvAppendProblem& p = params.problem;
  const int heads = static_cast<int>(p.num_heads), heads_k = static_cast<int>(p.num_heads_k);
  const int head_dim = static_cast<int>(p.head_dim);
  const int batch = static_cast<int>(blockIdx.x / static_cast<unsigned>(p.seqlen_new));
  const int row = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.seqlen_new));
  // Query heads first, then those of keys, then those of values.
  const int first = blockIdx.y * Traits::kRowsOfBlock + threadIdx.x / Traits::kLanes;
  const auto head_of = [&](int i) { return first + i * (kThreads / Traits::kLanes); };
  const auto row_of = [&](const AttentionTensor& t, int head) {
    return static_cast<T*>(t.data) + batch * t.stride_batch + row * t.stride_seqlen +
           head * t.stride_head;
  };
  const Pairs<Traits> pairs(p);
  Row<Traits> rows[Traits::kRows] = {};
  const auto load_rows = [&] {
#pragma unroll
    for (int i = 0; i < Traits::kRows; ++i) {
      const int head = head_of(i);
      if (head >= heads + 2 * heads_k) continue;
      const T* const from = head < heads             ? row_of(p.q, head)
                            : head < heads + heads_k ? row_of(p.k, head - heads)
                                                     : row_of(p.v, head - heads - heads_k);
      rows[i].load(pairs, from, head_dim);
    }
  };
  if (!params.is_settled) load_rows();  // on their way while the length is

  const int length = p.cache.seqlens[batch * p.cache.stride_seqlens];
  const int token = length - static_cast<int>(p.seqlen_new) + row;
  const bool is_in_cache = token >= 0 && token < p.cache.capacity;
  const bool rotates = p.rotary_dim > 0 && token >= 0;
  typename Pairs<Traits>::Table cosine, sine;
  if (rotates) {
    const int position = min(token, static_cast<int>(p.max_seqlen) - 1);
    pairs.load_table(p.rotary_cos, position, cosine);
    pairs.load_table(p.rotary_sin, position, sine);
  }
  int64_t page = batch;
  int at = token;
  if (p.cache.page_size != 0 && is_in_cache) {
    page = p.cache.block_table[batch * p.cache.stride_table + (token >> params.page_shift)];
    at = token & (p.cache.page_size - 1);
  }
  if (params.is_settled) {
    wait_for_predecessor();
    load_rows();
  }
  if (rotates) {
#pragma unroll
    for (int i = 0; i < Traits::kRows; ++i) {
      if (head_of(i) >= heads + heads_k) continue;
      rows[i].rotate(pairs, p.rotary_interleaved, cosine, sine);
    }
  }
#pragma unroll
  for (int i = 0; i < Traits::kRows; ++i) {
    const int head = head_of(i);
    RowScale its{};
    if (p.cache.dtype == DType::kInt8) its = rows[i].scale();  // whole warps
    if (head < heads) {
      rows[i].store(pairs, row_of(p.out, head), head_dim);
      continue;
    }
    if (head >= heads + 2 * heads_k || !is_in_cache) continue;
    const bool is_key = head < heads + heads_k;
    const int head_k = head - heads - (is_key ? 0 : heads_k);
    const AttentionTensor& cache = is_key ? p.cache.k : p.cache.v;
    const int64_t to =
        page * cache.stride_batch + at * cache.stride_seqlen + head_k * cache.stride_head;
    if (p.cache.dtype != DType::kInt8) {
      rows[i].store(pairs, static_cast<T*>(cache.data) + to, head_dim);
      continue;
    }
    rows[i].store(pairs, static_cast<int8_t*>(cache.data) + to, head_dim, its);
    const CacheScales& scales = is_key ? p.cache.k_scale : p.cache.v_scale;
    if (threadIdx.x % Traits::kLanes != 0) continue;
    scales.data[page * scales.stride_batch + at * scales.stride_seqlen +
                head_k * scales.stride_head] = its.scale;
  }
}

// Whether every row begins at a multiple of so many elements of `size` bytes.
bool is_aligned(const AttentionTensor& t, int elements, int64_t size) {
  return reinterpret_cast<uintptr_t>(t.data) % (elements * size) == 0 &&
         t.stride_batch % elements == 0 && t.stride_seqlen % elements == 0 &&
         t.stride_head % elements == 0;
}
bool is_aligned(const MatrixView& t, int elements) {
  return reinterpret_cast<uintptr_t>(t.data) % (elements * element_size(t.dtype)) == 0 &&
         t.stride_m % elements == 0 && t.stride_n == 1;
}

// Whether the rows are so many elements at a time, and so are the pairs' halves.
bool is_aligned(const KvAppendProblem& p, int elements) {
  if (p.head_dim % (2 * elements) != 0 || p.rotary_dim % (2 * elements) != 0) return false;
  for (const AttentionTensor* t : {&p.k, &p.v, &p.q, &p.out}) {
    if (!is_aligned(*t, elements, element_size(p.dtype))) return false;
  }
  for (const AttentionTensor* t : {&p.cache.k, &p.cache.v}) {
    if (!is_aligned(*t, elements, element_size(p.cache.dtype))) return false;
  }
  return p.rotary_dim == 0 ||
         (is_aligned(p.rotary_cos, elements) && is_aligned(p.rotary_sin, elements));
}

// By device: whether the kernels' code there can wait for its predecessor.
std::array<bool, kMaxDevices> launches_dependent{};

struct Kernel {
  int vector, head_dim;  // and every smaller one
  int rows;              // of a block
  void (*function)(Params);
};

// The general one is the last.
template <class T>
const std::array<Kernel, 4>& kernels() {
  static constexpr auto kernel = [](auto traits) {
    using Its = decltype(traits);
    return Kernel{Its::kVector, Its::kHeadDim, Its::kRowsOfBlock, &append_rows<Its>};
  };
  static const std::array<Kernel, 4> list = {
      kernel(Traits<T, 4, 8, 2>{}), kernel(Traits<T, 4, 16, 2>{}), kernel(Traits<T, 4, 32, 2>{}),
      kernel(Traits<T, 1, 32, 1>{})};
  return list;
}

template <class T>
void launch(const KvAppendProblem& p) {
  Params params{};
  params.problem = p;
  params.is_settled = weights_are_settled;
  while (p.cache.page_size > 1 << params.page_shift) ++params.page_shift;
  const Kernel* kernel = kernels<T>().data();
  while (p.head_dim > kernel->head_dim || (kernel->vector > 1 && !is_aligned(p, kernel->vector))) {
    ++kernel;
  }
  const int64_t tokens = p.batch * p.seqlen_new;
  const int64_t blocks = ceil_div(p.num_heads + 2 * p.num_heads_k, kernel->rows);
  if (tokens > INT32_MAX || blocks > 65535) {
    not_implemented("kv_append: " + std::to_string(tokens) + " tokens with " +
                    std::to_string(p.num_heads + 2 * p.num_heads_k) +
                    " heads of keys, values and queries are too many on CUDA");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(tokens), static_cast<unsigned>(blocks));
  config.blockDim = kThreads;
  config.stream = static_cast<cudaStream_t>(p.stream);
  cudaLaunchAttribute attribute = dependent_launch();
  config.attrs = &attribute;
  config.numAttrs = launches_dependent[p.device_index] ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel->function, params), "launching kv_append");
}

template <class T>
int load() {
  int arch = 0;
  for (const Kernel& kernel : kernels<T>()) {
    arch = load_kernel(reinterpret_cast<const void*>(kernel.function));
  }
  return arch;
}

[[maybe_unused]] const bool registered = register_loader([](const DeviceProps& props) {
  load<__half>();
  launches_dependent[props.index] = load<__nv_bfloat16>() >= kDependentLaunchArch;
});

}  // namespace

void kv_append(const KvAppendProblem& p) {
  const DeviceGuard guard(p.device_index);
  if (p.dtype == DType::kFloat16) return launch<__half>(p);
  if (p.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(p);
  not_implemented("kv_append: k has dtype " + std::string(dtype_name(p.dtype)) +
                  ", expected float16 or bfloat16 on CUDA");
}

}  // namespace fastq::cuda
