// What an op, its arguments checked, asks of a backend.
//
// A backend sees one problem in its simplest form: two-dimensional, every size at least 1 (K may be
// 0), every stride real. The ops layer folds or walks leading dimensions before it comes here.
#pragma once

#include <cstdint>

#include "core/tensor.hpp"

namespace fastq {

// A vector along M or N; `stride` 0 repeats one value, `data` null means absent.
struct VectorView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;
};

// A float matrix (M, N); `data` null means absent.
struct MatrixView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride_m = 0, stride_n = 0;
};

enum class Activation : int32_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// The outliers of a float matrix x: its elements from `threshold` on, in magnitude. A product has
// them apart, times weights of which some are kept in float (LLM.int8()).
struct OutlierSplit {
  MatrixView x;
  float threshold = 0;
  // Columns of x that have weights of their own, ascending: kept_columns[i * stride_columns].
  const int32_t* kept_columns = nullptr;
  int64_t stride_columns = 0, num_kept = 0;
  MatrixView kept;  // (num_kept, N)
  // Columns of x that hold outliers, ascending, and how many; on the device. (CUDA: in two halves,
  // see epilogue/outliers.cuh.)
  int32_t *columns = nullptr, *num_columns = nullptr;
  // Of the first `capacity` of these columns, x, with zeros for what is no outlier, and the
  // weights: gathered_x[i * stride_gx + m], gathered_b[i * stride_gb + n].
  int capacity = 0;
  float *gathered_x = nullptr, *gathered_b = nullptr;
  int64_t stride_gx = 0, stride_gb = 0;
  // CUDA, where the product finds them: QuantizeProblem's outlier_mask, `mask_rows` of them. The
  // count is the caller's, and may be null.
  const uint32_t* masks = nullptr;
  int mask_rows = 0;
  int64_t stride_mask = 0;
  int32_t* outlier_count = nullptr;
  // Zeros, where the product's blocks may gather for one another: the chunks begun and done.
  int32_t* counters = nullptr;
};

struct Int8GemmProblem {
  int64_t M = 0, N = 0, K = 0;
  const int8_t* a = nullptr;  // a[m * stride_am + k * stride_ak]
  int64_t stride_am = 0, stride_ak = 0;
  bool a_is_padded = false;   // its rows go on with zeros up to a multiple of 16 bytes
  const int8_t* b = nullptr;  // b[k * stride_bk + n * stride_bn]
  int64_t stride_bk = 0, stride_bn = 0;
  const void* b_packed = nullptr;  // set instead of b for a packed weight
  bool b_is_constant = false;      // may be read before the call's turn in the stream
  VectorView scale_a, scale_b, bias;
  VectorView zero_point, column_sums;  // int32, along M and N; both or neither
  Activation activation = Activation::kNone;
  MatrixView residual;
  const float* out_scale = nullptr;        // one value; set exactly when out is int8
  const OutlierSplit* outliers = nullptr;  // added to the scaled sums, before the bias
  void* out = nullptr;                     // out[m * stride_om + n * stride_on]
  DType out_dtype = DType::kBFloat16;
  int64_t stride_om = 0, stride_on = 0;
  int device_index = 0;
  void* stream = nullptr;
};

// fastq.h has the formulas.
struct LlmInt8MatmulProblem {
  int64_t M = 0, N = 0, K = 0;
  OutlierSplit split;         // but for its columns, which the backend finds
  const int8_t* b = nullptr;  // b[k * stride_bk + n * stride_bn]
  int64_t stride_bk = 0, stride_bn = 0;
  bool b_is_constant = false;
  VectorView scale_b, bias;
  int32_t* outlier_count = nullptr;
  void* out = nullptr;  // out[m * stride_om + n * stride_on]
  DType out_dtype = DType::kBFloat16;
  int64_t stride_om = 0, stride_on = 0;
  int device_index = 0;
  void* stream = nullptr;
};

enum class Norm { kNone, kRms, kLayer };

// Row-wise quantisation of float (rows, cols), as it is or after a norm or an activation, to int8
// (rows, cols), scale (rows,). fastq.h has the formulas, in this order: residual, norm or
// activation, up, smooth, rotation, q.
struct QuantizeProblem {
  int64_t rows = 0, cols = 0;
  const void* x = nullptr;
  DType x_dtype = DType::kFloat32;
  int64_t stride_xr = 0, stride_xc = 0;
  int8_t* q = nullptr;
  int64_t stride_qr = 0, stride_qc = 0;
  float* scale = nullptr;
  int64_t stride_s = 0;
  int32_t* zero_point = nullptr;  // null: symmetric
  int64_t stride_z = 0;
  bool is_static = false;  // scale and zero_point are one element each, and read
  VectorView smooth;
  int rotation = 0;  // elements of a Hadamard block, a power of two that divides cols; 0: none
  // Elements of a plain x (as it is, no step above) from it on, in magnitude, are outliers: they
  // count for nothing in the scale and are zero in q; 0: none.
  float threshold = 0;
  // CUDA: where their columns are flagged, by bit c % 32 of word c / 32. Each row has a mask of its
  // own, stride_mask words apart, or with stride_mask 0 all add to one.
  uint32_t* outlier_mask = nullptr;
  int64_t stride_mask = 0;
  int64_t padded_cols = 0;  // q's rows go on with zeros up to here

