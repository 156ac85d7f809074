// FlashAttention's forward pass for Hopper (sm_90a), by WGMMA and TMA.
//
//   block      one producer thread hands out tiles and brings their queries, another brings k and v
//              in rings of two stages, v one turn late. Two or three consumer warpgroups have 64
//              queries each; scores, exponentials and outputs stay in registers. At head_dim 64 a
//              block may have two such teams, each with tiles of its own: for short sequences.
//   overlap    a warpgroup issues QK^T of a block of keys together with PV of the one before, also
//              from one tile to the next. Warpgroups take turns in issuing (ping-pong): one has the
//              tensor cores while another has the exponentials. Four of them need no turns, and
//              leave out blocks that none of their own queries attends to.
//   grid       persistent. Tiles that cost most come first; where they differ, a counter hands them
//              out. Few heads at a time, whose k and v fit in L2.
//   maximum    the largest score is looked for in a tile's first block, in those with a mask and in
//              that of the first keys. In the others exponentials that are too large are noticed,
//              and the tile is done again with care.
//   edges      TMA fills what lies past the tensors with zeros. Packed sequences end where the next
//              one begins: its keys are masked, and its values zeroed, as 0 * NaN is NaN.
//
// Template parameters are the dtype, head_dim (rounded up), the keys of a block and the warpgroups;
// all else is a run-time branch outside the loops over registers, as in flash_attention_sm80.cuh.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <algorithm>
#include <type_traits>

#include "flash_attention/attention_wgmma.cuh"
#include "flash_attention/flash_attention_kernels.hpp"
#include "flash_attention/flash_attention_sm90_output.cuh"
#include "flash_attention/flash_attention_sm90_producers.cuh"
#include "runtime/dependent_launch.cuh"
#include "runtime/tma.hpp"

