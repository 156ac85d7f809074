// FlashAttention for Hopper: a block's shared memory, and the two threads that fill it.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "flash_attention/flash_attention_tile.cuh"

namespace fastq::cuda {

// A tile of queries and the blocks of keys that it attends to.
struct Sm90AttentionTile {
  QueryTile queries;
  QueryTile::KeyBlocks keys;  // from right to left
  bool is_last;               // and no tile
  bool is_careful;            // looks for the largest score of every block
  bool overflowed;            // must be done again, with care
};

template <class T_, int kHeadDim_, int kTileN_, int kWarpgroups_>
struct Sm90AttentionTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kTileN = kTileN_, kWarpgroups = kWarpgroups_;
  static constexpr int kTileM = 64 * kWarpgroups;
  static constexpr int kPanels = (kHeadDim + 63) / 64;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : 160;
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32;
  static constexpr int kStages = 2;

  using QueryPanel = uint16_t[64][64];  // of a warpgroup
  using KeyPanel = uint16_t[kTileN][64];
  // A warp that issues products waits till the tensor cores have taken them. So the second half of
  // PV is issued only when the largest score has been looked for. With a head_dim of 256 the tensor
  // cores have more to do than the others, and had better not wait.
  static constexpr bool kSplitsOutputs = kHeadDim <= 128;
  // Not to look for the largest score of every block saves a tenth of the time, but nothing where
  // the tensor cores are the limit.
  static constexpr bool kSkipsMaximum = kHeadDim <= 128;
  // Two stages of q where they fit.
  static constexpr int kQueryStages =
      (2 * kTileM + 2 * kStages * kTileN) * kPanels * 128 <= 225 * 1024 ? 2 : 1;
  struct Ring {
    cutlass::arch::ClusterTransactionBarrier full[kStages];
    cutlass::arch::ClusterBarrier empty[kStages];
  };
  struct Shared {
    QueryPanel q[kQueryStages][kWarpgroups][kPanels];
    KeyPanel k[kStages][kPanels], v[kStages][kPanels];
    cutlass::arch::ClusterTransactionBarrier full_q[kQueryStages][kWarpgroups];
    cutlass::arch::ClusterBarrier empty_q[kQueryStages][kWarpgroups];
    Ring k_ring, v_ring, tile_ring;
    Sm90AttentionTile tiles[kStages];
  };
  static constexpr int kSmemBytes = sizeof(Shared) + 1024;  // and its alignment
};

struct Sm90AttentionParams {
  CUtensorMap q, k, v;
  FlashAttentionProblem problem;
  int tiles_m, group;        // tiles of queries, heads that share a key head
  int heads_at_a_time;       // of all sequences
  int tiles;                 // of all heads
  int* taken;                // tiles that were handed out past the first of each block, or null
  bool out_is_vectorizable;  // rows begin at multiples of 16 bytes
};

// Tile number `index`; false where its sequence is over.
template <class Traits>
__device__ inline bool set_queries(const Sm90AttentionParams& params, int index, QueryTile& tile) {
  const FlashAttentionProblem& p = params.problem;
  const int heads = static_cast<int>(p.num_heads);
  const int per_group = params.heads_at_a_time * params.tiles_m;
  const int first = index / per_group * params.heads_at_a_time;
  const int count = min(params.heads_at_a_time, params.tiles / params.tiles_m - first);
  const int in_group = index % per_group;
  const int head = first + in_group % count;
  const int first_query = (params.tiles_m - 1 - in_group / count) * Traits::kTileM;
  return tile.set(p, params.group, head / heads, head % heads, first_query);
}

// The stage of a ring and the parity of its turn.
template <int kStages>
struct StagePosition {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// Panels of rows to shared memory, evicted from L2 first or last.
template <class Panel, int kPanels>
__device__ inline void load_panels(Panel (&panels)[kPanels], const CUtensorMap& map,
                                   cutlass::arch::ClusterTransactionBarrier& full,
                                   cute::TMA::CacheHintSm90 hint, int row, int head, int batch) {
  full.arrive_and_expect_tx(sizeof(panels));
#pragma unroll
  for (int i = 0; i < kPanels; ++i) {
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full),
                                 static_cast<uint64_t>(hint), panels[i], 64 * i, row, head, batch);
  }
}