  Norm norm = Norm::kNone;
  float eps = 0;
  VectorView weight, bias;
  MatrixView residual;  // in x's dtype
  void* residual_out = nullptr;
  int64_t stride_or = 0, stride_oc = 0;

  Activation activation = Activation::kNone;
  MatrixView up;  // in x's dtype

  int device_index = 0;
  void* stream = nullptr;
};

// The inverse: int8 (rows, cols), scale (rows,) to float (rows, cols).
struct DequantizeProblem {
  int64_t rows = 0, cols = 0;
  const int8_t* q = nullptr;
  int64_t stride_qr = 0, stride_qc = 0;
  const float* scale = nullptr;
  int64_t stride_s = 0;
  void* out = nullptr;
  DType out_dtype = DType::kFloat32;
  int64_t stride_or = 0, stride_oc = 0;
  int device_index = 0;
  void* stream = nullptr;
};

// (batch, seqlen, heads, head_dim), head_dim contiguous. Packed sequences have no batch stride.
struct AttentionTensor {
  void* data = nullptr;
  int64_t stride_batch = 0, stride_seqlen = 0, stride_head = 0;
};

constexpr int64_t kMaxHeadDim = 256;

struct FlashAttentionProblem {
  int64_t batch = 0;
  int64_t seqlen_q = 0, seqlen_k = 0;  // the longest, where sequences are packed
  int64_t rows_q = 0, rows_k = 0;      // of the tensors, for each of their batch entries
  int64_t num_heads = 0, num_heads_k = 0, head_dim = 0;
  DType dtype = DType::kFloat32;
  AttentionTensor q, k, v, out;
  // Packed: where sequence b begins and ends, batch + 1 numbers. Null otherwise.
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  float* lse = nullptr;  // lse[b * stride_lb + h * stride_lh + i * stride_lq]
  int64_t stride_lb = 0, stride_lh = 0, stride_lq = 0;
  const float* alibi_slopes = nullptr;  // alibi_slopes[b * stride_ab + h * stride_ah]
  int64_t stride_ab = 0, stride_ah = 0;
  float softmax_scale = 1, softcap = 0;         // 0: none
  int64_t window_left = -1, window_right = -1;  // negative: no bound; causal is window_right = 0
  int device_index = 0;
  void* stream = nullptr;
};

// float32 scales of an int8 cache, one for each token and head.
struct CacheScales {
  float* data = nullptr;
  int64_t stride_batch = 0, stride_seqlen = 0, stride_head = 0;
};

// Keys and values of `batch` sequences: (batch, capacity, heads, head_dim), or pages of them,
// (num_pages, page_size, heads, head_dim), with stride_batch from page to page.
struct KvCache {
  DType dtype = DType::kFloat32;  // q's, or int8
  AttentionTensor k, v;
  CacheScales k_scale, v_scale;      // int8 only
  const int32_t* seqlens = nullptr;  // seqlens[b * stride_seqlens], read on the device
  int64_t stride_seqlens = 0;
  int64_t capacity = 0;                  // tokens that a sequence can have
  const int32_t* block_table = nullptr;  // of pages: block_table[b * stride_table + i]
  int64_t stride_table = 0, num_pages = 0;
  int page_size = 0;  // a power of two; 0: no pages
};

struct KvAppendProblem;

// The queries are the last seqlen_q tokens of each sequence.
struct FlashDecodeProblem {
  int64_t batch = 0, seqlen_q = 0;
  int64_t num_heads = 0, num_heads_k = 0, head_dim = 0;
  DType dtype = DType::kFloat32;
  AttentionTensor q, out;
  KvCache cache;
  float* lse = nullptr;  // lse[b * stride_lb + h * stride_lh + i * stride_lq]
  int64_t stride_lb = 0, stride_lh = 0, stride_lq = 0;
  const float* alibi_slopes = nullptr;  // alibi_slopes[b * stride_ab + h * stride_ah]
  int64_t stride_ab = 0, stride_ah = 0;
  float softmax_scale = 1, softcap = 0;         // 0: none
  int64_t window_left = -1, window_right = -1;  // negative: no bound; causal is window_right = 0
  // New tokens that are to be appended first, and by whose tables the queries are to be rotated;
  // for backends that say so (flash_decode_appends).
  const KvAppendProblem* append = nullptr;
  int device_index = 0;
  void* stream = nullptr;
};

// The new tokens are the last seqlen_new of each sequence.
struct KvAppendProblem {
  int64_t batch = 0, seqlen_new = 0;
  int64_t num_heads = 0, num_heads_k = 0, head_dim = 0;  // num_heads of q; 0: no q
  DType dtype = DType::kFloat32;
  AttentionTensor k, v, q, out;  // out: the rotated q
  KvCache cache;
  // (max_seqlen, rotary_dim / 2), in float32 or in `dtype`; rotary_dim 0: no rotation.
  MatrixView rotary_cos, rotary_sin;
  int64_t rotary_dim = 0, max_seqlen = 0;
  bool rotary_interleaved = false;
  int device_index = 0;
  void* stream = nullptr;
};

}  // namespace fastq