namespace fastq::cuda {

// What is the same in every lane, as the compiler cannot tell.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

__device__ inline void sync_warpgroup() {
  cutlass::arch::NamedBarrier::sync(128, 3 + threadIdx.x / 128);
}

// Rows of v that are another sequence's become zeros; every warpgroup does it for itself.
template <class Traits>
__device__ inline void zero_rows(typename Traits::KeyPanel (&panels)[Traits::kPanels], int first) {
  for (int i = threadIdx.x % 128; i < (Traits::kTileN - first) * 8; i += 128) {
    for (auto& panel : panels) {
      reinterpret_cast<uint4*>(panel[first])[i] = make_uint4(0, 0, 0, 0);
    }
  }
  cutlass::arch::fence_view_async_shared();
  sync_warpgroup();
}

template <class Traits>
__device__ inline void attention_consume(const Sm90AttentionParams& params,
                                         typename Traits::Shared& shared) {
  using T = typename Traits::T;
  using cutlass::arch::NamedBarrier;
  constexpr int kTileN = Traits::kTileN, kHeadDim = Traits::kHeadDim, kStages = Traits::kStages;
  const FlashAttentionProblem& p = params.problem;
  const int warpgroup = uniform((threadIdx.x / 128 - 1) % Traits::kWarpgroups);
  const bool signals = threadIdx.x % 128 == 0;
  const int row = 64 * warpgroup + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;  // its first
  const uint32_t q_rows = wgmma_address(shared.q[0][warpgroup]);
  const uint32_t k_rows = wgmma_address(shared.k), v_rows = wgmma_address(shared.v);
  constexpr uint32_t kStage = wgmma_offset(kTileN) * Traits::kPanels;
  constexpr int kFirstSteps = kTileN / 16 / (Traits::kSplitsOutputs ? 2 : 1);
  constexpr uint32_t kQueryStage = wgmma_offset(Traits::kTileM) * Traits::kPanels;

  const float factor = score_factor(p);
  float o[kHeadDim / 8][4] = {}, s[kTileN / 8][4] = {}, rescale[2];
  uint32_t exponentials[kTileN / 16][4];
  RowSoftmax softmax;
  bool rescales = false;
  bool fits = true;           // no exponential of this tile's has been too large
  bool has_scores = false;    // exponentials in s that have not been multiplied with v
  bool has_products = false;  // PV has been issued, and its stage of v not been released
  unsigned used = 0;          // blocks of keys so far, that in s included
  unsigned queries = 0;       // tiles with keys so far, without the one at hand

  // Of a block's keys and values; of anything before the first block.
  const auto keys = [&](unsigned number) { return k_rows + uniform(number % kStages) * kStage; };
  const auto values = [&](unsigned number) { return v_rows + uniform(number % kStages) * kStage; };
  const auto release = [&](typename Traits::Ring& ring, unsigned number) {
    if (signals) ring.empty[number % kStages].arrive();
  };
  // Its turn to issue products, and the next warpgroup's.
  const auto take_turn = [&] {
    if (Traits::kTakesTurns) NamedBarrier::sync(256, warpgroup);
  };
  const auto pass_turn = [&] {
    if (!Traits::kTakesTurns) return;
    NamedBarrier::arrive(256, warpgroup + 1 == Traits::kWarpgroups ? 0 : warpgroup + 1);
  };
  const auto wait_products = [&](unsigned number) __attribute__((always_inline)) {
    cute::warpgroup_wait<0>();
    wgmma_fence(o);
    if (has_products) release(shared.v_ring, number);
    has_products = false;
  };
  // The exponentials in s become PV's operand, which the product before has used till now. (At the
  // loop's beginning, and not at its end: ptxas would wait for that product before the exponentials
  // are computed.)
  const auto take_exponentials = [&]() __attribute__((always_inline)) {
    wait_products(used - 2);
    wgmma_fence(s);
#pragma unroll
    for (int n = 0; n < kTileN / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const x = s[2 * n + i / 2] + i % 2 * 2;
        exponentials[n][i] = pack(x[0], x[1], T{});
      }
    }
    if (!rescales) return;
#pragma unroll
    for (auto& x : o) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] *= rescale[i / 2];
    }
  };
  const auto wait_values = [&](unsigned number) {
    if (has_scores) shared.v_ring.full[number % kStages].wait(number / kStages % 2);
  };
  const auto issue_outputs = [&](uint32_t v) __attribute__((always_inline)) {
    wgmma_fence(o);
    wgmma_fence(exponentials);
    cute::warpgroup_arrive();
    output_wgmma<T, 0, kFirstSteps>(exponentials, v, o);
    cute::warpgroup_commit_batch();
    has_products = has_scores;
  };
  const auto issue_more_outputs = [&](uint32_t v) __attribute__((always_inline)) {
    if constexpr (Traits::kSplitsOutputs) {
      cute::warpgroup_arrive();
      output_wgmma<T, kFirstSteps, kTileN / 16>(exponentials, v, o);
      cute::warpgroup_commit_batch();
    }
  };
  const auto begin_outputs = [&]() __attribute__((always_inline)) {
    softmax = RowSoftmax{};
    fits = true;
#pragma unroll
    for (auto& x : o) {
#pragma unroll
      for (float& y : x) y = 0;
    }
  };
  // What becomes of a tile whose products are complete.
  const auto finish = [&](int number) __attribute__((always_inline)) {
    const QueryTile tile = shared.tiles[number % kStages].queries;
    const int query = tile.first + row;
    float scale[2];
    softmax.finish(tile, query, scale);
    softmax.store_lse(p, tile, query);
    if constexpr (Traits::kHasOutputPanels) {
      if (params.stores_by_tma) {
        auto* const panels = shared.outputs[warpgroup][threadIdx.x / 32 % 4];
        store_outputs_by_tma<Traits>(params, tile, query - threadIdx.x % 32 / 4, o, scale, panels);
      } else {
        store_outputs<Traits>(params, tile, query, o, scale);
      }
    } else {
      store_outputs<Traits>(params, tile, query, o, scale);
    }
    if (!fits) shared.tiles[number % kStages].overflowed = true;
    __syncwarp();
    if (threadIdx.x % 32 == 0) shared.tile_ring.empty[number % kStages].arrive();
  };

  if (warpgroup == Traits::kWarpgroups - 1) pass_turn();
