#include "ops/kv_cache.hpp"

#include <algorithm>

#include "core/error.hpp"
#include "ops/attention.hpp"

namespace fastq {
namespace {

constexpr int64_t kLeastPage = 16;

// (batch, capacity, num_heads_k, head_dim), or (num_pages, page_size, num_heads_k, head_dim).
void check_shapes(const char* op, const NamedCache& c, const NamedTensor& like) {
  const bool is_paged = is_present(c.cache.block_table);
  const TensorView &k = c.cache.k, &x = *like.view;
  if (k.rank != 4) {
    wrong_shape(op, c.k,
                is_paged ? "(num_pages, page_size, heads, head_dim), as block_table is given"
                         : "(batch, capacity, heads, head_dim)");
  }
  check_same_shape(op, c.v, c.k);
  check_head_dim_stride(op, c.k);
  check_head_dim_stride(op, c.v);
  if (k.sizes[3] != x.sizes[3]) {
    wrong_shape(op, c.k, "head_dim " + std::to_string(x.sizes[3]) + " as " + like.name + " has");
  }
  if (!is_paged) {
    if (k.sizes[0] != x.sizes[0]) {
      wrong_shape(op, c.k, "batch " + std::to_string(x.sizes[0]) + " as " + like.name + " has");
    }
    if (k.sizes[1] > INT32_MAX) wrong_shape(op, c.k, "a capacity of at most 2147483647 tokens");
    return;
  }
  const int64_t page_size = k.sizes[1];
  if (page_size < kLeastPage || page_size > INT32_MAX || (page_size & (page_size - 1)) != 0) {
    wrong_shape(op, c.k, "a page_size that is a power of two and at least 16");
  }
  const TensorView& table = c.cache.block_table;
  check_well_formed(op, c.block_table);
  check_dtype(op, c.block_table, {DType::kInt32});
  if (table.rank != 2 || table.sizes[0] != x.sizes[0]) {
    wrong_shape(op, c.block_table, "(batch, max_pages) with batch " + std::to_string(x.sizes[0]));
  }
  if (table.sizes[1] > 1 && table.strides[1] != 1) {
    invalid_value(std::string(op) + ": block_table has stride " + std::to_string(table.strides[1]) +
                  " along a sequence's pages, expected 1; pass a contiguous copy");
  }
  if (table.sizes[1] > INT32_MAX / page_size) {
    wrong_shape(op, c.block_table, "at most 2147483647 tokens for a sequence");
  }
}

void check_scales(const char* op, const NamedCache& c) {
  const bool is_int8 = dtype_of(c.cache.k) == DType::kInt8;
  for (const NamedTensor& scale : {c.k_scale, c.v_scale}) {
    const TensorView& s = *scale.view;
    if (!is_int8) {
      if (!is_present(s)) continue;
      invalid_value(std::string(op) + ": " + scale.name + " is given, but the cache is " +
                    dtype_name(dtype_of(c.cache.k)) + "; an int8 cache has scales");
    }
    if (!is_present(s)) {
      invalid_value(std::string(op) + ": " + scale.name + " is missing, and the cache is int8");
    }
    check_well_formed(op, scale);
    check_dtype(op, scale, {DType::kFloat32});
    const TensorView& k = c.cache.k;
    if (s.rank != 3 || !std::equal(s.sizes, s.sizes + 3, k.sizes)) {
      wrong_shape(op, scale,
                  "(" + std::to_string(k.sizes[0]) + ", " + std::to_string(k.sizes[1]) + ", " +
                      std::to_string(k.sizes[2]) + "), one for each token and head of k_cache");
    }
  }
}

CacheScales cache_scales(const TensorView& t) {
  return {static_cast<float*>(t.data), t.strides[0], t.strides[1], t.strides[2]};
}

}  // namespace

NamedCache::NamedCache(const fastq_kv_cache& c)
    : cache(c),
      k{"k_cache", &c.k},
      v{"v_cache", &c.v},
      k_scale{"k_scale", &c.k_scale},
      v_scale{"v_scale", &c.v_scale},
      seqlens{"cache_seqlens", &c.seqlens},
      block_table{"block_table", &c.block_table} {}

const fastq_kv_cache& known_cache(const char* op, const fastq_kv_cache* cache,
                                  fastq_kv_cache& space) {
  if (cache == nullptr) invalid_value(std::string(op) + ": cache is a null pointer");
  return known_struct(op, *cache, sizeof(fastq_kv_cache), space);
}

KvCache check_cache(const char* op, const NamedCache& c, const NamedTensor& like,
                    int64_t num_heads) {
  for (const NamedTensor& tensor : {c.k, c.v, c.seqlens}) check_well_formed(op, tensor);
  check_dtype(op, c.k, {dtype_of(*like.view), DType::kInt8});
  check_dtype(op, c.v, {dtype_of(c.cache.k)});
  check_dtype(op, c.seqlens, {DType::kInt32});
  check_shapes(op, c, like);
  check_num_heads(op, c.k, num_heads, c.cache.k.sizes[2]);
  check_scales(op, c);
  if (c.cache.seqlens.rank != 1 || c.cache.seqlens.sizes[0] != like.view->sizes[0]) {
    wrong_shape(op, c.seqlens, "(batch,) with batch " + std::to_string(like.view->sizes[0]));
  }
  check_same_device(op, {like, c.k, c.v, c.k_scale, c.v_scale, c.seqlens, c.block_table});

  KvCache cache;
  cache.dtype = dtype_of(c.cache.k);
  cache.k = attention_tensor(c.cache.k), cache.v = attention_tensor(c.cache.v);
  if (cache.dtype == DType::kInt8) {
    cache.k_scale = cache_scales(c.cache.k_scale), cache.v_scale = cache_scales(c.cache.v_scale);
  }
  cache.seqlens = static_cast<const int32_t*>(c.cache.seqlens.data);
  cache.stride_seqlens = c.cache.seqlens.strides[0];
  cache.capacity = c.cache.k.sizes[1];
  if (const TensorView& table = c.cache.block_table; is_present(table)) {
    cache.block_table = static_cast<const int32_t*>(table.data);
    cache.stride_table = table.strides[0];
    cache.num_pages = c.cache.k.sizes[0];
    cache.page_size = static_cast<int>(c.cache.k.sizes[1]);
    cache.capacity = table.sizes[1] * cache.page_size;
  }
  return cache;
}

void check_seqlens(const char* op, const KvCache& cache, int64_t batch, int64_t newest) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cache.seqlens[b * cache.stride_seqlens];
    if (length < 0 || length > cache.capacity) {
      invalid_value(std::string(op) + ": cache_seqlens[" + std::to_string(b) + "] is " +
                    std::to_string(length) + ", expected 0 to " + std::to_string(cache.capacity) +
                    ", the capacity of the cache");
    }
    if (cache.page_size == 0 || length == 0) continue;
    const int64_t first = newest < 0 ? 0 : std::max<int64_t>(length - newest, 0);
    for (int64_t i = first / cache.page_size; i * cache.page_size < length; ++i) {
      const int64_t page = cache.block_table[b * cache.stride_table + i];
      if (page >= 0 && page < cache.num_pages) continue;
      invalid_value(std::string(op) + ": block_table[" + std::to_string(b) + ", " +
                    std::to_string(i) + "] is " + std::to_string(page) + ", expected 0 to " +
                    std::to_string(cache.num_pages - 1) + ", a page of the cache, as sequence " +
                    std::to_string(b) + " has " + std::to_string(length) + " tokens");
    }
  }
}

}  // namespace fastq
