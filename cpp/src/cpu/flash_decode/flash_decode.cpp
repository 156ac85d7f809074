// A task is some rows of a sequence and key head, and a part of the sequence's keys. How keys and
// rows are divided follows from the problem alone, not from the number of threads, and a row's
// parts are combined in the order of its keys: its bits are the same whoever computes it.
#include "cpu/flash_decode/flash_decode.hpp"

#include <algorithm>

#include "core/integers.hpp"
#include "cpu/flash_decode/flash_decode_kernels.hpp"
#include "cpu/isa.hpp"
#include "cpu/thread_pool.hpp"

namespace fastq::cpu {
namespace {

constexpr int64_t kMostParts = 32;     // of a row
constexpr int64_t kLeastKeys = 512;    // of a part: some ten microseconds of work
constexpr int64_t kPartRows = 16384;   // parts of all rows together, or one for each row
constexpr int64_t kRowsPerTask = 256;  // that are combined

const DecodeKernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512Vnni && isa != Isa::kNeon) return kDecodeAvx512;
  if (isa == Isa::kAvx2) return kDecodeAvx2;
#endif
  (void)isa;
  return kDecodeScalar;
}

struct Division {
  explicit Division(const FlashDecodeProblem& p)
      : rows(p.seqlen_q * (p.num_heads / p.num_heads_k)),
        row_blocks(ceil_div(rows, kDecodeRows)),
        heads(p.batch * p.num_heads_k),
        most_parts(std::clamp<int64_t>(kPartRows / (heads * rows), 1, kMostParts)),
        parts(std::clamp<int64_t>(ceil_div(p.cache.capacity, kLeastKeys), 1, most_parts)),
        row_floats(part_size(p.head_dim)) {}

  int64_t keys_per_part(int64_t keys) const {
    return std::max(kLeastKeys, round_up(ceil_div(keys, most_parts), kAttentionKeys));
  }
  int64_t parts_of(int64_t keys) const {
    return std::max<int64_t>(ceil_div(keys, keys_per_part(keys)), 1);
  }
  // From a part of a row to its next.
  int64_t part_floats() const { return heads * rows * row_floats; }
  int64_t floats() const { return parts > 1 ? parts * part_floats() : 0; }

  int64_t rows, row_blocks;  // of a sequence and key head
  int64_t heads;             // sequences times key heads
  int64_t most_parts;        // of a row, whatever its sequence's length
  int64_t parts;             // of a row of the longest sequence that fits into the cache
  int64_t row_floats;        // of a row's part
};

// The keys that a sequence's queries may attend to.
struct KeyRange {
  KeyRange(const FlashDecodeProblem& p, int64_t batch)
      : length(p.cache.seqlens[batch * p.cache.stride_seqlens]) {
    if (p.window_left >= 0) first = std::max<int64_t>(length - p.seqlen_q - p.window_left, 0);
  }
  int64_t keys() const { return length - first; }

  int64_t length, first = 0;
};

int64_t scratch_floats(const FlashDecodeProblem& p) {
  // Threads write to lines of their own.
  return round_up(attention_scratch(p.head_dim) + kAttentionRows / 2 * part_size(p.head_dim), 16);
}

// Key heads of a task. In a cache that holds a token's heads side by side, several of them: their
// keys lie in the same pages of memory. But every thread gets some tasks.
int64_t heads_per_task(const FlashDecodeProblem& p, const Division& division, int few_rows,
                       int threads) {
  if (division.rows > few_rows || p.cache.k.stride_head > p.cache.k.stride_seqlen) return 1;
  int64_t parts = 0;
  for (int64_t b = 0; b < p.batch; ++b) parts += division.parts_of(KeyRange(p, b).keys());
  const int64_t most = std::min(p.num_heads_k, kAttentionRows / 2 / division.rows);
  return std::clamp<int64_t>(parts * p.num_heads_k / (4 * threads), 1, most);
}

}  // namespace

size_t flash_decode_workspace_size(const FlashDecodeProblem& p) {
  return (get_num_threads() * scratch_floats(p) + Division(p).floats()) * sizeof(float);
}

void flash_decode(const FlashDecodeProblem& p, Workspace& workspace) {
  const DecodeKernels& kernels = kernels_for(active_isa());
  const int threads = get_num_threads();
  const Division division(p);
  const int64_t scratch_size = scratch_floats(p);
  auto* const scratch = static_cast<float*>(
      workspace.get("flash_decode", (threads * scratch_size + division.floats()) * sizeof(float)));
  float* const parts = scratch + threads * scratch_size;

  const int64_t group = p.num_heads / p.num_heads_k;
  const int64_t step_heads = heads_per_task(p, division, kernels.few_rows, threads);
  const int64_t head_blocks = ceil_div(p.num_heads_k, step_heads);
  const int64_t blocks = head_blocks * division.row_blocks;
  parallel_for(p.batch * blocks * division.parts, threads, [&](int64_t index, int slot) {
    AttentionTask task{};
    task.batch = index / blocks % p.batch;
    task.head_k = index % head_blocks * step_heads;
    const int64_t part = index / blocks / p.batch;
    const int64_t task_heads = std::min(step_heads, p.num_heads_k - task.head_k);
    const KeyRange range(p, task.batch);
    const int64_t count = division.parts_of(range.keys());
    if (part >= count) return;
    task.seqlen_q = p.seqlen_q, task.seqlen_k = range.length;
    task.first_row = index / head_blocks % division.row_blocks * kDecodeRows;
    task.last_row = std::min(task.first_row + kDecodeRows, division.rows);
    const int64_t keys = division.keys_per_part(range.keys());
    task.first_key = range.first + part * keys;
    task.last_key = std::min(task.first_key + keys, range.length);
    task.q = task.batch * p.q.stride_batch + task.head_k * group * p.q.stride_head;
    float* const space = scratch + slot * scratch_size;
    const int64_t row = (task.batch * p.num_heads_k + task.head_k) * division.rows + task.first_row;
    if (count > 1) {
      float* const to = parts + part * division.part_floats() + row * division.row_floats;
      kernels.attend(p, task, task_heads, to, space);
      return;
    }
    const float* from = space + attention_scratch(p.head_dim);
    kernels.attend(p, task, task_heads, space + attention_scratch(p.head_dim), space);
    for (int64_t head = task.head_k; head < task.head_k + task_heads; ++head) {
      for (int64_t r = task.first_row; r < task.last_row; ++r, from += division.row_floats) {
        kernels.combine(p, task.batch, head, r, from, 1, 0);
      }
    }
  });
  if (division.parts == 1) return;

  const int64_t all_rows = division.heads * division.rows;
  parallel_for(ceil_div(all_rows, kRowsPerTask), threads, [&](int64_t index, int) {
    const int64_t last = std::min((index + 1) * kRowsPerTask, all_rows);
    for (int64_t at = index * kRowsPerTask; at < last; ++at) {
      const int64_t head = at / division.rows;
      const KeyRange range(p, head / p.num_heads_k);
      const int64_t count = division.parts_of(range.keys());
      if (count == 1) continue;
      kernels.combine(p, head / p.num_heads_k, head % p.num_heads_k, at % division.rows,
                      parts + at * division.row_floats, count, division.part_floats());
    }
  });
}

}  // namespace fastq::cpu
