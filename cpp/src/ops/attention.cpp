#include "ops/attention.hpp"

#include <string>

#include "core/error.hpp"

namespace fastq {

AttentionTensor attention_tensor(const TensorView& t) {
  const int64_t* const strides = t.strides + t.rank - 3;
  return {t.data, t.rank == 4 ? t.strides[0] : 0, strides[0], strides[1]};
}

void check_head_dim_stride(const char* op, const NamedTensor& tensor) {
  const TensorView& t = *tensor.view;
  const int64_t stride = t.strides[t.rank - 1];
  if (stride != 1 && t.sizes[t.rank - 1] > 1 && numel(t) > 0) {
    invalid_value(std::string(op) + ": " + tensor.name + " has stride " + std::to_string(stride) +
                  " along head_dim, expected 1; pass a contiguous copy");
  }
}

void check_head_dim(const char* op, const NamedTensor& q, int64_t head_dim) {
  if (head_dim >= 1 && head_dim <= kMaxHeadDim) return;
  wrong_shape(op, q, "head_dim from 1 to " + std::to_string(kMaxHeadDim));
}

void check_num_heads(const char* op, const NamedTensor& k, int64_t num_heads, int64_t num_heads_k) {
  if (num_heads_k == 0 ? num_heads == 0 : num_heads % num_heads_k == 0) return;
  wrong_shape(op, k, "a number of heads that divides q's " + std::to_string(num_heads));
}

void check_softmax(const char* op, float softmax_scale, float softcap) {
  if (!std::isfinite(softmax_scale)) {
    invalid_value(std::string(op) + ": softmax_scale is " + std::to_string(softmax_scale) +
                  ", expected a finite number");
  }
  if (!std::isfinite(softcap) || softcap < 0) {
    invalid_value(std::string(op) + ": softcap is " + std::to_string(softcap) +
                  ", expected a finite number from 0 on");
  }
}

}  // namespace fastq
