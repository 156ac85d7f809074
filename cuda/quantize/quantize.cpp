#include "quantize/quantize.hpp"

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "core/integers.hpp"
#include "core/settled_weights.hpp"
#include "quantize/quantize_kernels.hpp"
#include "runtime/dependent_launch.cuh"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

std::vector<QuantizeKernel>& kernels() {
  static std::vector<QuantizeKernel> list;
  return list;
}

// Of a row, at the most: all that a block may have, but for what the threads tell one another.
int held_bytes(const DeviceProps& device) { return device.shared_memory_per_block - 1024; }

// By device: whether the kernels' code there can wait for its predecessor.
std::array<bool, kMaxDevices> launches_dependent{};

[[maybe_unused]] const bool registered = register_loader([](const DeviceProps& device) {
  int arch = 0;  // the same for every kernel
  for (const QuantizeKernel& kernel : kernels()) {
    const auto function = reinterpret_cast<const void*>(kernel.function);
    arch = load_kernel(function);
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               held_bytes(device)),
          "loading a quantising kernel");
  }
  launches_dependent[device.index] = arch >= kDependentLaunchArch;
});

// Whether rows of elements of `size` bytes begin at multiples of `bytes`; so does what is absent.
bool is_aligned(const void* data, int64_t stride_row, int64_t stride_column, int64_t size,
                int64_t bytes, int64_t rows) {
  return data == nullptr || (stride_column == 1 && reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
                             (rows == 1 || stride_row * size % bytes == 0));
}

bool is_vectorizable(const QuantizeProblem& p, int vector) {
  const int64_t size = element_size(p.x_dtype);
  const auto matrix = [&](const void* data, int64_t stride_row, int64_t stride_column) {
    return is_aligned(data, stride_row, stride_column, size, 16, p.rows);
  };
  const auto columns = [](const VectorView& v) {
    return is_aligned(v.data, 0, v.stride, 1, 16, 1);
  };
  return p.cols % vector == 0 && p.cols <= INT32_MAX / 2 && matrix(p.x, p.stride_xr, p.stride_xc) &&
         matrix(p.up.data, p.up.stride_m, p.up.stride_n) &&
         matrix(p.residual.data, p.residual.stride_m, p.residual.stride_n) &&
         matrix(p.residual_out, p.stride_or, p.stride_oc) && columns(p.weight) && columns(p.bias) &&
         columns(p.smooth) && is_aligned(p.q, p.stride_qr, p.stride_qc, 1, vector, p.rows);
}

// That a kernel holds in registers.
int64_t longest_row(const QuantizeKernel& kernel) {
  return int64_t{kernel.in_registers} * kernel.vector * kernel.max_threads;
}

// Whether a vector along the columns is there, and in x's dtype.
bool is_usual(const QuantizeProblem& p, const VectorView& v) {
  return v.data != nullptr && (p.x_dtype == DType::kFloat32 || v.dtype != DType::kFloat32);
}

// What comes before p's quantisation. A norm is a usual one where it has weight and (layer norm's)
// bias as they mostly are, and a symmetric scale of its own.
RowSource source_of(const QuantizeProblem& p, bool has_options) {
  if (p.outlier_mask != nullptr) return RowSource::kOutliers;
  if (p.norm != Norm::kNone) {
    if (has_options || !is_usual(p, p.weight)) return RowSource::kNorm;
    if (p.norm == Norm::kRms && p.bias.data == nullptr) return RowSource::kRms;
    return p.norm == Norm::kLayer && is_usual(p, p.bias) ? RowSource::kLayer : RowSource::kNorm;
  }
  if (p.activation == Activation::kNone || p.activation == Activation::kRelu) {
    return RowSource::kPlain;
  }
  return p.up.data == nullptr && !has_options ? RowSource::kLoneActivation : RowSource::kActivation;
}

// Whether a kernel is for a source, or for more than that.
bool serves(const QuantizeKernel& kernel, RowSource source) {
  if (kernel.source == RowSource::kNorm && source == RowSource::kRms) return true;
  if (kernel.source == RowSource::kNorm && source == RowSource::kLayer) return true;
  if (kernel.source == RowSource::kActivation && source == RowSource::kLoneActivation) return true;
  return kernel.source == source;
}

constexpr int kResidentThreads = 1024;  // of a multiprocessor, with 64 registers each

// The blocks of a row that lies in registers: as many as it takes, and more where they would be
// large, as one that reads wants another beside it that computes. It depends on the row's length
// alone, like all that the order of a norm's sums depends on.
int blocks_of_row(const QuantizeProblem& p, const QuantizeKernel& kernel, int most_blocks) {
  constexpr int kLarge = 512;  // threads
  const int64_t of_thread = kernel.in_registers * kernel.vector;
  int blocks = 1;
  while (of_thread > 0 && blocks < most_blocks && p.cols > blocks * kLarge * of_thread) blocks *= 2;
  return blocks;
}

// Where rows are many, few threads with several vectors each keep memory busy; few rows are done
// soonest by as many threads as there are vectors, as long as all are under way at once.
int threads_of_block(const QuantizeProblem& p, const QuantizeKernel& kernel, int sm_count,
                     int blocks) {
  const int64_t vectors = ceil_div(p.cols, kernel.vector * blocks);
  const auto threads_with = [&](int64_t of_thread) {
    while (vectors > of_thread * kernel.max_threads) of_thread *= 2;
    return std::clamp<int64_t>(ceil_div(vectors, 32 * of_thread) * 32, 32, kernel.max_threads);
  };
  const bool is_norm = p.norm != Norm::kNone;
  const int64_t most = is_norm ? 4 : std::max(kernel.in_registers, 4);
  int64_t of_thread = is_norm ? most : 1;
  while (of_thread < most &&
         p.rows * blocks > sm_count * (kResidentThreads / threads_with(of_thread))) {
    of_thread *= 2;
  }
  return static_cast<int>(threads_with(of_thread));
}

