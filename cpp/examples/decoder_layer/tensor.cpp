#include "tensor.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "cuda_memory.hpp"

size_t element_size(int32_t dtype) {
  switch (dtype) {
    case FASTQ_INT8:
    case FASTQ_UINT8:
      return 1;
    case FASTQ_FLOAT16:
    case FASTQ_BFLOAT16:
      return 2;
    case FASTQ_FLOAT32:
    case FASTQ_INT32:
      return 4;
  }
  throw std::invalid_argument("element_size: not a dtype: " + std::to_string(dtype));
}

static std::shared_ptr<void> allocate(size_t bytes, fastq::Device device) {
  bytes = (bytes / 256 + 1) * 256;  // never none
  if (device.type == FASTQ_CUDA) return allocate_cuda(bytes, device.index);
  void* memory = std::aligned_alloc(256, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return {memory, std::free};
}

Tensor::Tensor(fastq_dtype dtype, const std::vector<int64_t>& sizes, fastq::Device device) {
  if (sizes.size() > FASTQ_MAX_RANK) throw std::invalid_argument("Tensor: over FASTQ_MAX_RANK");
  view_.dtype = dtype;
  view_.device_type = device.type;
  view_.device_index = device.index;
  view_.rank = static_cast<int32_t>(sizes.size());
  int64_t stride = 1;
  for (int i = view_.rank - 1; i >= 0; --i) {
    view_.sizes[i] = sizes[i];
    view_.strides[i] = stride;
    stride *= sizes[i];
  }
  memory_ = allocate(bytes(), device);
  view_.data = memory_.get();
}

size_t Tensor::bytes() const {
  size_t bytes = element_size(view_.dtype);
  for (int i = 0; i < view_.rank; ++i) bytes *= static_cast<size_t>(view_.sizes[i]);
  return bytes;
}

Tensor Tensor::to(fastq::Device device) const {
  const Tensor copy(dtype(), sizes(), device);
  copy.copy_from(*this);
  return copy;
}

void Tensor::copy_from(const Tensor& other) const {
  if (other.bytes() != bytes()) throw std::invalid_argument("Tensor: the sizes differ");
  if (view_.device_type == FASTQ_CPU && other.view_.device_type == FASTQ_CPU) {
    std::memcpy(data(), other.data(), bytes());
  } else {
    copy_cuda(data(), other.data(), bytes());
  }
}

fastq_tensor element(fastq_tensor view, int64_t i) {
  view.data = static_cast<char*>(view.data) + i * view.strides[0] * element_size(view.dtype);
  view.rank -= 1;
  std::copy_n(view.sizes + 1, view.rank, view.sizes);
  std::copy_n(view.strides + 1, view.rank, view.strides);
  return view;
}

fastq_tensor rows(fastq_tensor view, int64_t count) {
  if (count > view.sizes[0]) {
    throw std::invalid_argument("rows: " + std::to_string(count) + " of " +
                                std::to_string(view.sizes[0]));
  }
  view.sizes[0] = count;
  return view;
}

fastq_tensor columns(fastq_tensor view, int64_t first, int64_t count) {
  view.data = static_cast<char*>(view.data) + first * element_size(view.dtype);
  view.sizes[1] = count;
  return view;
}

fastq_tensor merge_rows(fastq_tensor view) {
  const int64_t rows = view.sizes[0] * view.sizes[1];
  view = element(view, 0);
  view.sizes[0] = rows;
  return view;
}

fastq_tensor split_heads(fastq_tensor view, int64_t batch, int64_t head_dim) {
  const int64_t seqlen = view.sizes[0] / batch, row = view.strides[0];
  view.rank = 4;
  view.sizes[2] = view.sizes[1] / head_dim;
  view.sizes[0] = batch, view.sizes[1] = seqlen, view.sizes[3] = head_dim;
  view.strides[0] = seqlen * row, view.strides[1] = row;
  view.strides[2] = head_dim, view.strides[3] = 1;
  return view;
}

void* Workspace::at_least(size_t bytes) {
  if (memory_.data() == nullptr || memory_.bytes() < bytes) {
    memory_ = Tensor(FASTQ_UINT8, {static_cast<int64_t>(bytes)}, device_);
  }
  return memory_.data();
}
