// The plain output of output.cuh (scales, a bias, 16-bit floats) as one node of CUTLASS's epilogue
// visitor tree: takes the int32 accumulators and gives output words.
//
// scale_a, scale_b and bias of the tile are first gathered into shared memory, which is where any
// stride, a scalar (stride 0), any dtype and the matrix's edge are dealt with; the loop over the
// fragments then reads shared memory at offsets known to the compiler.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

#include "epilogue/output.cuh"

namespace fastq::cuda {

template <class CtaTileMNK>
struct Sm90OutputVisitor {
  static constexpr int kTileM = cute::size<0>(CtaTileMNK{});
  static constexpr int kTileN = cute::size<1>(CtaTileMNK{});

  struct SharedStorage {
    alignas(16) float scale_a[kTileM];
    alignas(16) float scale_b[kTileN];
    alignas(16) float bias[kTileN];
  };
  using Arguments = OutputParams;
  using Params = OutputParams;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& args,
                                                  void*) {
    return args;
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*,
                                              cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE Sm90OutputVisitor() {}
  CUTLASS_HOST_DEVICE Sm90OutputVisitor(const Params& p, const SharedStorage& storage)
      : params(&p), shared(const_cast<SharedStorage*>(&storage)) {}

  const Params* params = nullptr;
  SharedStorage* shared = nullptr;

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      const cutlass::epilogue::fusion::detail::ProducerLoadArgs<Args...>&) {
    return cutlass::epilogue::fusion::detail::EmptyProducerLoadCallbacks{};
  }

  // coords: (CPY, CPY_M, CPY_N, EPI_M, EPI_N) -> (m, n) relative to this thread's first element,
  // all static.
  template <class Coords>
  struct Callbacks : cutlass::epilogue::fusion::detail::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(const Params* p, SharedStorage* s, Coords c, int m, int n, int M,
                             int N, int thread_m, int thread_n, int thread, int threads)
        : params(p),
          shared(s),
          coords(c),
          tile_m(m),
          tile_n(n),
          size_m(M),
          size_n(N),
          first_m(thread_m),
          first_n(thread_n),
          thread_index(thread),
          thread_count(threads) {}

    const Params* params;
    SharedStorage* shared;
    Coords coords;
    int tile_m, tile_n, size_m, size_n;  // the tile's origin and the matrix's sizes
    int first_m, first_n;                // this thread's first element within the tile
    int thread_index, thread_count;

    // All loads come before the stores: a store to shared memory would hold the next load up.
    CUTLASS_DEVICE void begin() {
      constexpr int kThreads = 128;  // a warpgroup has at least this many
      constexpr int kMost = (cute::max(kTileM, kTileN) + kThreads - 1) / kThreads;
      float scale_a[kMost], scale_b[kMost], bias[kMost];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kMost; ++i) {
        const int at = thread_index + i * thread_count;
        scale_a[i] = load_or_zero(params->scale_a, tile_m + at, size_m);
        scale_b[i] = load_or_zero(params->scale_b, tile_n + at, size_n);
        bias[i] = load_or_zero(params->bias, tile_n + at, size_n);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kMost; ++i) {
        const int at = thread_index + i * thread_count;
        if (at < kTileM) shared->scale_a[at] = scale_a[i];
        if (at < kTileN) shared->scale_b[at] = scale_b[i], shared->bias[at] = bias[i];
      }
    }

    // What begin() wrote is read by every thread of the tile.
    CUTLASS_DEVICE bool begin_sync_needed() const { return true; }

    template <class Accumulator, int kSize>
    CUTLASS_DEVICE cutlass::Array<uint16_t, kSize> visit(
        const cutlass::Array<Accumulator, kSize>& acc, int epi_v, int epi_m, int epi_n) {
      cutlass::Array<uint16_t, kSize> out;
      const bool has_bias = params->bias.data != nullptr;
      auto coords_mn = coords(cute::_, cute::_, cute::_, epi_m, epi_n);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const auto mn = coords_mn(epi_v * kSize + i);
        const int m = first_m + cute::get<0>(mn), n = first_n + cute::get<1>(mn);
        out[i] = narrow(scale_sum(acc[i], shared->scale_a[m], shared->scale_b[n],
                                  has_bias ? shared->bias[n] : -0.0f),
                        params->dtype);
      }
      return out;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...>& args) {
    const auto [M, N, K, L] = args.problem_shape_mnkl;
    const auto [m, n, k, l] = args.tile_coord_mnkl;
    const int tile_m = static_cast<int>(m) * kTileM, tile_n = static_cast<int>(n) * kTileN;
    // residue_tCcD is (M, N) minus this thread's first absolute coordinate.
    const int thread_m = static_cast<int>(M) - cute::get<0>(args.residue_tCcD) - tile_m;
    const int thread_n = static_cast<int>(N) - cute::get<1>(args.residue_tCcD) - tile_n;
    return Callbacks<decltype(args.tCcD)>(params, shared, args.tCcD, tile_m, tile_n, M, N, thread_m,
                                          thread_n, args.thread_idx, cute::size(args.tiled_mma));
  }
};

}  // namespace fastq::cuda
