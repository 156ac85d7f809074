#include "decoder_layer.hpp"

#include <stdexcept>
#include <string>

static std::string name(int layer, const char* own) {
  return "model.layers." + std::to_string(layer) + "." + own;
}

DecoderLayer::DecoderLayer(const Checkpoint& checkpoint, int layer, int64_t max_tokens,
                           fastq::Device device)
    : config_(checkpoint.config()),
      q_features_(config_.num_heads * config_.head_dim),
      kv_features_(config_.num_heads_k * config_.head_dim),
      input_norm_(
          checkpoint.read(name(layer, "input_layernorm.weight"), {config_.hidden_size}).to(device)),
      post_attention_norm_(
          checkpoint.read(name(layer, "post_attention_layernorm.weight"), {config_.hidden_size})
              .to(device)),
      qkv_proj_(checkpoint,
                {{name(layer, "self_attn.q_proj"), q_features_},
                 {name(layer, "self_attn.k_proj"), kv_features_},
                 {name(layer, "self_attn.v_proj"), kv_features_}},
                config_.hidden_size, device),
      o_proj_(checkpoint, {{name(layer, "self_attn.o_proj"), config_.hidden_size}}, q_features_,
              device),
      gate_up_proj_(checkpoint,
                    {{name(layer, "mlp.gate_proj"), config_.intermediate_size},
                     {name(layer, "mlp.up_proj"), config_.intermediate_size}},
                    config_.hidden_size, device),
      down_proj_(checkpoint, {{name(layer, "mlp.down_proj"), config_.hidden_size}},
                 config_.intermediate_size, device),
      workspace_(device),
      scale_(FASTQ_FLOAT32, {max_tokens}, device),
      hidden_q_(FASTQ_INT8, {max_tokens, config_.hidden_size}, device),
      attention_q_(FASTQ_INT8, {max_tokens, q_features_}, device),
      mlp_q_(FASTQ_INT8, {max_tokens, config_.intermediate_size}, device),
      qkv_(input_norm_.dtype(), {max_tokens, q_features_ + 2 * kv_features_}, device),
      attention_(input_norm_.dtype(), {max_tokens, q_features_}, device),
      attended_(input_norm_.dtype(), {max_tokens, config_.hidden_size}, device),
      gate_up_(input_norm_.dtype(), {max_tokens, 2 * config_.intermediate_size}, device) {}

void DecoderLayer::forward(const fastq_tensor& hidden, KVCache& cache) {
  if (hidden.dtype != input_norm_.dtype()) {
    throw std::invalid_argument("the hidden states have another dtype than the checkpoint");
  }
  const fastq_tensor x = merge_rows(hidden);
  const int64_t batch = hidden.sizes[0], tokens = x.sizes[0], inner = config_.intermediate_size;
  const fastq_tensor scale = rows(scale_.view(), tokens);
  const fastq_tensor hidden_q = rows(hidden_q_.view(), tokens);
  const fastq_tensor attention_q = rows(attention_q_.view(), tokens);
  const fastq_tensor mlp_q = rows(mlp_q_.view(), tokens);
  const fastq_tensor qkv = rows(qkv_.view(), tokens);
  const fastq_tensor attention = rows(attention_.view(), tokens);
  const fastq_tensor attended = rows(attended_.view(), tokens);
  const fastq_tensor gate_up = rows(gate_up_.view(), tokens);

  norm_quant(x, input_norm_, hidden_q, scale);
  qkv_proj_(hidden_q, scale, qkv, workspace_);
  attend(qkv, attention, batch, cache);
  fastq::quantize_per_token(attention, attention_q, scale);
  o_proj_(attention_q, scale, attended, workspace_);

  norm_quant(x, post_attention_norm_, hidden_q, scale, attended);  // adds x to attended first
  gate_up_proj_(hidden_q, scale, gate_up, workspace_);
  fastq::activation_quant(fastq::quantize_args(columns(gate_up, 0, inner), mlp_q, scale),
                          FASTQ_ACTIVATION_SILU, columns(gate_up, inner, inner));
  down_proj_(mlp_q, scale, x, workspace_, attended);  // adds attended as it writes
}

void DecoderLayer::norm_quant(const fastq_tensor& x, const Tensor& norm, const fastq_tensor& q,
                              const fastq_tensor& scale, const fastq_tensor& residual) const {
  const fastq_quantize_args quantize = fastq::quantize_args(x, q, scale);
  fastq_norm_quant_args args =
      fastq::norm_quant_args(quantize, FASTQ_RMS_NORM, norm.view(), config_.norm_eps);
  args.residual = args.residual_out = residual;
  fastq::norm_quant(args);
}

void DecoderLayer::attend(const fastq_tensor& qkv, const fastq_tensor& out, int64_t batch,
                          KVCache& cache) {
  const int64_t head_dim = config_.head_dim;
  const fastq_tensor q = split_heads(columns(qkv, 0, q_features_), batch, head_dim);
  const fastq_tensor k = split_heads(columns(qkv, q_features_, kv_features_), batch, head_dim);
  const fastq_tensor v =
      split_heads(columns(qkv, q_features_ + kv_features_, kv_features_), batch, head_dim);
  const fastq_tensor out_heads = split_heads(out, batch, head_dim);
  const int64_t seqlen = q.sizes[1], past = cache.grow(seqlen);
  const fastq_kv_cache cached = cache.view();

  fastq_kv_append_args append = fastq::kv_append_args(k, v, cached);
  append.rotary_cos = cache.rotary_cos(), append.rotary_sin = cache.rotary_sin();

  if (past == 0) {  // a prompt: its own keys, rotated, are all there are
    append.q = append.out = q;
    fastq::kv_append(append);
    fastq_tensor keys = cached.k;
    keys.sizes[1] = seqlen;
    const auto args = fastq::flash_attention_args(q, keys, v, out_heads, /*causal=*/true);
    const size_t bytes = fastq::flash_attention_workspace_size(args);
    fastq::flash_attention(args, workspace_.at_least(bytes), bytes);
  } else {
    auto args = fastq::flash_decode_args(q, cached, out_heads);
    args.append = &append;
    const size_t bytes = fastq::flash_decode_workspace_size(args);
    fastq::flash_decode(args, workspace_.at_least(bytes), bytes);
  }
}
