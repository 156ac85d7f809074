// x is looked through for the columns that hold outliers and quantised without them, a group of
// rows at a time, while they are in cache. int8_gemm does the rest: its epilogue adds the outliers,
// reading those columns of x and of the weight, which are gathered first where many tiles of output
// would look for them all over the memory. fastq.h has the formula.
#include "cpu/llm_int8_matmul/llm_int8_matmul.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/float16.hpp"
#include "core/integers.hpp"
#include "cpu/float_rows.hpp"
#include "cpu/int8_gemm/int8_gemm.hpp"
#include "cpu/int8_gemm/outliers.hpp"
#include "cpu/quantize/quantize.hpp"
#include "cpu/thread_pool.hpp"

namespace fastq::cpu {
namespace {

constexpr const char* kOp = "llm_int8_matmul";
constexpr int64_t kElementsPerTask = 64 * 1024;
constexpr int64_t kWordBits = 64;  // of the mask of columns

constexpr int kGatheredColumns = kOutlierChunk;  // at once
constexpr int64_t kGatheredRows = 64;            // of x a task

// With few rows int8_gemm has just read b where its epilogue needs it.
bool gathers(const LlmInt8MatmulProblem& p) { return p.M > kPanelRows && p.N > 0; }

// The workspace's parts, as offsets. int8_gemm's own is at the end.
struct Layout {
  int64_t mask, columns, count, scales, q, x, b, gemm;
  int64_t stride_x = 0, stride_b = 0;

