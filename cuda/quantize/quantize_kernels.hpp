// The compiled kernels: each instance's translation unit registers its own here, and quantize.cpp
// looks its choice up.
#pragma once

#include <cuda_runtime_api.h>

#include "core/problem.hpp"

namespace fastq::cuda {

// What comes before the quantisation proper: nothing or relu; nothing, with outliers apart; another
// activation; the same and no product with up; an RMS norm without bias or a layer norm, of usual
// rows whose threads have as many vectors as they may; any norm.
enum class RowSource { kPlain, kOutliers, kActivation, kLoneActivation, kRms, kLayer, kNorm };

constexpr int kMaxQuantizeThreads = 1024;  // of a block
constexpr int kMaxRowBlocks = 4;           // of a cluster, which has a row

struct QuantizeParams {
  QuantizeProblem problem;
  int vectors;        // of a row, that a thread has at the most, where it has them in registers
  int usual_vectors;  // the same of usual rows, and 0 of others
  int held;           // columns in shared memory, a multiple of what a block reads at once
  float inverse_cols;
  bool starts_successor_early;
};

struct QuantizeKernel {
  DType dtype;
  RowSource source;
  bool has_options;  // smooth, rotation; up of a plain source, zero_point or is_static of others
  int vector;        // elements that are read at a time: 16 bytes, or one element of any layout
  int in_registers;  // vectors that a thread has at the most; 0: any number
                     // (and then a cluster of blocks may have a row)
  int max_threads;
  void (*function)(QuantizeParams);
};

// Called from static initialisers.
bool register_quantize_kernel(const QuantizeKernel& kernel);

}  // namespace fastq::cuda
