// fastq for C++17: a header over the C ABI. Errors are exceptions, optional arguments have
// defaults; everything else is as fastq.h says.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "fastq/fastq.h"

namespace fastq {

class Exception : public std::runtime_error {
 public:
  Exception(fastq_status status, const char* message)
      : std::runtime_error(message), status_(status) {}
  fastq_status status() const noexcept { return status_; }

 private:
  fastq_status status_;
};

inline void check(fastq_status status) {
  if (status != FASTQ_SUCCESS) throw Exception(status, fastq_last_error());
}

struct Device {
  fastq_device_type type = FASTQ_CPU;
  int index = 0;
};

// A contiguous view. A pointer to const makes it read-only.
inline fastq_tensor tensor_view(const void* data, fastq_dtype dtype,
                                std::initializer_list<int64_t> sizes, Device device = {},
                                bool read_only = true) {
  if (sizes.size() > FASTQ_MAX_RANK) {
    throw Exception(FASTQ_INVALID_VALUE, "tensor_view: the rank is over FASTQ_MAX_RANK");
  }
  fastq_tensor view = {};
  view.data = const_cast<void*>(data);
  view.dtype = dtype;
  view.device_type = device.type;
  view.device_index = device.index;
  view.rank = static_cast<int32_t>(sizes.size());
  view.flags = read_only ? FASTQ_READ_ONLY : 0;
  int i = 0;
  for (const int64_t size : sizes) view.sizes[i++] = size;
  int64_t stride = 1;
  for (i = view.rank - 1; i >= 0; --i) {
    view.strides[i] = stride;
    stride *= view.sizes[i];
  }
  return view;
}
inline fastq_tensor tensor_view(void* data, fastq_dtype dtype, std::initializer_list<int64_t> sizes,
                                Device device = {}) {
  return tensor_view(static_cast<const void*>(data), dtype, sizes, device, false);
}

template <class T>
struct dtype_of;
template <>
struct dtype_of<float> : std::integral_constant<fastq_dtype, FASTQ_FLOAT32> {};
template <>
struct dtype_of<int8_t> : std::integral_constant<fastq_dtype, FASTQ_INT8> {};
template <>
struct dtype_of<int32_t> : std::integral_constant<fastq_dtype, FASTQ_INT32> {};
template <>
struct dtype_of<uint8_t> : std::integral_constant<fastq_dtype, FASTQ_UINT8> {};

template <class T>
fastq_tensor tensor_view(T* data, std::initializer_list<int64_t> sizes, Device device = {}) {
  using Element = std::remove_const_t<T>;
  return tensor_view(static_cast<const void*>(data), dtype_of<Element>::value, sizes, device,
                     std::is_const<T>::value);
}

// The same memory with its last two dimensions exchanged: an (N, K) weight as the (K, N) operand.
inline fastq_tensor transposed(fastq_tensor view) {
  if (view.rank < 2) throw Exception(FASTQ_INVALID_VALUE, "transposed: the rank is under 2");
  const int i = view.rank - 2, j = view.rank - 1;
  const int64_t size = view.sizes[i], stride = view.strides[i];
  view.sizes[i] = view.sizes[j], view.strides[i] = view.strides[j];
  view.sizes[j] = size, view.strides[j] = stride;
  return view;
}

// b: (K, N) int8; scale: float32 scalar, (N,) or (1, N); column_sums: int32 (N,) or (1, N).
inline fastq_weight weight(const fastq_tensor& b, const fastq_tensor& scale = {},
                           const fastq_tensor& column_sums = {}) {
  fastq_weight w = {};
  w.struct_size = sizeof(w);
  w.data = b;
  w.scale = scale;
  w.layout = FASTQ_WEIGHT_PLAIN;
  w.column_sums = column_sums;
  return w;
}

// packed: (bytes,) uint8 as pack_weight wrote it.
inline fastq_weight packed_weight(const fastq_tensor& packed, int64_t k, int64_t n,
                                  const fastq_tensor& scale = {},
                                  const fastq_tensor& column_sums = {}) {
  fastq_weight w = weight(packed, scale, column_sums);
  w.layout = FASTQ_WEIGHT_PACKED;
  w.k = k;
  w.n = n;
  return w;
}

// The arguments of one product; set zero_point, activation, residual, out_scale and b_is_constant
// on the result.
// Keep `b` alive as long as the struct.
inline fastq_int8_gemm_args int8_gemm_args(const fastq_tensor& a, const fastq_weight& b,
                                           const fastq_tensor& scale_a, const fastq_tensor& out,
                                           const fastq_tensor& bias = {}, void* stream = nullptr) {
  fastq_int8_gemm_args args = {};
  args.struct_size = sizeof(args);
  args.a = a;
  args.b = &b;
  args.scale_a = scale_a;
  args.bias = bias;
  args.out = out;
  args.stream = stream;
  return args;
}

inline size_t int8_gemm_workspace_size(const fastq_int8_gemm_args& args) {
  size_t bytes = 0;
  check(fastq_int8_gemm_workspace_size(&args, &bytes));
  return bytes;
}

inline void int8_gemm(fastq_int8_gemm_args args, void* workspace = nullptr,
                      size_t workspace_size = 0) {
  args.workspace = workspace;
  args.workspace_size = workspace_size;
  check(fastq_int8_gemm(&args));
}

inline std::string int8_gemm_describe(const fastq_int8_gemm_args& args) {
  char text[128];
  check(fastq_int8_gemm_describe(&args, text, sizeof(text)));
  return text;
}

inline std::vector<std::string> int8_gemm_candidates(const fastq_int8_gemm_args& args) {
  char text[8192];
  check(fastq_int8_gemm_candidates(&args, text, sizeof(text)));
  std::vector<std::string> names;
  for (const char *name = text, *end; *name != '\0'; name = *end == '\0' ? end : end + 1) {
    end = name + std::strcspn(name, "\n");
    names.emplace_back(name, end);
  }
  return names;
}

inline size_t pack_weight_size(const fastq_weight& plain) {
  size_t bytes = 0;
  check(fastq_pack_weight_size(&plain, &bytes));
  return bytes;
}

inline void pack_weight(const fastq_weight& plain, const fastq_tensor& packed) {
  check(fastq_pack_weight(&plain, &packed));
}

// The arguments of a quantisation; set is_static, zero_point and smooth on the result.
inline fastq_quantize_args quantize_args(const fastq_tensor& x, const fastq_tensor& q,
                                         const fastq_tensor& scale, void* stream = nullptr,
                                         int32_t rotation = 0) {
  fastq_quantize_args args = {};
  args.struct_size = sizeof(args);
  args.x = x, args.q = q, args.scale = scale;
  args.stream = stream;
  args.rotation = rotation;
  return args;
}

inline void quantize_per_token(const fastq_quantize_args& args) {
  check(fastq_quantize_per_token(&args));
}
inline void quantize_per_token(const fastq_tensor& x, const fastq_tensor& q,
                               const fastq_tensor& scale, void* stream = nullptr,
                               int32_t rotation = 0) {
  quantize_per_token(quantize_args(x, q, scale, stream, rotation));
}

inline void quantize_per_channel(const fastq_tensor& w, const fastq_tensor& q,
                                 const fastq_tensor& scale, void* stream = nullptr,
                                 int32_t rotation = 0) {
  const fastq_quantize_args args = quantize_args(w, q, scale, stream, rotation);
  check(fastq_quantize_per_channel(&args));
}

inline size_t llm_int8_matmul_workspace_size(const fastq_llm_int8_matmul_args& args) {
  size_t bytes = 0;
  check(fastq_llm_int8_matmul_workspace_size(&args, &bytes));
  return bytes;
}

// The arguments of one product with outliers apart; set what else there is on the result.
// Keep `b` alive as long as the struct.
inline fastq_llm_int8_matmul_args llm_int8_matmul_args(const fastq_tensor& x, const fastq_weight& b,
                                                       const fastq_tensor& out,
                                                       float threshold = 6.0f,
                                                       void* stream = nullptr) {
  fastq_llm_int8_matmul_args args = {};
  args.struct_size = sizeof(args);
  args.x = x;
  args.b = &b;
  args.out = out;
  args.threshold = threshold;
  args.stream = stream;
  return args;
}

inline void llm_int8_matmul(fastq_llm_int8_matmul_args args, void* workspace = nullptr,
                            size_t workspace_size = 0) {
  args.workspace = workspace;
  args.workspace_size = workspace_size;
  check(fastq_llm_int8_matmul(&args));
}

// The arguments of a norm whose output is quantised; set bias, residual and residual_out on the
// result. Keep `quantize` alive as long as the struct.
inline fastq_norm_quant_args norm_quant_args(const fastq_quantize_args& quantize, fastq_norm norm,
                                             const fastq_tensor& weight, float eps) {
  fastq_norm_quant_args args = {};
  args.struct_size = sizeof(args);
  args.quantize = &quantize;
  args.weight = weight;
  args.eps = eps;
  args.norm = norm;
  return args;
}

inline void norm_quant(const fastq_norm_quant_args& args) { check(fastq_norm_quant(&args)); }

// An activation, times `up` where it is given, whose output is quantised.
inline void activation_quant(const fastq_quantize_args& quantize, fastq_activation activation,
                             const fastq_tensor& up = {}) {
  fastq_activation_quant_args args = {};
  args.struct_size = sizeof(args);
  args.quantize = &quantize;
  args.up = up;
  args.activation = activation;
  check(fastq_activation_quant(&args));
}

inline void dequantize(const fastq_tensor& q, const fastq_tensor& scale, const fastq_tensor& out,
                       void* stream = nullptr) {
  const fastq_dequantize_args args = {sizeof(fastq_dequantize_args), q, scale, out, stream};
  check(fastq_dequantize(&args));
}

inline size_t flash_attention_workspace_size(const fastq_flash_attention_args& args) {
  size_t bytes = 0;
  check(fastq_flash_attention_workspace_size(&args, &bytes));
  return bytes;
}

// The arguments of one attention over sequences of one length; set the rest on the result.
inline fastq_flash_attention_args flash_attention_args(const fastq_tensor& q, const fastq_tensor& k,
                                                       const fastq_tensor& v,
                                                       const fastq_tensor& out, bool causal = false,
                                                       void* stream = nullptr) {
  fastq_flash_attention_args args = {};
  args.struct_size = sizeof(args);
  args.q = q, args.k = k, args.v = v;
  args.out = out;
  args.causal = causal;
  args.stream = stream;
  return args;
}

inline void flash_attention(fastq_flash_attention_args args, void* workspace = nullptr,
                            size_t workspace_size = 0) {
  args.workspace = workspace;
  args.workspace_size = workspace_size;
  check(fastq_flash_attention(&args));
}

// A cache of keys and values, (batch, capacity, num_heads_k, head_dim), or pages with a
// block_table. Set k_scale and v_scale of an int8 cache on the result.
inline fastq_kv_cache kv_cache(const fastq_tensor& k, const fastq_tensor& v,
                               const fastq_tensor& seqlens, const fastq_tensor& block_table = {}) {
  fastq_kv_cache cache = {};
  cache.struct_size = sizeof(cache);
  cache.k = k, cache.v = v;
  cache.seqlens = seqlens;
  cache.block_table = block_table;
  return cache;
}

inline size_t flash_decode_workspace_size(const fastq_flash_decode_args& args) {
  size_t bytes = 0;
  check(fastq_flash_decode_workspace_size(&args, &bytes));
  return bytes;
}

// The arguments of one attention to a cache; set the rest on the result.
// Keep `cache` alive as long as the struct.
inline fastq_flash_decode_args flash_decode_args(const fastq_tensor& q, const fastq_kv_cache& cache,
                                                 const fastq_tensor& out, bool causal = true,
                                                 void* stream = nullptr) {
  fastq_flash_decode_args args = {};
  args.struct_size = sizeof(args);
  args.q = q;
  args.cache = &cache;
  args.out = out;
  args.causal = causal;
  args.stream = stream;
  return args;
}

inline void flash_decode(fastq_flash_decode_args args, void* workspace = nullptr,
                         size_t workspace_size = 0) {
  args.workspace = workspace;
  args.workspace_size = workspace_size;
  check(fastq_flash_decode(&args));
}

// The arguments that append keys and values to a cache; set rotary tables, and q and out to be
// rotated, on the result. Keep `cache` alive as long as the struct.
inline fastq_kv_append_args kv_append_args(const fastq_tensor& k, const fastq_tensor& v,
                                           const fastq_kv_cache& cache, void* stream = nullptr) {
  fastq_kv_append_args args = {};
  args.struct_size = sizeof(args);
  args.k = k, args.v = v;
  args.cache = &cache;
  args.stream = stream;
  return args;
}

inline void kv_append(fastq_kv_append_args args) { check(fastq_kv_append(&args)); }

inline int get_num_threads() {
  int32_t num_threads = 0;
  check(fastq_get_num_threads(&num_threads));
  return num_threads;
}

inline void set_num_threads(int num_threads) { check(fastq_set_num_threads(num_threads)); }

// The promise of fastq_set_settled_weights, for a scope.
class SettledWeights {
 public:
  SettledWeights() {
    check(fastq_get_settled_weights(&before_));
    check(fastq_set_settled_weights(1));
  }
  ~SettledWeights() { fastq_set_settled_weights(before_); }
  SettledWeights(const SettledWeights&) = delete;
  SettledWeights& operator=(const SettledWeights&) = delete;

 private:
  int32_t before_ = 0;
};

inline std::string describe() {
  const char* json = nullptr;
  check(fastq_describe(&json));
  return json;
}

}  // namespace fastq
