// FlashAttention for Hopper: a block's shared memory, and the two threads that fill it.
#pragma once

#include <cutlass/arch/barrier.h>

#include <algorithm>
#include <type_traits>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "flash_attention/flash_attention_tile.cuh"

namespace fastq::cuda {

// A tile of queries and the blocks of keys that it attends to.
struct Sm90AttentionTile {
  QueryTile queries;
  QueryTile::KeyBlocks keys;             // from right to left
  QueryTile::KeyBlocks of_warpgroup[3];  // of the 64 queries of each
  bool is_last;                          // and no tile
  bool is_careful;                       // looks for the largest score of every block
  bool overflowed;                       // must be done again, with care
};

// A block's consumer warpgroups work on tiles in teams of kWarpgroups, each with producers of its
// own.
template <class T_, int kHeadDim_, int kTileN_, int kWarpgroups_, int kTeams_>
struct Sm90AttentionTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kTileN = kTileN_;
  static constexpr int kWarpgroups = kWarpgroups_, kTeams = kTeams_;
  static constexpr int kTileM = 64 * kWarpgroups;
  static constexpr int kPanels = (kHeadDim + 63) / 64;
  static constexpr int kConsumers = kTeams * kWarpgroups;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : kConsumers == 3 ? 160 : 112;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kStages = 2;
  // With few keys a block, warpgroups hide one another's waits without turns, and leave out a block
  // that none of their own queries attends to: no more than one.
  static constexpr bool kTakesTurns = kTileN > 64;
  static_assert(kTakesTurns || (kWarpgroups == 2 && kTileN == 64));

  using QueryPanel = uint16_t[64][64];  // of a warpgroup
  using KeyPanel = uint16_t[kTileN][64];
  using OutputPanel = uint16_t[16][64];  // of a warp
  // A warp that issues products waits till the tensor cores have taken them. So the second half of
  // PV is issued only when the largest score has been looked for. With a head_dim of 256 the tensor
  // cores have more to do than the others, and had better not wait; nor do four warpgroups need it.
  static constexpr bool kSplitsOutputs = kHeadDim <= 128 && kTakesTurns;
  // Not to look for the largest score of every block saves a tenth of the time, but nothing where
  // the tensor cores are the limit.
  static constexpr bool kSkipsMaximum = kHeadDim <= 128;
  // Two stages of q where they fit.
  static constexpr int kQueryStages =
      kTeams * (2 * kTileM + 2 * kStages * kTileN) * kPanels * 128 <= 225 * 1024 ? 2 : 1;
  // Outputs have panels of their own, as many as fit.
  static constexpr int kFreeBytes =
      225 * 1024 - kTeams * (kQueryStages * kTileM + 2 * kStages * kTileN) * kPanels * 128;
  static constexpr int kOutputPanels = std::min(kPanels, kFreeBytes / (kTeams * kTileM * 128));
  static constexpr bool kHasOutputPanels = kOutputPanels > 0;
  using WarpgroupPanels = OutputPanel[4][std::max(kOutputPanels, 1)];
  struct Nothing {};
  struct Ring {
    cutlass::arch::ClusterTransactionBarrier full[kStages];
    cutlass::arch::ClusterBarrier empty[kStages];
  };
  struct alignas(1024) Shared {
    QueryPanel q[kQueryStages][kWarpgroups][kPanels];
    KeyPanel k[kStages][kPanels], v[kStages][kPanels];
    std::conditional_t<kHasOutputPanels, WarpgroupPanels[kWarpgroups], Nothing> outputs;
    cutlass::arch::ClusterTransactionBarrier full_q[kQueryStages][kWarpgroups];
    cutlass::arch::ClusterBarrier empty_q[kQueryStages][kWarpgroups];
    Ring k_ring, v_ring, tile_ring;
    Sm90AttentionTile tiles[kStages];
  };
  static constexpr int kSmemBytes = kTeams * sizeof(Shared) + 1024;  // and its alignment
  static_assert(kSmemBytes <= 227 * 1024);
};

template <class Traits>
__device__ inline void set_barriers(typename Traits::Shared& shared) {
  for (int stage = 0; stage < Traits::kQueryStages; ++stage) {
    for (auto& full : shared.full_q[stage]) full.init(1);
    for (auto& empty : shared.empty_q[stage]) empty.init(1);
  }
  for (typename Traits::Ring* ring : {&shared.k_ring, &shared.v_ring, &shared.tile_ring}) {
    for (auto& full : ring->full) full.init(1);
  }
  for (int stage = 0; stage < Traits::kStages; ++stage) {
    shared.tiles[stage].overflowed = false;
    shared.k_ring.empty[stage].init(Traits::kWarpgroups);
    shared.v_ring.empty[stage].init(Traits::kWarpgroups);
    shared.tile_ring.empty[stage].init(4 * Traits::kWarpgroups + 1);
  }
}

struct Sm90AttentionParams {
  CUtensorMap q, k, v;
  CUtensorMap out;  // where stores_by_tma
  FlashAttentionProblem problem;
  int tiles_m, group;   // tiles of queries, heads that share a key head
  int heads_at_a_time;  // of all sequences
  int tiles;            // of all heads
  int* taken;           // tiles that were handed out past the first of each block, or null
  bool stores_by_tma;
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
__device__ inline void produce_queries(const Sm90AttentionParams& params, int team,
                                       typename Traits::Shared& shared) {
  const bool is_packed = params.problem.cu_seqlens_q != nullptr;
  StagePosition<Traits::kStages> tiles;
  StagePosition<Traits::kQueryStages> queries;
  const int teams = static_cast<int>(gridDim.x) * Traits::kTeams;
  int index = static_cast<int>(blockIdx.x + team * gridDim.x);  // few tiles: one for each block
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
      index += teams;
      if (params.taken != nullptr) index = teams + atomicAdd(params.taken, 1);
      if (!is_there) continue;
      tile.keys = tile.queries.key_blocks(0, Traits::kTileM, Traits::kTileN);
      for (int i = 0; i < Traits::kWarpgroups; ++i) {
        QueryTile::KeyBlocks& its = tile.of_warpgroup[i];
        its = tile.queries.key_blocks(64 * i, 64, Traits::kTileN);
        its.end = min(max(its.end, tile.keys.begin + 1), tile.keys.end);
      }
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