// The first producer hands out tiles, and brings their queries: a tile ahead where there is room.
template <class Traits>
__device__ inline void produce_queries(const Sm90AttentionParams& params,
                                       typename Traits::Shared& shared) {
  const bool is_packed = params.problem.cu_seqlens_q != nullptr;
  StagePosition<Traits::kStages> tiles;
  StagePosition<Traits::kQueryStages> queries;
  int index = static_cast<int>(blockIdx.x);
  bool has_flushed = false;  // an empty tile has followed the last: all of them get finished
  while (true) {
    shared.tile_ring.empty[tiles.stage].wait(tiles.phase ^ 1);
    Sm90AttentionTile& tile = shared.tiles[tiles.stage];
    bool is_last = false;
    if (tile.overflowed) {
      tile.overflowed = false;
      tile.is_careful = true;
      has_flushed = false;
    } else if (index < params.tiles) {
      const bool is_there = set_queries<Traits>(params, index, tile.queries);
      index += static_cast<int>(gridDim.x);
      if (params.taken != nullptr) index = gridDim.x + atomicAdd(params.taken, 1);
      if (!is_there) continue;
      tile.keys = tile.queries.key_blocks(Traits::kTileM, Traits::kTileN);
      tile.is_careful = false;
    } else {
      tile.keys = {};
      tile.queries.first = tile.queries.seqlen_q = 0;
      is_last = has_flushed;
      has_flushed = true;
    }
    tile.is_last = is_last;
    shared.tile_ring.full[tiles.stage].arrive();
    tiles.next();
    if (is_last) break;
    if (tile.keys.begin >= tile.keys.end) continue;
    const QueryTile& q = tile.queries;
#pragma unroll 1
    for (int i = 0; i < Traits::kWarpgroups; ++i) {
      auto& full = shared.full_q[queries.stage][i];
      shared.empty_q[queries.stage][i].wait(queries.phase ^ 1);
      load_panels(shared.q[queries.stage][i], params.q, full, cute::TMA::CacheHintSm90::EVICT_FIRST,
                  q.begin_q + q.first + 64 * i, q.head, is_packed ? 0 : q.batch);
    }
    queries.next();
  }
}

// The second brings keys and values.
template <class Traits>
__device__ inline void produce_keys(const Sm90AttentionParams& params,
                                    typename Traits::Shared& shared) {
  const bool is_packed = params.problem.cu_seqlens_k != nullptr;
  StagePosition<Traits::kStages> tiles, keys, values;
  const auto load = [&](auto& stages, const CUtensorMap& map, typename Traits::Ring& ring,
                        StagePosition<Traits::kStages>& at, const QueryTile& tile, int block) {
    ring.empty[at.stage].wait(at.phase ^ 1);
    load_panels(stages[at.stage], map, ring.full[at.stage], cute::TMA::CacheHintSm90::EVICT_LAST,
                tile.begin_k + block * Traits::kTileN, tile.head_k, is_packed ? 0 : tile.batch);
    at.next();
  };
  while (true) {
    shared.tile_ring.full[tiles.stage].wait(tiles.phase);
    const Sm90AttentionTile& tile = shared.tiles[tiles.stage];
    if (tile.is_last) break;
    const int begin = tile.keys.begin, end = tile.keys.end;
#pragma unroll 1
    for (int block = end - 1; block >= begin; --block) {
      load(shared.k, params.k, shared.k_ring, keys, tile.queries, block);
      if (block < end - 1) load(shared.v, params.v, shared.v_ring, values, tile.queries, block + 1);
    }
    if (begin < end) load(shared.v, params.v, shared.v_ring, values, tile.queries, begin);
    shared.tile_ring.empty[tiles.stage].arrive();
    tiles.next();
  }
}

}  // namespace fastq::cuda