  explicit Layout(const LlmInt8MatmulProblem& p) {
    int64_t end = 0;
    const auto take = [&](int64_t bytes) {
      const int64_t begin = end;
      end = round_up(begin + bytes, 64);
      return begin;
    };
    mask = take(ceil_div(p.K, kWordBits) * sizeof(uint64_t));
    columns = take(p.K * sizeof(int32_t));
    count = take(sizeof(int32_t));
    scales = take(p.M * sizeof(float));
    q = take(p.M * p.K);
    if (gathers(p)) stride_x = round_up(p.M, kTileN), stride_b = round_up(p.N, kTileN);
    x = take(kGatheredColumns * stride_x * sizeof(float));
    b = take(kGatheredColumns * stride_b * sizeof(float));
    gemm = end;
  }
};

// Without pointers into a workspace there may be none yet.
Int8GemmProblem gemm_problem(const LlmInt8MatmulProblem& p) {
  Int8GemmProblem gemm;
  gemm.M = p.M, gemm.N = p.N, gemm.K = p.K;
  gemm.stride_am = p.K, gemm.stride_ak = 1;
  gemm.b = p.b;
  gemm.stride_bk = p.stride_bk, gemm.stride_bn = p.stride_bn;
  gemm.b_is_constant = p.b_is_constant;
  gemm.scale_a.stride = 1;
  gemm.scale_b = p.scale_b, gemm.bias = p.bias;
  gemm.out = p.out, gemm.out_dtype = p.out_dtype;
  gemm.stride_om = p.stride_om, gemm.stride_on = p.stride_on;
  return gemm;
}

QuantizeProblem quantize_problem(const LlmInt8MatmulProblem& p, int8_t* q, float* scales) {
  QuantizeProblem quantization;
  quantization.rows = p.M, quantization.cols = p.K;
  quantization.x = p.split.x.data, quantization.x_dtype = p.split.x.dtype;
  quantization.stride_xr = p.split.x.stride_m, quantization.stride_xc = p.split.x.stride_n;
  quantization.q = q;
  quantization.stride_qr = p.K, quantization.stride_qc = 1;
  quantization.scale = scales, quantization.stride_s = 1;
  quantization.threshold = p.split.threshold;
  return quantization;
}

// Magnitudes of a float format, as integers, that are outliers: from `first` to Inf. Signed ones,
// and a flag of their width: SSE2 compares no others.
template <class Bits>
struct Range {
  Bits first, inf;
  Bits holds(Bits bits) const {
    const Bits magnitude = bits & std::numeric_limits<Bits>::max();
    return (magnitude >= first) & (magnitude <= inf);
  }
};

// Of bfloat16 or float16: the first whose value reaches the threshold.
Range<int16_t> narrow_range(float threshold, DType dtype) {
  const bool is_bfloat16 = dtype == DType::kBFloat16;
  const int16_t inf = is_bfloat16 ? 0x7f80 : 0x7c00;
  int16_t low = 0, high = inf;
  while (low < high) {
    const auto middle = static_cast<int16_t>((low + high) / 2);
    const auto bits = static_cast<uint16_t>(middle);
    if ((is_bfloat16 ? bfloat16_to_float(bits) : float16_to_float(bits)) >= threshold) {
      high = middle;
    } else {
      low = static_cast<int16_t>(middle + 1);
    }
  }
  return {low, inf};
}

template <class Bits>
bool any_outlier(const Bits* x, int64_t stride, int64_t count, const Range<Bits> outliers) {
  Bits any = 0;
  if (stride == 1 && count == kWordBits) {
    for (int64_t i = 0; i < kWordBits; ++i) any |= outliers.holds(x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) any |= outliers.holds(x[i * stride]);
  }
  return any != 0;
}

// Adds a row's outliers to the mask. Few words have any: they alone are looked at bit by bit.
template <class Bits>
void mark_row(const Bits* x, int64_t stride, int64_t cols, const Range<Bits> outliers,
              uint64_t* mask) {
  for (int64_t c = 0; c < cols; c += kWordBits) {
    const int64_t count = std::min(kWordBits, cols - c);
    const Bits* from = x + c * stride;
    if (!any_outlier(from, stride, count, outliers)) continue;
    uint64_t word = 0;
    for (int64_t i = 0; i < count; ++i) {
      word |= static_cast<uint64_t>(outliers.holds(from[i * stride])) << i;
    }
    // Other threads' rows share the mask, and mostly the outliers.
    uint64_t* to = mask + c / kWordBits;
    if ((word & ~__atomic_load_n(to, __ATOMIC_RELAXED)) == 0) continue;
    __atomic_fetch_or(to, word, __ATOMIC_RELAXED);
  }
}

void mark_rows(const LlmInt8MatmulProblem& p, int64_t first, int64_t last, uint64_t* mask) {
  const MatrixView& x = p.split.x;
  const auto mark = [&](auto outliers, auto* data) {
    for (int64_t m = first; m < last; ++m) {
      mark_row(data + m * x.stride_m, x.stride_n, p.K, outliers, mask);
    }
  };
  if (x.dtype == DType::kFloat32) {
    mark(Range<int32_t>{static_cast<int32_t>(float_bits(p.split.threshold)), 0x7f800000},
         static_cast<const int32_t*>(x.data));
  } else {
    mark(narrow_range(p.split.threshold, x.dtype), static_cast<const int16_t*>(x.data));
  }
}

int32_t list_columns(const uint64_t* mask, int64_t cols, int32_t* columns) {
  int32_t count = 0;
  for (int64_t i = 0; i < ceil_div(cols, kWordBits); ++i) {
    for (uint64_t word = mask[i]; word != 0; word &= word - 1) {
      columns[count++] = static_cast<int32_t>(i * kWordBits + __builtin_ctzll(word));
    }
  }
  return count;
}

void gather_x(const OutlierSplit& split, int count, int64_t M, float* to) {
  parallel_for(ceil_div(M, kGatheredRows), get_num_threads(), [&](int64_t task, int) {
    const int64_t first = task * kGatheredRows, last = std::min(first + kGatheredRows, M);
    for (int i = 0; i < count; ++i) {
      for (int64_t m = first; m < last; ++m) {
        const float x = load_float(split.x.data, split.x.dtype,
                                   m * split.x.stride_m + split.columns[i] * split.x.stride_n);
        to[i * split.stride_gx + m] = std::fabs(x) >= split.threshold ? x : 0.0f;
      }
    }
  });
}

void gather_b(const Int8GemmProblem& p, int count, float* to) {
  parallel_for(ceil_div(p.N, kTileN), get_num_threads(), [&](int64_t task, int) {
    const int64_t n = task * kTileN;
    const int cols = static_cast<int>(std::min<int64_t>(kTileN, p.N - n));
    float scale_b[kTileN];
    load_floats(p.scale_b.data, p.scale_b.dtype, n * p.scale_b.stride, p.scale_b.stride, cols,
                scale_b);
    outlier_weights(p, p.outliers->columns, count, n, cols, scale_b, to + n, p.outliers->stride_gb);
  });
}

// Fills the mask and, where there will be a product, q and the scales.
void split_rows(const LlmInt8MatmulProblem& p, uint64_t* mask, int8_t* q, float* scales) {
  const bool has_threshold = p.split.threshold > 0;
  std::memset(mask, 0, ceil_div(p.K, kWordBits) * sizeof(uint64_t));
  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, p.K));
  parallel_for(ceil_div(p.M, rows_per_task), get_num_threads(), [&](int64_t task, int) {
    const int64_t first = task * rows_per_task, last = std::min(first + rows_per_task, p.M);
    if (has_threshold) mark_rows(p, first, last, mask);
    if (p.N == 0) return;
    QuantizeProblem group = quantize_problem(p, q + first * p.K, scales + first);
    const int64_t offset = first * p.split.x.stride_m * element_size(p.split.x.dtype);
    group.rows = last - first;
    group.x = static_cast<const char*>(p.split.x.data) + offset;
    quantize(group);
  });
}

}  // namespace

