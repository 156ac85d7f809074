// Linear layers with INT8 weights and INT8 activations (W8A8).
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint.hpp"
#include "tensor.hpp"

// Several linear layers that read the same input, as one product: their weights lie one below the
// other, and so their outputs side by side.
class Linear {
 public:
  // `parts` are the layers' names and out_features.
  Linear(const Checkpoint& checkpoint, const std::vector<std::pair<std::string, int64_t>>& parts,
         int64_t in_features, fastq::Device device);

  // out = (q * scale) weight^T + residual, for q int8 (tokens, in_features), scale float32
  // (tokens,), out (tokens, out_features) and residual like out, or absent.
  void operator()(const fastq_tensor& q, const fastq_tensor& scale, const fastq_tensor& out,
                  Workspace& workspace, const fastq_tensor& residual = {}) const;

 private:
  Tensor data_;   // int8 (out_features, in_features), on a CPU packed for its kernels
  Tensor scale_;  // float32 (out_features,)
  fastq_weight weight_;
};
