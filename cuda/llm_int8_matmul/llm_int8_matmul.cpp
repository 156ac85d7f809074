#include "llm_int8_matmul/llm_int8_matmul.hpp"

#include <algorithm>
#include <limits>

#include "core/error.hpp"
#include "core/integers.hpp"
#include "int8_gemm/gather_outliers.hpp"
#include "int8_gemm/int8_gemm.hpp"
#include "quantize/quantize.hpp"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

// Up to as many words of masks rows have masks of their own: that saves a kernel that clears a
// common one, and costs each block of the product the reading.
constexpr int64_t kMaskWords = 512;
// Up to as many, a block of the product gathers the outliers of its own tiles.
constexpr int64_t kFewTokens = 128;
// A tile of the product may read as far behind the last row or column.
constexpr int64_t kBehind = 256;

// The parts of the workspace, one behind the other.
class Parts {
 public:
  explicit Parts(void* data) : data_(static_cast<char*>(data)) {}
  template <class T>
  T* take(int64_t count) {
    auto* part = reinterpret_cast<T*>(data_ == nullptr ? nullptr : data_ + size_);
    size_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return part;
  }
  size_t size() const { return static_cast<size_t>(size_); }

 private:
  char* data_;
  int64_t size_ = 0;
};

// A call in the workspace that starts at `data`; with null, only the size is right.
struct Call {
  explicit Call(const LlmInt8MatmulProblem& problem, void* data) : p(problem), parts(data) {
    has_outliers = p.split.threshold > 0 && p.M > 0 && p.K > 0;
    const int64_t padded_k = round_up(p.K, 16);
    quantize.rows = p.M, quantize.cols = p.K, quantize.padded_cols = padded_k;
    quantize.x = p.split.x.data, quantize.x_dtype = p.split.x.dtype;
    quantize.stride_xr = p.split.x.stride_m, quantize.stride_xc = p.split.x.stride_n;
    quantize.q = parts.take<int8_t>(p.M * padded_k);
    quantize.stride_qr = padded_k, quantize.stride_qc = 1;
    quantize.scale = parts.take<float>(p.M), quantize.stride_s = 1;
    // No comparison with NaN is true.
    quantize.threshold = has_outliers ? p.split.threshold : std::numeric_limits<float>::quiet_NaN();
    const int64_t words = mask_words(p.K);
    const bool has_masks = p.M * words <= kMaskWords;
    const int64_t mask_rows = has_masks ? p.M : 1;
    quantize.outlier_mask = parts.take<uint32_t>(mask_rows * words);
    quantize.stride_mask = has_masks ? words : 0;
    quantize.device_index = p.device_index, quantize.stream = p.stream;
    if (!has_outliers) return;
    split = p.split;
    split.columns = parts.take<int32_t>(p.K + 32);
    split.num_columns = parts.take<int32_t>(2);
    split.capacity = kOutlierCapacity;
    split.stride_gx = round_up(p.M + kBehind, 4), split.stride_gb = round_up(p.N + kBehind, 4);
    split.gathered_x = parts.take<float>(kOutlierCapacity * split.stride_gx);
    split.gathered_b = parts.take<float>(kOutlierCapacity * split.stride_gb);
    split.masks = quantize.outlier_mask, split.mask_rows = static_cast<int>(mask_rows);
    split.stride_mask = words;
    split.outlier_count = p.outlier_count;
    // Cleared with the mask.
    if (!has_masks && p.M > kFewTokens) split.counters = parts.take<int32_t>(2);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Int8GemmProblem product() const {
    Int8GemmProblem g;
    g.M = p.M, g.N = p.N, g.K = p.K;
    g.a = quantize.q, g.stride_am = quantize.stride_qr, g.stride_ak = 1;
    g.a_is_padded = true;
    g.b = p.b, g.stride_bk = p.stride_bk, g.stride_bn = p.stride_bn;
    g.b_is_constant = p.b_is_constant;
    g.scale_a = {quantize.scale, DType::kFloat32, 1};
    g.scale_b = p.scale_b, g.bias = p.bias;
    g.outliers = has_outliers ? &split : nullptr;
    g.out = p.out, g.out_dtype = p.out_dtype;
    g.stride_om = p.stride_om, g.stride_on = p.stride_on;
    g.device_index = p.device_index, g.stream = p.stream;
    return g;
  }

  const LlmInt8MatmulProblem& p;
  Parts parts;
  bool has_outliers;
  QuantizeProblem quantize;
  OutlierSplit split;
};

void check_sizes(const LlmInt8MatmulProblem& p) {
  if (p.M > INT32_MAX - kBehind || p.N > INT32_MAX - kBehind) {
    not_implemented("llm_int8_matmul: M = " + std::to_string(p.M) + ", N = " + std::to_string(p.N) +
                    ", expected less than 2147483392 each on CUDA");
  }
}

}  // namespace

size_t llm_int8_matmul_workspace_size(const LlmInt8MatmulProblem& p) {
  check_sizes(p);
  const Call call(p, nullptr);
  const bool multiplies = p.M > 0 && p.N > 0;
  return call.parts.size() + (multiplies ? int8_gemm_workspace_size(call.product()) : 0);
}

void llm_int8_matmul(const LlmInt8MatmulProblem& p, Workspace& workspace) {
  const size_t size = llm_int8_matmul_workspace_size(p);
  auto* const data = static_cast<char*>(workspace.get("llm_int8_matmul", size));
  const DeviceGuard guard(p.device_index);
  const auto stream = static_cast<cudaStream_t>(p.stream);
  const Call call(p, data);
  if (!call.has_outliers && p.outlier_count != nullptr) {
    check(cudaMemsetAsync(p.outlier_count, 0, sizeof(int32_t), stream), "clearing outlier_count");
  }
  if (p.M == 0) return;
  if (call.has_outliers && call.quantize.stride_mask == 0) {
    clear_outlier_mask(call.quantize.outlier_mask, mask_words(p.K), call.split.counters,
                       p.device_index, p.stream);
  }
  quantize(call.quantize);
  if (p.N == 0) {
    if (call.has_outliers) gather_outliers(call.product());
    return;
  }
  Workspace rest(data + call.parts.size(), size - call.parts.size(), nullptr, nullptr);
  int8_gemm(call.product(), rest);
}

}  // namespace fastq::cuda
