// The device that is measured: its memory, its stream, its name and its caches.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#ifdef FASTQ_BENCH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "fastq/fastq.hpp"

namespace bench {

#ifdef FASTQ_BENCH_CUDA
inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
#endif

inline fastq::Device device_of(bool cuda) { return {cuda ? FASTQ_CUDA : FASTQ_CPU, 0}; }

inline std::string device_name(bool cuda) {
#ifdef FASTQ_BENCH_CUDA
  if (cuda) {
    cudaDeviceProp props;
    check_cuda(cudaGetDeviceProperties(&props, 0));
    return props.name;
  }
#endif
  (void)cuda;
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

// The stream that is timed; null on a CPU. It lives as long as the program.
inline void* make_stream(bool cuda) {
#ifdef FASTQ_BENCH_CUDA
  if (cuda) {
    cudaStream_t stream;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
  }
#endif
  (void)cuda;
  return nullptr;
}

inline void synchronize(bool cuda) {
#ifdef FASTQ_BENCH_CUDA
  if (cuda) check_cuda(cudaDeviceSynchronize());
#endif
  (void)cuda;
}

class Buffer {
 public:
  Buffer(size_t bytes, bool cuda) : bytes_(std::max<size_t>(bytes, 256)), cuda_(cuda) {
#ifdef FASTQ_BENCH_CUDA
    if (cuda_) {
      check_cuda(cudaMalloc(&data_, bytes_));
      return;
    }
#endif
    data_ = std::aligned_alloc(256, (bytes_ + 255) / 256 * 256);
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#ifdef FASTQ_BENCH_CUDA
    if (cuda_) {
      cudaFree(data_);
      return;
    }
#endif
    std::free(data_);
  }

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  // The source may lie on either device; one on the GPU is read in the order of the null stream.
  void copy_from(const void* source, size_t bytes, size_t offset = 0) {
    char* const target = static_cast<char*>(data_) + offset;
#ifdef FASTQ_BENCH_CUDA
    if (cuda_) {
      check_cuda(cudaMemcpy(target, source, bytes, cudaMemcpyDefault));
      return;
    }
#endif
    std::memcpy(target, source, bytes);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
  bool cuda_;
};
using BufferPtr = std::shared_ptr<Buffer>;

inline BufferPtr copy_of(const Buffer& source, bool cuda) {
  auto copy = std::make_shared<Buffer>(source.bytes(), cuda);
  copy->copy_from(source.data(), source.bytes());
  return copy;
}

// The L2 of a GPU, the last cache of a CPU.
inline size_t cache_bytes(bool cuda) {
#ifdef FASTQ_BENCH_CUDA
  if (cuda) {
    int bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, 0));
    return bytes;
  }
#endif
  (void)cuda;
  return std::max(sysconf(_SC_LEVEL3_CACHE_SIZE), 32L << 20);
}

// How many copies of the inputs spill it: a GPU's 4 times over, a CPU's twice.
inline size_t spilling_copies(size_t bytes_each, bool cuda) {
  const size_t wanted = (cuda ? 4 : 2) * cache_bytes(cuda);
  bytes_each = std::max<size_t>(bytes_each, 1);
  return std::clamp<size_t>((wanted + bytes_each - 1) / bytes_each, 2, 256);
}

}  // namespace bench
