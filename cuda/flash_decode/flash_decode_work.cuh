// How the keys of all sequences are divided among blocks of threads.
//
// A tile is some rows of a sequence and a key head, and its work the blocks of keys that they
// attend to. All tiles' blocks stand in one line, by sequence, tile of rows and key head, and each
// block of threads takes a piece of the line, whatever the lengths, which only the device knows.
// A piece with keys of two tiles begins and ends twice, one after the other: so where that takes no
// longer pieces, every tile begins with a piece of its own.
//
// Multiprocessors are not equally fast. So a long line is taken in four waves: as many pieces as
// there can be at a time share three quarters of it, then as many an eighth, and so on, and whoever
// is done first takes the next.
//
// Of one sequence all tiles are as long. There, the blocks of a cluster have equal shares of a
// tile, and combine them themselves.
#pragma once

#include "flash_attention/flash_attention_tile.cuh"
#include "flash_decode/flash_decode_kernels.hpp"
#include "runtime/float_io.cuh"

namespace fastq::cuda {

struct DecodeTile : KeyBounds {
  int batch, first_row, rows;

  __device__ int query(const FlashDecodeParams& params, int column) const {
    return params.group.div(first_row + column);
  }
  __device__ int last_query(const FlashDecodeParams& params) const {
    return query(params, rows - 1);
  }
  // Keys that some query attends to.
  __device__ int first_key_of_all(const FlashDecodeParams& params) const {
    return first_key(query(params, 0));
  }
  __device__ int last_key_of_all(const FlashDecodeParams& params) const {
    return last_key(last_query(params));
  }
};

// Tile `index` of (batch, tiles), of any key head.
__device__ inline DecodeTile decode_tile(const FlashDecodeParams& params, int index) {
  const FlashDecodeProblem& p = params.problem;
  DecodeTile tile;
  params.tiles(tile.batch, tile.first_row, index);
  tile.first_row *= params.columns;
  const int seqlen_q = static_cast<int>(p.seqlen_q);
  tile.rows = min(params.columns, seqlen_q * params.group.divisor - tile.first_row);
  const int length = p.cache.seqlens[tile.batch * p.cache.stride_seqlens];
  tile.set(seqlen_q, max(min(length, static_cast<int>(p.cache.capacity)), 0), p.window_left,
           p.window_right);
  return tile;
}

// Its blocks of keys; at least one, so that some block of threads writes its outputs.
struct DecodeBlocks {
  int begin, count;
};
__device__ inline DecodeBlocks decode_blocks(const FlashDecodeParams& params,
                                             const DecodeTile& tile, int block_keys) {
  const int begin = tile.first_key_of_all(params) / block_keys;
  const int end = (tile.last_key_of_all(params) + block_keys - 1) / block_keys;
  return {begin, max(end - begin, 1)};
}

// A place in the line, the same in all threads.
struct DecodePlace {
  int index;  // of (batch, tiles)
  int head_k;
  int block;  // of keys, from the tile's first on
  int start;  // where in the line the tile begins
};

// The line of all work, and the pieces of it. Lanes take tiles 32 at a time.
struct DecodeLine {
  int length;
  int unit;                 // every tile has a multiple of so many places
  int sizes[kDecodeWaves];  // of a wave's pieces

  __device__ void set(const FlashDecodeParams& params, int block_keys) {
    set_unit(params, block_keys, 1);
    const int size = params.at_a_time.div(length + params.at_a_time.divisor - 1);
    const int64_t fewest = int64_t{tiles(params)} * params.problem.num_heads_k;
    if (params.waves == 1 && size > 1 && fewest <= params.at_a_time.divisor) {
      set_unit(params, block_keys, size);
      if (length > size * params.at_a_time.divisor) set_unit(params, block_keys, 1);
    }
    int left = length;
    const int each = params.at_a_time.div(length);
#pragma unroll
    for (int wave = 0; wave < kDecodeWaves; ++wave) {
      const bool is_last = wave + 1 == params.waves || wave + 1 == kDecodeWaves;
      sizes[wave] = wave >= params.waves ? 0
                    : is_last   ? params.at_a_time.div(max(left, 0) + params.at_a_time.divisor - 1)
                    : wave == 0 ? each * 3 / 4
                                : each >> (2 + wave);
      left -= sizes[wave] * params.at_a_time.divisor;
    }
  }

  // Where the piece of a block of threads begins and ends.
  __device__ int begin(const FlashDecodeParams& params, int block) const {
    int at = 0;
#pragma unroll
    for (int wave = 0; wave < kDecodeWaves; ++wave) {
      const int its =
          min(max(block - wave * params.at_a_time.divisor, 0), params.at_a_time.divisor);
      at += its * sizes[wave];
    }
    return min(at, length);
  }
  __device__ int end(const FlashDecodeParams& params, int block) const {
    return begin(params, block + 1);
  }
  // Whose piece has place `at`.
  __device__ int block_of(const FlashDecodeParams& params, int at) const {
    int block = 0;
#pragma unroll
    for (int wave = 0; wave < kDecodeWaves; ++wave) {
      const int all = sizes[wave] * params.at_a_time.divisor;
      if (at < all) return block + at / sizes[wave];
      at -= all;
      block += params.at_a_time.divisor;
    }
    return block;
  }

  // How many a tile has.
  __device__ int places(const FlashDecodeParams& params, const DecodeTile& tile,
                        int block_keys) const {
    const int blocks = decode_blocks(params, tile, block_keys).count;
    return (blocks + unit - 1) / unit * unit;
  }

