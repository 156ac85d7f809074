// What flash_decode and kv_append ask of a cache of keys and values.
#pragma once

#include <cstdint>
#include <string>

#include "core/problem.hpp"
#include "ops/checks.hpp"

namespace fastq {

// The tensors of a cache, by the names that messages give them. Holds no memory: `cache` outlives
// it.
struct NamedCache {
  explicit NamedCache(const fastq_kv_cache& cache);

  const fastq_kv_cache& cache;
  const NamedTensor k, v, k_scale, v_scale, seqlens, block_table;
};

// The cache, every field that this library knows: completed in `space` where the caller's is
// shorter.
const fastq_kv_cache& known_cache(const char* op, const fastq_kv_cache* cache,
                                  fastq_kv_cache& space);

// Everything that shapes, strides and dtypes tell. `like` holds the queries or the new keys,
// (batch, seqlen, heads, head_dim); an op has `num_heads` heads of queries, 0: none.
KvCache check_cache(const char* op, const NamedCache& cache, const NamedTensor& like,
                    int64_t num_heads);

// What a cache on a CPU holds: every sequence has from 0 to capacity tokens, and the pages of its
// last `newest` tokens (negative: of all) exist.
void check_seqlens(const char* op, const KvCache& cache, int64_t batch, int64_t newest);

}  // namespace fastq
