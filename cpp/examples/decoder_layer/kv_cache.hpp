// Keys and values of the tokens so far, of one layer.
#pragma once

#include <cstdint>

#include "checkpoint.hpp"
#include "tensor.hpp"

class KVCache {
 public:
  // Room for `capacity` tokens of each sequence, in the hidden states' dtype.
  KVCache(const Config& config, int64_t batch, int64_t capacity, fastq_dtype dtype,
          fastq::Device device);

  // Says that the next tokens of each sequence come: so many. Returns how many there were.
  int64_t grow(int64_t seqlen);

  fastq_kv_cache view() const;
  // Tables of the rotary embedding, float32 (capacity, head_dim / 2), a row for each position.
  const fastq_tensor& rotary_cos() const { return cos_.view(); }
  const fastq_tensor& rotary_sin() const { return sin_.view(); }

 private:
  int64_t length_ = 0;
  Tensor keys_, values_;  // (batch, capacity, num_heads_k, head_dim)
  Tensor seqlens_;        // int32 (batch,)
  Tensor cos_, sin_;
};
