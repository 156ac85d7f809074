// Memory for fastq, which never allocates any itself: tensors, views into them, a workspace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <fastq/fastq.hpp>
#include <memory>
#include <vector>

size_t element_size(int32_t dtype);  // bytes

// A contiguous tensor that owns its memory, on the host or on a CUDA device. Copies share it.
class Tensor {
 public:
  Tensor() = default;
  Tensor(fastq_dtype dtype, const std::vector<int64_t>& sizes, fastq::Device device = {});

  const fastq_tensor& view() const { return view_; }
  fastq_dtype dtype() const { return static_cast<fastq_dtype>(view_.dtype); }
  std::vector<int64_t> sizes() const { return {view_.sizes, view_.sizes + view_.rank}; }
  void* data() const { return view_.data; }
  size_t bytes() const;

  Tensor to(fastq::Device device) const;      // a copy there
  void copy_from(const Tensor& other) const;  // of the same size, on any device

 private:
  std::shared_ptr<void> memory_;
  fastq_tensor view_ = {};
};

// Views of the same memory; no data moves.
fastq_tensor element(fastq_tensor view, int64_t i);   // view[i], of one dimension less
fastq_tensor rows(fastq_tensor view, int64_t count);  // the first of (rows, columns)
fastq_tensor columns(fastq_tensor view, int64_t first, int64_t count);  // of (rows, columns)
// Contiguous (batch, seqlen, columns) as (batch * seqlen, columns).
fastq_tensor merge_rows(fastq_tensor view);
// (batch * seqlen, heads * head_dim) as (batch, seqlen, heads, head_dim).
fastq_tensor split_heads(fastq_tensor view, int64_t batch, int64_t head_dim);

// Scratch memory for one op after the other, of one stream.
class Workspace {
 public:
  explicit Workspace(fastq::Device device) : device_(device) {}
  void* at_least(size_t bytes);

 private:
  fastq::Device device_;
  Tensor memory_;
};