  // Place `at`, which is in the line.
  __device__ DecodePlace place(const FlashDecodeParams& params, int at, int block_keys) const {
    const int heads_k = static_cast<int>(params.problem.num_heads_k);
    int before = 0;
    for (int first = 0;; first += 32) {
      const int blocks =
          tiles(params) <= 32 ? first_32_ : places_of_lane(params, first, block_keys);
      int end = blocks * heads_k;  // of this lane's tile
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, end, distance);
        if (static_cast<int>(threadIdx.x % 32) >= distance) end += other;
      }
      end += before;
      const unsigned beyond = __ballot_sync(0xffffffffu, end > at);
      if (beyond == 0) {
        before = __shfl_sync(0xffffffffu, end, 31);
        continue;
      }
      const int lane = __ffs(beyond) - 1;
      const int its_blocks = __shfl_sync(0xffffffffu, blocks, lane);
      const int in_tile = at - (__shfl_sync(0xffffffffu, end, lane) - its_blocks * heads_k);
      DecodePlace place;
      place.index = first + lane;
      place.head_k = in_tile / its_blocks;
      place.block = in_tile - place.head_k * its_blocks;
      place.start = at - place.block;
      return place;
    }
  }

 private:
  __device__ static int tiles(const FlashDecodeParams& params) {
    return static_cast<int>(params.problem.batch) * params.tiles.divisor;
  }
  __device__ void set_unit(const FlashDecodeParams& params, int block_keys, int its_unit) {
    unit = its_unit;
    length = 0;
    for (int first = 0; first < tiles(params); first += 32) {
      first_32_ = places_of_lane(params, first, block_keys);
      length += __reduce_add_sync(0xffffffffu, first_32_);
    }
    length *= static_cast<int>(params.problem.num_heads_k);
  }
  __device__ int places_of_lane(const FlashDecodeParams& params, int first, int block_keys) const {
    const int index = first + static_cast<int>(threadIdx.x % 32);
    return index < tiles(params) ? places(params, decode_tile(params, index), block_keys) : 0;
  }

  int first_32_;
};

// What a block of threads has still to do.
struct DecodePiece {
  DecodeLine line;
  DecodePlace place;
  int begin, at, end;

  // False where there is nothing.
  __device__ bool set(const FlashDecodeParams& params, int block_keys) {
    line.set(params, block_keys);
    const int block = blockIdx.x;
    begin = at = line.begin(params, block), end = line.end(params, block);
    if (begin < end) place = line.place(params, at, block_keys);
    return begin < end;
  }

  // Of a cluster's tile: which may be nothing.
  __device__ void set_share(const FlashDecodeParams& params, int block_keys) {
    const int tile = blockIdx.x / params.cluster, rank = blockIdx.x - tile * params.cluster;
    const int heads_k = static_cast<int>(params.problem.num_heads_k);
    place.index = tile / heads_k, place.head_k = tile - place.index * heads_k;
    const int blocks = decode_blocks(params, decode_tile(params, place.index), block_keys).count;
    const int64_t of_all = int64_t{blocks} * rank;
    begin = at = place.block = static_cast<int>(of_all / params.cluster);
    end = static_cast<int>((of_all + blocks) / params.cluster);
    place.start = 0;
  }

  // To the next tile.
  __device__ void move(const FlashDecodeParams& params, int block_keys) {
    at = place.start += line.places(params, decode_tile(params, place.index), block_keys);
    place.block = 0;
    if (++place.head_k == params.problem.num_heads_k) place.head_k = 0, ++place.index;
  }

  // Where the sums of the tile at hand go that has so many blocks: -1 where all are this block's,
  // or its part. It has one for the tile that it begins with, and one for another.
  __device__ int part(int of_tile) const {
    if (place.start >= begin && place.start + of_tile <= end) return -1;
    return 2 * static_cast<int>(blockIdx.x) + (place.start > begin);
  }
  // That and the number of parts, where the tile begins here.
  __device__ void store_parts(const FlashDecodeParams& params, int of_tile) const {
    if (place.block != 0) return;
    const int its_part = part(of_tile), block = blockIdx.x;
    const int last = its_part < 0 ? block : line.block_of(params, place.start + of_tile - 1);
    const int heads_k = static_cast<int>(params.problem.num_heads_k);
    params.parts_of_tile[place.index * heads_k + place.head_k] =
        make_int2(its_part, last - block + 1);
  }
};

// A part's sums; its references and sums of exponentials follow.
__device__ inline float* part_of(const FlashDecodeParams& params, int part) {
  return params.parts + int64_t{part} * params.columns * (params.padded_head_dim + 2);
}

// Writes a row's output and log-sum-exp. `reference` and `sum` are of exponents of 2; `x` are the
// outputs of elements first, first + step, and so on.
template <class T, int kCount>
__device__ inline void store_row(const FlashDecodeParams& params, const DecodeTile& tile,
                                 int head_k, int column, float reference, float sum, int first,
                                 int step, const float (&x)[kCount]) {
  const FlashDecodeProblem& p = params.problem;
  int query, of_group;
  params.group(query, of_group, tile.first_row + column);
  const int head = head_k * params.group.divisor + of_group;
  // Scores may all be -inf; that is not the same as none.
  const bool is_empty = tile.first_key(query) >= tile.last_key(query);
  const float scale = is_empty ? 0.0f : __fdividef(1, sum);
  T* const out = static_cast<T*>(p.out.data) + tile.batch * p.out.stride_batch +
                 query * p.out.stride_seqlen + head * p.out.stride_head;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int d = first + i * step;
    if (d < p.head_dim) out[d] = from_float<T>(is_empty ? 0.0f : x[i] * scale);
  }
  if (first == 0 && p.lse != nullptr) {
    p.lse[tile.batch * p.stride_lb + head * p.stride_lh + query * p.stride_lq] =
        is_empty ? -INFINITY : (reference + __log2f(sum)) / kLog2e;
  }
}

}  // namespace fastq::cuda