size_t llm_int8_matmul_workspace_size(const LlmInt8MatmulProblem& p) {
  if (p.M == 0) return 0;
  return Layout(p).gemm + (p.N > 0 ? int8_gemm_workspace_size(gemm_problem(p)) : 0);
}

void llm_int8_matmul(const LlmInt8MatmulProblem& p, Workspace& workspace) {
  if (p.M == 0) {
    *p.outlier_count = 0;
    return;
  }
  const Layout layout(p);
  Int8GemmProblem gemm = gemm_problem(p);
  size_t gemm_bytes = 0;
  if (p.N > 0) {
    GemmConfig config = select_gemm_config(gemm, active_isa(), get_num_threads());
    // As in int8_gemm: more threads than when the caller asked for the size.
    while (config.threads > 1 && !workspace.holds(layout.gemm + config.workspace_bytes())) {
      --config.threads;
    }
    gemm_bytes = config.workspace_bytes();
  }
  char* const base = static_cast<char*>(workspace.get(kOp, layout.gemm + gemm_bytes));
  auto* const mask = reinterpret_cast<uint64_t*>(base + layout.mask);
  auto* const columns = reinterpret_cast<int32_t*>(base + layout.columns);
  auto* const count = reinterpret_cast<int32_t*>(base + layout.count);
  auto* const scales = reinterpret_cast<float*>(base + layout.scales);
  auto* const q = reinterpret_cast<int8_t*>(base + layout.q);
  split_rows(p, mask, q, scales);
  *count = list_columns(mask, p.K, columns);
  if (p.outlier_count != nullptr) *p.outlier_count = *count;
  if (p.N == 0) return;

  OutlierSplit split = p.split;
  split.columns = columns, split.num_columns = count;
  gemm.a = q;
  gemm.scale_a.data = scales;
  gemm.outliers = &split;
  if (gathers(p) && *count > 0) {
    auto* const x = reinterpret_cast<float*>(base + layout.x);
    auto* const b = reinterpret_cast<float*>(base + layout.b);
    split.capacity = kGatheredColumns;
    split.gathered_x = x, split.stride_gx = layout.stride_x;
    split.gathered_b = b, split.stride_gb = layout.stride_b;
    const int gathered = std::min<int>(*count, kGatheredColumns);
    gather_x(split, gathered, p.M, x);
    gather_b(gemm, gathered, b);
  }
  Workspace rest(base + layout.gemm, gemm_bytes, nullptr, nullptr);
  int8_gemm(gemm, rest);
}

}  // namespace fastq::cpu
