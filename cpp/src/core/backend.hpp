// The table of backends: what an op, its arguments checked, calls on a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/problem.hpp"
#include "core/tensor.hpp"

namespace fastq {

// The caller's workspace, or its way to give one.
class Workspace {
 public:
  // A null `data` holds nothing, whatever `size` says.
  Workspace(void* data, size_t size, fastq_allocate allocate, void* context)
      : data_(data), size_(data != nullptr ? size : 0), allocate_(allocate), context_(context) {}

  // Whether get(bytes) can succeed.
  bool holds(size_t bytes) const { return bytes <= size_ || allocate_ != nullptr; }
  // At least `bytes`, undefined in content. Throws when the caller gave too little.
  void* get(const char* op, size_t bytes);

 private:
  void* data_;
  size_t size_;
  fastq_allocate allocate_;
  void* context_;
};

struct Backend {
  size_t (*int8_gemm_workspace_size)(const Int8GemmProblem&);
  void (*int8_gemm)(const Int8GemmProblem&, Workspace& workspace);
  std::string (*int8_gemm_describe)(const Int8GemmProblem&);
  // Names of configurations as FASTQ_KERNELS takes them. Null where there is no choice to force.
  std::vector<std::string> (*int8_gemm_candidates)(const Int8GemmProblem&);
  size_t (*pack_weight_size)(int64_t K, int64_t N);
  // Null where the device has no packed form.
  void (*pack_weight)(const int8_t* b, int64_t stride_bk, int64_t stride_bn, int64_t K, int64_t N,
                      void* packed);
  void (*quantize)(const QuantizeProblem&);
  void (*dequantize)(const DequantizeProblem&);
  std::string (*describe)();  // a JSON object for fastq_describe
  size_t (*flash_attention_workspace_size)(const FlashAttentionProblem&);
  void (*flash_attention)(const FlashAttentionProblem&, Workspace& workspace);
  size_t (*flash_decode_workspace_size)(const FlashDecodeProblem&);
  void (*flash_decode)(const FlashDecodeProblem&, Workspace& workspace);
  // Whether flash_decode appends such a problem's new tokens itself. Null: it never does.
  bool (*flash_decode_appends)(const FlashDecodeProblem&);
  void (*kv_append)(const KvAppendProblem&);
  size_t (*llm_int8_matmul_workspace_size)(const LlmInt8MatmulProblem&);
  void (*llm_int8_matmul)(const LlmInt8MatmulProblem&, Workspace& workspace);
};

// Called once per backend from a static initialiser; must not touch a device.
bool register_backend(DeviceType device, const Backend& backend);

// Throws an error that names `op` and the command that mends it when the build has no such backend.
const Backend& backend_for(DeviceType device, const char* op);
const Backend* find_backend(DeviceType device);

}  // namespace fastq