#pragma unroll 1
  for (int number = 0;; ++number) {
    const Sm90AttentionTile& tile = shared.tiles[number % kStages];
    shared.tile_ring.full[number % kStages].wait(number / kStages % 2);
    const QueryTile::KeyBlocks& its = tile.of_warpgroup[warpgroup];
    const int begin = uniform(tile.keys.begin), end = uniform(tile.keys.end);
    const int its_end = Traits::kTakesTurns ? end : uniform(its.end);
    const int whole_begin = uniform(its.whole_begin), whole_end = uniform(its.whole_end);
    const bool is_last = uniform(tile.is_last) != 0, is_careful = uniform(tile.is_careful) != 0;
    if (is_last || begin >= end) {
      take_exponentials();
      wait_values(used - 1);
      issue_outputs(values(used - 1));
      issue_more_outputs(values(used - 1));
      wait_products(used - 1);
      if (has_scores) finish(number - 1);
      begin_outputs();
      has_scores = false;
      if (is_last) break;
      finish(number);  // zeros
      continue;
    }

    // Scores of a block, and PV of the one before.
    const auto issue = [&](unsigned before) __attribute__((always_inline)) {
      // Measured: three warpgroups had better look for k in their turn, two before it.
      if (Traits::kWarpgroups == 3) take_turn();
      const uint32_t q = q_rows + uniform(queries % Traits::kQueryStages) * kQueryStage;
      const uint32_t k = keys(used);
      shared.k_ring.full[used % kStages].wait(used / kStages % 2);
      if (Traits::kWarpgroups == 2) take_turn();
      wgmma_fence(s);
      cute::warpgroup_arrive();
      scores_wgmma<T, kHeadDim>(q, k, s);
      cute::warpgroup_commit_batch();
      wait_values(before);
      const uint32_t v = values(before);
      issue_outputs(v);
      pass_turn();
      ++used;
      return v;
    };
    const auto take_scores = [&](int block) __attribute__((always_inline)) {
      wgmma_fence(s);
      release(shared.k_ring, used - 1);
      if (block > begin) return;
      if (signals) shared.empty_q[queries % Traits::kQueryStages][warpgroup].arrive();
      ++queries;
    };
    const auto mask = [&](int block) __attribute__((always_inline)) {
      const QueryTile& queries = tile.queries;
      mask_scores(queries, queries.first + row, block * kTileN, s);
    };
    const auto is_whole = [&](int block) {
      return block * kTileN >= whole_begin && (block + 1) * kTileN <= whole_end;
    };

    // The first block, and the last of the tile before; of anything where there is none.
    shared.full_q[queries % Traits::kQueryStages][warpgroup].wait(queries / Traits::kQueryStages %
                                                                  2);
    int block = its_end - 1;
    take_exponentials();
    const unsigned before = used - 1;
    if (!Traits::kTakesTurns && its_end < end) {
      // A block that none of the warpgroup's queries attends to: there is no more than one.
      shared.k_ring.full[used % kStages].wait(used / kStages % 2);
      shared.v_ring.full[used % kStages].wait(used / kStages % 2);
      sync_warpgroup();  // lest a slow warp miss what it waits for
      release(shared.k_ring, used);
      release(shared.v_ring, used);
      ++used;
    }
    issue_more_outputs(issue(before));
    wait_products(before);
    take_scores(block);
    if (has_scores) finish(number - 1);
    begin_outputs();
    has_scores = true;
    if (!is_whole(block)) mask(block);
    rescales = softmax.refer(s, factor, rescale);
    softmax.exponentiate(s, factor);
    const int tail = tile.queries.seqlen_k - block * kTileN;
    if (p.cu_seqlens_k != nullptr && tail < kTileN) {
      shared.v_ring.full[(used - 1) % kStages].wait((used - 1) / kStages % 2);
      zero_rows<Traits>(shared.v[(used - 1) % kStages], tail);
    }
#pragma unroll 1
    for (--block; block >= begin; --block) {
      take_exponentials();
      const uint32_t v = issue(used - 1);
      cute::warpgroup_wait<1>();
      take_scores(block);
      // Mostly no later block's scores are larger by far, but for those of the first keys.
      // Where the whole blocks begin, a query may have had none.
      const bool looks = !Traits::kSkipsMaximum || is_careful || block == begin ||
                         !is_whole(block) || (block + 1) * kTileN == whole_end;
      rescales = false;
      if (looks) {
        if (!is_whole(block)) mask(block);
        rescales = softmax.refer(s, factor, rescale);
      }
      issue_more_outputs(v);
      const bool all_fit = softmax.exponentiate(s, factor, looks);
      fits = fits && (looks || all_fit);
    }
  }
  // Shared memory is not given up before it has been read.
  if (Traits::kHasOutputPanels && threadIdx.x % 32 == 0) cute::tma_store_wait<0>();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    flash_attention_sm90(const __grid_constant__ Sm90AttentionParams params) {
  extern __shared__ uint8_t memory[];
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  auto* const teams = reinterpret_cast<typename Traits::Shared*>(memory + (-address & 1023));
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&params.q));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&params.k));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&params.v));
  }
  if (threadIdx.x < Traits::kTeams) set_barriers<Traits>(teams[threadIdx.x]);
  cutlass::arch::fence_barrier_init();
  __syncthreads();
  wait_for_predecessor();
  let_successor_start();
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x >= 64 * Traits::kTeams) return;
    const int team = Traits::kTeams == 1 ? 0 : threadIdx.x / 64;
    if (threadIdx.x % 64 == 0) produce_queries<Traits>(params, team, teams[team]);
    if (threadIdx.x % 64 == 32) produce_keys<Traits>(params, teams[team]);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    const int team = Traits::kTeams == 1 ? 0 : (threadIdx.x / 128 - 1) / Traits::kWarpgroups;
    attention_consume<Traits>(params, teams[uniform(team)]);
  }
}

