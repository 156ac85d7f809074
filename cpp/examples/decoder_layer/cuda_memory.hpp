// All that this program asks of the CUDA runtime. Two files define it: cuda_memory.cpp, and
// cuda_memory_absent.cpp for a build without CUDA.
#pragma once

#include <cstddef>
#include <memory>

// Memory of a CUDA device; aligned to 256 bytes, as fastq wants its workspace.
std::shared_ptr<void> allocate_cuda(size_t bytes, int device);

// Copies between host and device, either way, and returns when it is done.
void copy_cuda(void* to, const void* from, size_t bytes);
