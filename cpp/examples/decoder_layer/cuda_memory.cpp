#include "cuda_memory.hpp"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

static void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

std::shared_ptr<void> allocate_cuda(size_t bytes, int device) {
  check(cudaSetDevice(device), "cudaSetDevice");
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  return {memory, cudaFree};
}

void copy_cuda(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
}
