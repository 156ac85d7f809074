// One layer of a LLaMA in W8A8, on fastq's fused ops.
//
// Source: ZeroQuant (Yao et al., 2022), quantisation fused into what comes before a product.
#pragma once

#include <cstdint>

#include "checkpoint.hpp"
#include "kv_cache.hpp"
#include "linear.hpp"
#include "tensor.hpp"

class DecoderLayer {
 public:
  // Reads layer number `layer`. `max_tokens`, over all sequences, is the most that forward takes.
  DecoderLayer(const Checkpoint& checkpoint, int layer, int64_t max_tokens, fastq::Device device);

  // Puts the layer's output in the place of its input: `hidden` is contiguous (batch, seqlen,
  // hidden_size), the next tokens of the sequences in `cache`, in the checkpoint's float dtype.
  void forward(const fastq_tensor& hidden, KVCache& cache);

 private:
  // q, scale = quantize(rms_norm(x)); with a residual, of x + residual, which replaces it.
  void norm_quant(const fastq_tensor& x, const Tensor& norm, const fastq_tensor& q,
                  const fastq_tensor& scale, const fastq_tensor& residual = {}) const;
  // out = attention of the queries, keys and values, side by side in qkv. Rotates the queries.
  void attend(const fastq_tensor& qkv, const fastq_tensor& out, int64_t batch, KVCache& cache);

  Config config_;
  int64_t q_features_, kv_features_;  // out_features of q_proj, and of k_proj and v_proj each
  Tensor input_norm_, post_attention_norm_;  // (hidden_size,)
  Linear qkv_proj_, o_proj_, gate_up_proj_, down_proj_;
  Workspace workspace_;

  // What passes between the ops, (max_tokens, ...).
  Tensor scale_;                           // float32, of whatever is quantised
  Tensor hidden_q_, attention_q_, mlp_q_;  // int8
  Tensor qkv_, attention_, attended_, gate_up_;
};
