// INT8 GEMM for Hopper (sm_90a), for many tokens and plain outputs (scales, a bias, 16-bit floats):
// out (M, N) = output(a (M, K) . b (N, K)^T), see epilogue/output.cuh.
//
// a and b are int8 with K contiguous, which is the only form INT8 WGMMA reads. A producer warp
// brings tiles of both to shared memory by TMA, in as many stages as fit; two consumer warpgroups
// multiply (WGMMA, int32 accumulators, exact), each a tile of its own, so that one's epilogue runs
// under the other's main loop (ping-pong). The grid is persistent, clusters share tiles by TMA
// multicast. Built from CUTLASS 3's collectives; ours are the epilogue node, the launch and the
// descriptor cache.
#pragma once

#define CUTLASS_ENABLE_GDC_FOR_SM90  // the kernel waits for its predecessor, see the launch
#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

#include "epilogue/sm90_output_visitor.cuh"
#include "int8_gemm/int8_gemm_kernels.hpp"
#include "runtime/dependent_launch.cuh"
#include "runtime/tma_cache.hpp"

namespace fastq::cuda {

template <int kTileM, int kTileN, int kTileK, int kClusterM, int kClusterN>
struct Sm90Gemm {
  using Tile = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kTileK>>;
  using Cluster = cute::Shape<cute::Int<kClusterM>, cute::Int<kClusterN>, cute::_1>;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  using Visitor = Sm90OutputVisitor<Tile>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, RowMajor, 8, uint16_t,
      RowMajor, 8, cutlass::epilogue::TmaWarpSpecialized, Visitor>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, RowMajor, 16, int8_t,
      ColumnMajor, 16, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, cutlass::gemm::PersistentScheduler>;

  static void load() {
    check(cudaFuncSetAttribute(cutlass::device_kernel<Kernel>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Kernel::SharedStorageSize),
          "loading an sm_90a INT8 GEMM");
  }

  static auto problem_shape(const Int8GemmProblem& p) {
    return cute::make_shape(int(p.M), int(p.N), int(p.K), 1);
  }

  // The collectives tell int8 and uint8 apart in the MMA only, not in TMA.
  static auto as_tma_element(const int8_t* data) {
    return reinterpret_cast<const typename Mainloop::InternalElementA*>(data);
  }

  static typename Mainloop::Params mainloop_params(const GemmLaunch& launch) {
    const Int8GemmProblem& p = *launch.problem;
    typename Mainloop::Params params;
    params.tma_load_a =
        cached_tma<typename Mainloop::Params::TMA_A>({launch.a, p.M, p.K, launch.ld_a}, [&] {
          auto a =
              cute::make_tensor(as_tma_element(launch.a), cute::make_shape(int(p.M), int(p.K), 1),
                                cute::make_stride(launch.ld_a, cute::_1{}, int64_t{0}));
          return cute::make_tma_copy_A_sm90(
              typename Mainloop::GmemTiledCopyA{}, a,
              typename Mainloop::SmemLayoutA{}(cute::_, cute::_, cute::_0{}), Tile{}, Cluster{});
        });
    params.tma_load_b =
        cached_tma<typename Mainloop::Params::TMA_B>({launch.b, p.N, p.K, launch.ld_b}, [&] {
          auto b =
              cute::make_tensor(as_tma_element(launch.b), cute::make_shape(int(p.N), int(p.K), 1),
                                cute::make_stride(launch.ld_b, cute::_1{}, int64_t{0}));
          return cute::make_tma_copy_B_sm90(
              typename Mainloop::GmemTiledCopyB{}, b,
              typename Mainloop::SmemLayoutB{}(cute::_, cute::_, cute::_0{}), Tile{}, Cluster{});
        });
    return params;
  }

  static typename Epilogue::Params epilogue_params(const GemmLaunch& launch) {
    const Int8GemmProblem& p = *launch.problem;
    typename Epilogue::Params params{};
    params.thread = output_params(p);
    // A single row has no row stride of its own to speak of; TMA still wants a multiple of 16
    // bytes.
    const int64_t ld = p.M == 1 ? round_up(p.N, 8) : p.stride_om;
    params.tma_store_d = cached_tma<typename Epilogue::Params::TMA_D>({p.out, p.M, p.N, ld}, [&] {
      const auto stride = cute::make_stride(ld, cute::_1{}, int64_t{0});
      const typename Epilogue::Arguments args{params.thread, nullptr, stride,
                                              static_cast<uint16_t*>(p.out), stride};
      return Epilogue::to_underlying_arguments(problem_shape(p), args, nullptr).tma_store_d;
    });
    return params;
  }

  static void launch(const GemmLaunch& launch) {
    const Int8GemmProblem& p = *launch.problem;
    using Scheduler = typename Kernel::TileScheduler;
    cutlass::KernelHardwareInfo hardware{p.device_index, launch.device->sm_count};
    typename Scheduler::Arguments schedule;
    // Up to 1 % faster on large problems, where more is slower; small ones it pads with idle tiles.
    if (p.M >= 2048 && p.N >= 2048) schedule.max_swizzle_size = 2;
    const auto shape = problem_shape(p);
    typename Kernel::Params params{
        cutlass::gemm::GemmUniversalMode::kGemm,
        shape,
        mainloop_params(launch),
        epilogue_params(launch),
        hardware,
        Scheduler::to_underlying_arguments(shape, Tile{}, Cluster{}, hardware, schedule, nullptr)};
    cudaLaunchConfig_t config{};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = launch.stream;
    // The producer warp waits for the predecessor before it loads, and everything else in the
    // kernel, the stores included, comes after what it has loaded.
    cudaLaunchAttribute attributes[2] = {dependent_launch()};
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {kClusterM, kClusterN, 1};
    config.attrs = attributes;
    config.numAttrs = kClusterM * kClusterN > 1 ? 2 : 1;  // an attribute costs the host time
    check(cudaLaunchKernelEx(&config, cutlass::device_kernel<Kernel>, params),
          "launching an sm_90a INT8 GEMM");
  }

  static bool register_kernel() {
    return register_gemm_kernel(
        {KernelFamily::kSm90, {kTileM, kTileN, kTileK, Schedule::kPingpong}, &launch, &load});
  }
};

}  // namespace fastq::cuda
