#include "kv_cache.hpp"

#include <cmath>
#include <stdexcept>
#include <string>

KVCache::KVCache(const Config& config, int64_t batch, int64_t capacity, fastq_dtype dtype,
                 fastq::Device device)
    : keys_(dtype, {batch, capacity, config.num_heads_k, config.head_dim}, device),
      values_(dtype, keys_.sizes(), device),
      seqlens_(FASTQ_INT32, {batch}, device) {
  // Rounded to float32 where transformers rounds it.
  const int64_t pairs = config.head_dim / 2;
  const Tensor cos(FASTQ_FLOAT32, {capacity, pairs}), sin(FASTQ_FLOAT32, {capacity, pairs});
  for (int64_t i = 0; i < pairs; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.head_dim);
    const float frequency = 1.0f / static_cast<float>(std::pow(config.rope_theta, exponent));
    for (int64_t position = 0; position < capacity; ++position) {
      const double angle = static_cast<float>(position) * frequency;
      static_cast<float*>(cos.data())[position * pairs + i] = static_cast<float>(std::cos(angle));
      static_cast<float*>(sin.data())[position * pairs + i] = static_cast<float>(std::sin(angle));
    }
  }
  cos_ = cos.to(device);
  sin_ = sin.to(device);
}

int64_t KVCache::grow(int64_t seqlen) {
  const int64_t capacity = keys_.sizes()[1], before = length_;
  if (seqlen > capacity - length_) {
    throw std::length_error("KVCache: " + std::to_string(length_ + seqlen) + " tokens, room for " +
                            std::to_string(capacity));
  }
  length_ += seqlen;
  const Tensor seqlens(FASTQ_INT32, seqlens_.sizes());
  for (int64_t b = 0; b < seqlens.sizes()[0]; ++b) {
    static_cast<int32_t*>(seqlens.data())[b] = static_cast<int32_t>(length_);
  }
  seqlens_.copy_from(seqlens);
  return before;
}

fastq_kv_cache KVCache::view() const {
  return fastq::kv_cache(keys_.view(), values_.view(), seqlens_.view());
}
