#include "reference_int8_gemm.hpp"

#include <cuda_runtime_api.h>
#include <cutlass/cutlass.h>

#include "reference_tile.hpp"

namespace fastq::reference {
namespace {

// Filled by the instances, in whatever order they are initialised: zero before any of them runs.
Tile tiles[FASTQ_REFERENCE_COUNT];

const Tile* find(int index) {
  return index >= 0 && index < FASTQ_REFERENCE_COUNT ? &tiles[index] : nullptr;
}

// Without a device CUTLASS would divide by its number of multiprocessors.
bool has_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess;
}

}  // namespace

bool register_tile(int index, const Tile& tile) {
  tiles[index] = tile;
  return true;
}

}  // namespace fastq::reference

#define FASTQ_REFERENCE_EXPORT extern "C" __attribute__((visibility("default")))
using fastq::reference::Problem;

FASTQ_REFERENCE_EXPORT int reference_int8_gemm_count(void) { return FASTQ_REFERENCE_COUNT; }

FASTQ_REFERENCE_EXPORT const char* reference_int8_gemm_name(int index) {
  const auto* tile = fastq::reference::find(index);
  return tile == nullptr ? nullptr : tile->name;
}

FASTQ_REFERENCE_EXPORT const char* reference_int8_gemm_group(int index) {
  const auto* tile = fastq::reference::find(index);
  return tile == nullptr ? nullptr : tile->group;
}

FASTQ_REFERENCE_EXPORT size_t reference_int8_gemm_workspace_size(int index, int M, int N, int K) {
  const auto* tile = fastq::reference::find(index);
  if (tile == nullptr || !fastq::reference::has_device()) return 0;
  return tile->workspace_size({nullptr, nullptr, nullptr, nullptr, nullptr, M, N, K});
}

FASTQ_REFERENCE_EXPORT int reference_int8_gemm(int index, const void* a, const void* b,
                                               const void* scale_a, const void* scale_b, void* out,
                                               int M, int N, int K, void* workspace,
                                               size_t workspace_size, void* stream) {
  const auto* tile = fastq::reference::find(index);
  if (tile == nullptr) return static_cast<int>(cutlass::Status::kErrorNotSupported);
  if (!fastq::reference::has_device()) return static_cast<int>(cutlass::Status::kErrorInternal);
  const Problem problem{a, b, scale_a, scale_b, out, M, N, K};
  if (workspace_size < tile->workspace_size(problem)) {
    return static_cast<int>(cutlass::Status::kErrorWorkspaceNull);
  }
  return tile->run(problem, workspace, stream);
}

FASTQ_REFERENCE_EXPORT const char* reference_int8_gemm_error(int code) {
  return cutlass::cutlassGetStatusString(static_cast<cutlass::Status>(code));
}