// A kernel, which others may overlap as they may not a memset.
template <class Traits>
__global__ void clear_counter(int* counter) {
  wait_for_predecessor();
  let_successor_start();
  *counter = 0;
}

template <class Traits>
struct Sm90Attention {
  static constexpr auto kKernel = &flash_attention_sm90<Traits>;

  static void load() {
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Traits::kSmemBytes),
          "loading an sm_90a attention kernel");
    load_kernel(reinterpret_cast<const void*>(&clear_counter<Traits>));
  }

  static void launch(const FlashAttentionProblem& p, void* workspace) {
    const bool is_packed = p.cu_seqlens_q != nullptr;
    const auto map = [&](const AttentionTensor& t, int64_t rows, int64_t heads, int box_rows) {
      return cached_heads_map(t.data,
                              {is_packed ? 1 : p.batch, heads, rows, p.head_dim, t.stride_batch,
                               t.stride_head, t.stride_seqlen},
                              box_rows);
    };
    Sm90AttentionParams params{};
    params.q = map(p.q, p.rows_q, p.num_heads, 64);
    params.k = map(p.k, p.rows_k, p.num_heads_k, Traits::kTileN);
    params.v = map(p.v, p.rows_k, p.num_heads_k, Traits::kTileN);
    params.problem = p;
    params.tiles_m = static_cast<int>(ceil_div(p.seqlen_q, Traits::kTileM));
    params.group = static_cast<int>(p.num_heads / p.num_heads_k);
    params.out_is_vectorizable = p.head_dim % 8 == 0 && is_aligned(p.out, 8);
    // The rows after a packed sequence's are another's.
    params.stores_by_tma = Traits::kHasOutputPanels && params.out_is_vectorizable && !is_packed &&
                           tma_can_address(p.out);
    if (params.stores_by_tma) params.out = map(p.out, p.rows_q, p.num_heads, 16);
    const int64_t heads = p.batch * p.num_heads;
    const unsigned tiles = attention_grid(heads * params.tiles_m);
    const int sm_count = device_props(p.device_index).sm_count;
    const unsigned blocks = std::min(tiles, static_cast<unsigned>(sm_count));
    const unsigned teams = blocks * Traits::kTeams;
    const bool tiles_differ = p.window_left >= 0 || p.window_right >= 0 || is_packed;
    // As many heads as L2 holds k and v of, beside q and the output. Where tiles cost the same,
    // only as many as the blocks work on at a time: that spreads the reads from memory evenly.
    constexpr int64_t kL2Bytes = 32 << 20;
    const int64_t key_heads = std::max<int64_t>(kL2Bytes / (4 * p.seqlen_k * p.head_dim), 1);
    int64_t at_a_time = key_heads * params.group;
    if (!tiles_differ) {
      at_a_time = std::min(at_a_time, ceil_div(Traits::kTeams * sm_count, params.tiles_m));
    }
    params.heads_at_a_time = static_cast<int>(std::clamp<int64_t>(at_a_time, 1, heads));
    params.tiles = static_cast<int>(tiles);
    params.taken = nullptr;
    cudaLaunchAttribute attribute = dependent_launch();
    cudaLaunchConfig_t config{};
    config.stream = static_cast<cudaStream_t>(p.stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (tiles > teams && tiles_differ) {
      params.taken = static_cast<int*>(workspace);
      config.gridDim = config.blockDim = 1;
      check(cudaLaunchKernelEx(&config, &clear_counter<Traits>, params.taken),
            "clearing attention's counter");
    }
    config.gridDim = blocks;
    config.blockDim = Traits::kThreads;
    config.dynamicSmemBytes = Traits::kSmemBytes;
    check(cudaLaunchKernelEx(&config, kKernel, params), "launching an sm_90a attention kernel");
  }

  static bool register_kernel() {
    constexpr DType dtype =
        std::is_same_v<typename Traits::T, __half> ? DType::kFloat16 : DType::kBFloat16;
    return register_attention_kernel({KernelFamily::kSm90, dtype, Traits::kHeadDim, Traits::kTileM,
                                      sizeof(int), &launch, &load});
  }
};

}  // namespace fastq::cuda
