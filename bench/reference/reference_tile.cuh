// One reference tile: CUTLASS's collectives for sm_90a, its int32 accumulators scaled by a visitor
// tree of its own nodes. Rasterisation, stages and the grid are what the library chooses unasked.
#pragma once

#include <cutlass/cutlass.h>

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "reference_tile.hpp"

namespace fastq::reference {

// Which main loop, epilogue and tile scheduler go together.
struct WarpSpecialized {  // one consumer warpgroup, one tile a CTA
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecialized;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
  using Scheduler = void;
};
struct Pingpong {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
  using Scheduler = cutlass::gemm::PersistentScheduler;
};
struct Cooperative {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
  using Scheduler = cutlass::gemm::PersistentScheduler;
};
struct CooperativeStreamK : Cooperative {
  using Scheduler = cutlass::gemm::StreamKScheduler;
};

template <class Tile, class Cluster, class Schedule>
struct ReferenceGemm {
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  using Out = cutlass::bfloat16_t;

  // (acc * scale_a) * scale_b; the product by scale_b is rounded to Out as it is stored.
  template <class Element>
  using Multiply =
      cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, Element, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>;
  using ScaleA = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float>;
  using ScaleB = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float>;
  using ScaledRows =
      cutlass::epilogue::fusion::Sm90EVT<Multiply<float>, cutlass::epilogue::fusion::Sm90AccFetch,
                                         ScaleA>;
  using Scaled = cutlass::epilogue::fusion::Sm90EVT<Multiply<Out>, ScaledRows, ScaleB>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, RowMajor, 8, Out,
      RowMajor, 8, typename Schedule::Epilogue, Scaled>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, RowMajor, 16, int8_t,
      ColumnMajor, 16, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, typename Schedule::Scheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Gemm::Arguments arguments(const Problem& p) {
    const auto stride_a =
        cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {p.M, p.K, 1});
    const auto stride_b =
        cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {p.N, p.K, 1});
    const auto stride_out =
        cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {p.M, p.N, 1});
    // In the tree, the arguments of a node's children come before its own.
    return {cutlass::gemm::GemmUniversalMode::kGemm,
            {p.M, p.N, p.K, 1},
            {static_cast<const int8_t*>(p.a), stride_a, static_cast<const int8_t*>(p.b), stride_b},
            {{{{}, {static_cast<const float*>(p.scale_a)}, {}},
              {static_cast<const float*>(p.scale_b)},
              {}},
             nullptr,
             stride_out,
             static_cast<Out*>(p.out),
             stride_out}};
  }

  static size_t workspace_size(const Problem& p) { return Gemm::get_workspace_size(arguments(p)); }

  static int run(const Problem& p, void* workspace, void* stream) {
    const auto args = arguments(p);
    cutlass::Status status = Gemm::can_implement(args);
    if (status == cutlass::Status::kSuccess) {
      status = Gemm().run(args, workspace, static_cast<cudaStream_t>(stream));
    }
    return static_cast<int>(status);
  }
};

}  // namespace fastq::reference