// How a row is divided.
struct RowPlan {
  int blocks, threads;
  int vectors;  // of a thread, at the most
};

RowPlan plan_of(const QuantizeProblem& p, const QuantizeKernel& kernel, int sm_count,
                int most_blocks) {
  const int blocks = blocks_of_row(p, kernel, most_blocks);
  const int threads = threads_of_block(p, kernel, sm_count, blocks);
  const int64_t step = int64_t{blocks} * threads * kernel.vector;
  return {blocks, threads, static_cast<int>(ceil_div(p.cols, step))};
}

// The kernel for a problem: that which reads most at a time, without options where it has none;
// the first of equals, which is for less.
const QuantizeKernel& choose(const QuantizeProblem& p, int sm_count, int most_blocks) {
  const bool is_shifted = p.zero_point != nullptr || p.is_static;
  const bool is_plain = p.norm == Norm::kNone &&
                        (p.activation == Activation::kNone || p.activation == Activation::kRelu);
  const bool has_options =
      p.smooth.data != nullptr || p.rotation != 0 || (is_plain ? p.up.data != nullptr : is_shifted);
  const RowSource source = source_of(p, has_options);
  const QuantizeKernel* best = nullptr;
  for (const QuantizeKernel& kernel : kernels()) {
    if (kernel.dtype != p.x_dtype || !serves(kernel, source)) continue;
    if (has_options && !kernel.has_options) continue;
    if (kernel.vector > 1 && !is_vectorizable(p, kernel.vector)) continue;
    if (kernel.in_registers > 0 && p.cols > most_blocks * longest_row(kernel)) continue;
    if ((kernel.source == RowSource::kRms || kernel.source == RowSource::kLayer) &&
        plan_of(p, kernel, sm_count, most_blocks).vectors != kernel.in_registers) {
      continue;
    }
    const auto rank = [](const QuantizeKernel& x) {
      return std::make_tuple(x.vector, !x.has_options, x.in_registers);
    };
    if (best == nullptr || rank(kernel) > rank(*best)) best = &kernel;
  }
  return *best;
}

void launch(const QuantizeProblem& p) {
  const DeviceProps& device = device_props(p.device_index);
  const bool is_hopper = launches_dependent[p.device_index];
  const int most_blocks = is_hopper ? kMaxRowBlocks : 1;
  const QuantizeKernel& kernel = choose(p, device.sm_count, most_blocks);
  const auto [blocks, threads, vectors] = plan_of(p, kernel, device.sm_count, most_blocks);
  const int64_t step = int64_t{threads} * kernel.vector;
  const int64_t all = kernel.in_registers > 0 ? 0 : ceil_div(p.cols, step) * step;
  const int64_t most = held_bytes(device) / static_cast<int64_t>(sizeof(float)) / step * step;
  const bool is_usual = p.zero_point == nullptr && !p.is_static;
  QuantizeParams params{p,
                        vectors,
                        is_usual ? vectors : 0,
                        static_cast<int>(std::min(all, most)),
                        1 / static_cast<float>(std::max<int64_t>(p.cols, 1)),
                        weights_are_settled};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(p.rows * blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = params.held * sizeof(float);
  config.stream = static_cast<cudaStream_t>(p.stream);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0] = dependent_launch();
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  config.attrs = attributes;
  config.numAttrs = blocks > 1 ? 2 : is_hopper ? 1 : 0;
  void* arguments[] = {&params};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel.function), arguments),
        "launching quantize");
}

}  // namespace

bool register_quantize_kernel(const QuantizeKernel& kernel) {
  kernels().push_back(kernel);
  return true;
}

void quantize(const QuantizeProblem& problem) {
  const DeviceGuard guard(problem.device_index);
  const int64_t size = element_size(problem.x_dtype);
  const auto moved = [](const void* data, int64_t bytes) {
    return data == nullptr ? nullptr : static_cast<const char*>(data) + bytes;
  };
  QuantizeProblem p = problem;
  // The grid holds 2^31 - 1 blocks at the most: more rows go in pieces.
  for (int64_t done = 0; done < problem.rows; done += p.rows) {
    p.rows = std::min<int64_t>(problem.rows - done, INT32_MAX / kMaxRowBlocks);
    p.x = moved(problem.x, done * problem.stride_xr * size);
    p.up.data = moved(problem.up.data, done * problem.up.stride_m * size);
    p.residual.data = moved(problem.residual.data, done * problem.residual.stride_m * size);
    p.residual_out =
        const_cast<char*>(moved(problem.residual_out, done * problem.stride_or * size));
    p.q = problem.q + done * problem.stride_qr;
    if (p.outlier_mask != nullptr) p.outlier_mask = problem.outlier_mask + done * p.stride_mask;
    if (!p.is_static) {
      p.scale = problem.scale + done * problem.stride_s;
      if (p.zero_point != nullptr) p.zero_point = problem.zero_point + done * problem.stride_z;
    }
    launch(p);
  }
}

}  // namespace fastq::cuda
