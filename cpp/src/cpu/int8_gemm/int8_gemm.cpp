// out[m,n] = round((f32(sum_k a[m,k] * b[k,n]) * scale_a[m]) * scale_b[n] + bias[n])
//
// The output is cut into tasks of chunk_m x chunk_n; a task walks its chunk in tiles, whose int32
// sums stay in 16 KB of stack until write_tile turns them into output. What differs between the
// algorithms is where the operands of a tile lie:
//
//   kDot      rows of a and rows of b^T as they are: M = 1 is a stream through the weight
//   kPacked   rows of a as they are (AVX-512: packed into panels of 32 first), b in the packed form
//   kRepack   the same after the thread packed its chunk_n columns of b, sized to stay in its L2
//   kSwapped  (AMX) a packed, b^T as it is: the weight of a short batch is read once, never copied
#include "cpu/int8_gemm/int8_gemm.hpp"

#include <algorithm>
#include <string>

#include "core/error.hpp"
#include "cpu/int8_gemm/kernels.hpp"
#include "cpu/int8_gemm/pack.hpp"
#include "cpu/thread_pool.hpp"

namespace fastq::cpu {
namespace {

constexpr int64_t kSwappedTileM = 32;
constexpr int64_t kRowsInCache = 512 * 1024;      // bytes of a that stay in L2 between tiles
constexpr int64_t kColumnsInCache = 1024 * 1024;  // bytes of packed b that stay in L2
constexpr int64_t kSwappedRowsInCache = 1024 * 1024;
// Bytes of panels that stay in L2: with AMX it has 2 MB, with VNNI 1 MB at least.
constexpr int64_t kPanelsInCacheAmx = 1152 * 1024, kPanelsInCacheVnni = 512 * 1024;
constexpr int64_t kSlabBytes = 16 * 1024 * 1024;       // of panels in the workspace
constexpr int64_t kPackedBytesPerThread = 128 * 1024;  // of a, worth waking a thread for
constexpr double kThreadNanoseconds = 6000;            // work that is worth waking a thread for

bool a_is_contiguous(const Int8GemmProblem& p) { return p.stride_ak == 1 || p.K <= 1; }
bool b_is_contiguous(const Int8GemmProblem& p) {
  return p.b_packed == nullptr && (p.stride_bk == 1 || p.K <= 1);
}

// A rough cost on one thread, only to choose the number of threads.
double estimate_nanoseconds(const Int8GemmProblem& p, Isa isa) {
  constexpr double kMacsPerNanosecond[] = {2, 20, 100, 800, 50};  // by Isa; NEON's unmeasured
  constexpr double kBytesPerNanosecond = 15;
  const double macs = static_cast<double>(p.M) * p.N * p.K;
  const double bytes = static_cast<double>(p.N) * p.K + static_cast<double>(p.M) * (p.K + p.N);
  return std::max(macs / kMacsPerNanosecond[static_cast<int>(isa)], bytes / kBytesPerNanosecond);
}

GemmAlgorithm choose_algorithm(const Int8GemmProblem& p, Isa isa) {
  if (p.b_packed != nullptr) return GemmAlgorithm::kPacked;
  if (!b_is_contiguous(p)) return GemmAlgorithm::kRepack;
  switch (isa) {
    case Isa::kScalar:
      return GemmAlgorithm::kDot;
    case Isa::kAvx2:
    case Isa::kNeon:
      return p.M <= 16 ? GemmAlgorithm::kDot : GemmAlgorithm::kRepack;
    case Isa::kAvx512Vnni:
      return p.M <= 32 ? GemmAlgorithm::kDot : GemmAlgorithm::kRepack;
    case Isa::kAmx:
      break;
  }
  // Below this, setting up the tiles costs more than they save.
  if (p.M == 1 || p.M * p.N * p.K <= 32 * 1024) return GemmAlgorithm::kDot;
  // Packing a costs M * K, packing b N * K; a packed a must stay in L2 beside the rows of b.
  const bool short_batch = p.M <= 64 || (p.M * 4 <= p.N && p.M * p.K <= kSwappedRowsInCache);
  return short_batch ? GemmAlgorithm::kSwapped : GemmAlgorithm::kRepack;
}

// `size` cut into equal chunks, a multiple of `unit` each, at most `limit`, and enough of them.
int64_t chunk_size(int64_t size, int64_t unit, int64_t limit, int64_t wanted_chunks) {
  const int64_t even = (size + wanted_chunks - 1) / wanted_chunks;
  const int64_t capped = std::min(even, std::max(limit, unit));
  const int64_t chunks = (size + capped - 1) / capped;
  return round_up((size + chunks - 1) / chunks, unit);
}

// The workspace's parts.
struct Space {
  int8_t* shared;  // a copied, or packed, or one slab of its panels
  int8_t* thread(int slot) const { return threads + slot * thread_bytes; }
  int8_t* threads;
  size_t thread_bytes;
};

class TileState {  // the tile registers of AMX, held for one task
 public:
  explicit TileState(const GemmKernels& kernels) : kernels_(kernels) {
    if (kernels_.begin != nullptr) kernels_.begin();
  }
  ~TileState() {
    if (kernels_.end != nullptr) kernels_.end();
  }
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;

 private:
  const GemmKernels& kernels_;
};

struct Chunk {
  int64_t m_begin, m_end, n_begin, n_end;
};

// Calls tile(m, rows, n, cols), all of a chunk's columns for one tile of rows before the next.
template <class Tile>
void for_each_tile(const Chunk& chunk, int64_t tile_m, Tile&& tile) {
  for (int64_t m = chunk.m_begin; m < chunk.m_end; m += tile_m) {
    const int rows = static_cast<int>(std::min(tile_m, chunk.m_end - m));
    for (int64_t n = chunk.n_begin; n < chunk.n_end; n += kTileN) {
      tile(m, rows, n, static_cast<int>(std::min<int64_t>(kTileN, chunk.n_end - n)));
    }
  }
}

// The lines that a tile of output will be written to, where its rows are contiguous. Stores alone
// would wait for them one after the other.
Fetch output_lines(const Int8GemmProblem& p, int64_t m, int rows, int64_t n, int cols) {
  if (p.stride_on != 1 && cols > 1) return {};
  const int64_t size = element_size(p.out_dtype);
  const auto first = reinterpret_cast<uintptr_t>(p.out) + (m * p.stride_om + n) * size;
  const int64_t lines = (static_cast<int64_t>(first % 64) + cols * size + 63) / 64;
  return {first - first % 64, p.stride_om * size, rows, lines};
}

// Part `index` of `parts` equal ones of a run of bytes.
Run share(const int8_t* run, int64_t bytes, int64_t index, int64_t parts) {
  const int64_t lines = (bytes + 63) / 64;
  const int64_t begin = lines * index / parts, end = lines * (index + 1) / parts;
  return {reinterpret_cast<uintptr_t>(run) + begin * 64, end - begin};
}

void run_dot(const Int8GemmProblem& p, const GemmKernels& kernels, const GemmConfig& config,
             const Chunk& chunk) {
  alignas(64) int32_t acc[kTileM * kTileN];
  // A tile of columns of b^T may be long: keep it in cache for all rows of a.
  for (int64_t n = chunk.n_begin; n < chunk.n_end; n += kTileN) {
    const Chunk column{chunk.m_begin, chunk.m_end, n, std::min(n + kTileN, chunk.n_end)};
    for_each_tile(column, config.tile_m, [&](int64_t m, int rows, int64_t n0, int cols) {
      fetch_lines(output_lines(p, m, rows, n0, cols));
      kernels.dot_tile({p.a + m * p.stride_am, p.stride_am, rows, p.b + n0 * p.stride_bn,
                        p.stride_bn, cols, p.K},
                       acc);
      kernels.write_tile(p, m, rows, n0, cols, acc);
    });
  }
}

// `blocks` holds the chunk's columns in packed form.
void run_packed(const Int8GemmProblem& p, const GemmKernels& kernels, const GemmConfig& config,
                const Chunk& chunk, const int8_t* blocks) {
  alignas(64) int32_t acc[kTileM * kTileN];
  const int64_t block_stride = packed_block_stride(p.K);
  for_each_tile(chunk, config.tile_m, [&](int64_t m, int rows, int64_t n, int cols) {
    const int8_t* b = blocks + (n - chunk.n_begin) / kBlockN * block_stride;
    kernels.packed_tile({p.a + m * p.stride_am, p.stride_am, rows, b, block_stride, cols, p.K,
                         output_lines(p, m, rows, n, cols)},
                        acc);
    kernels.write_tile(p, m, rows, n, cols, acc);
  });
}

// Both operands in packed form: the chunk's rows in `panels`, its columns in `blocks`. One of them
// stays in L2 while the other passes by, fetched ahead: the chunk's columns where they were packed
// a moment ago, its rows where the columns come from memory.
void run_panels(const Int8GemmProblem& p, const GemmKernels& kernels, const GemmConfig& config,
                const Chunk& chunk, const int8_t* panels, const int8_t* blocks) {
  alignas(64) int32_t acc[kPanelRows * kMaxPanelCols];
  const int64_t tile_n = kernels.panel_cols;
  const int64_t block_stride = packed_block_stride(p.K), padded_k = block_stride / kBlockN;
  const int64_t row_tiles = (chunk.m_end - chunk.m_begin + kPanelRows - 1) / kPanelRows;
  const int64_t column_tiles = (chunk.n_end - chunk.n_begin + tile_n - 1) / tile_n;
  const int32_t* sums = p.b_packed == nullptr ? nullptr : packed_column_sums(p.b_packed);
  const auto tile = [&](int64_t m, int64_t n, const Run& next) {
    const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, chunk.m_end - m));
    const int cols = static_cast<int>(std::min(tile_n, chunk.n_end - n));
    const int8_t* b = blocks + (n - chunk.n_begin) / kBlockN * block_stride;
    kernels.panel_tile(
        {panels + (m - chunk.m_begin) * padded_k, rows, b, block_stride, cols, padded_k / kBlockK,
         sums == nullptr ? nullptr : sums + n, output_lines(p, m, rows, n, cols), next},
        acc);
    for (int c = 0; c < cols; c += kTileN) {
      kernels.write_tile(p, m, rows, n + c, std::min(cols - c, kTileN), acc + c * kPanelRows);
    }
  };
  const auto row = [&](int64_t i) { return chunk.m_begin + i * kPanelRows; };
  const auto column = [&](int64_t j) { return chunk.n_begin + j * tile_n; };
  if (config.algorithm == GemmAlgorithm::kRepack) {
    for (int64_t i = 0; i < row_tiles; ++i) {
      const int64_t left = std::min<int64_t>(kPanelRows, chunk.m_end - row(i + 1));
      const int64_t bytes = std::max<int64_t>(left, 0) * padded_k;
      for (int64_t j = 0; j < column_tiles; ++j) {
        tile(row(i), column(j),
             share(panels + (i + 1) * kPanelRows * padded_k, bytes, j, column_tiles));
      }
    }
    return;
  }
  for (int64_t j = 0; j < column_tiles; ++j) {
    const int8_t* next = blocks + (j + 1) * tile_n * padded_k;
    const int64_t left = round_up(chunk.n_end, kBlockN) - column(j + 1);
    // A single panel of rows leaves no time to fetch far ahead.
    const int64_t columns = row_tiles > 1 ? std::clamp<int64_t>(left, 0, tile_n) : 0;
    for (int64_t i = 0; i < row_tiles; ++i) {
      tile(row(i), column(j), share(next, columns * padded_k, i, row_tiles));
    }
  }
}

void run_swapped(const Int8GemmProblem& p, const GemmKernels& kernels, const Chunk& chunk,
                 const int8_t* packed_a) {
  alignas(64) int32_t acc[kTileM * kTileN];
  const int64_t block_stride = packed_block_stride(p.K);
  // The tiles that share rows of b^T fetch the next ones between them; a single one would only get
  // in the way of its own loads.
  const int64_t tiles = (chunk.m_end - chunk.m_begin + kSwappedTileM - 1) / kSwappedTileM;
  const int fetch_rows = tiles > 1 ? static_cast<int>((kTileN + tiles - 1) / tiles) : 0;
  for (int64_t n = chunk.n_begin; n < chunk.n_end; n += kTileN) {
    const Chunk column{chunk.m_begin, chunk.m_end, n, std::min(n + kTileN, chunk.n_end)};
    int64_t fetch_row = kTileN;
    for_each_tile(column, kSwappedTileM, [&](int64_t m, int rows, int64_t n0, int cols) {
      kernels.swapped_tile(
          {packed_a + m / kBlockN * block_stride, block_stride, rows, p.b + n0 * p.stride_bn,
           p.stride_bn, cols, p.K, fetch_row, fetch_rows, output_lines(p, m, rows, n0, cols)},
          acc);
      kernels.write_tile(p, m, rows, n0, cols, acc);
      fetch_row += fetch_rows;
    });
  }
}

// `slab_begin` is the first row of the panels in the workspace.
void run_chunk(const Int8GemmProblem& p, const GemmKernels& kernels, const GemmConfig& config,
               const Chunk& chunk, const Space& space, int slot, int64_t slab_begin) {
  const TileState state(kernels);
  const int8_t* blocks = nullptr;
  switch (config.algorithm) {
    case GemmAlgorithm::kDot:
      return run_dot(p, kernels, config, chunk);
    case GemmAlgorithm::kSwapped:
      return run_swapped(p, kernels, chunk, space.shared);
    case GemmAlgorithm::kPacked:
      blocks =
          packed_blocks(p.b_packed, p.K, p.N) + chunk.n_begin / kBlockN * packed_block_stride(p.K);
      break;
    case GemmAlgorithm::kRepack:
      pack_columns(kernels, p.b + chunk.n_begin * p.stride_bn, p.stride_bk, p.stride_bn, p.K,
                   chunk.n_end - chunk.n_begin, space.thread(slot));
      blocks = space.thread(slot);
  }
  if (!config.pack_a) return run_packed(p, kernels, config, chunk, blocks);
  const int8_t* panels = space.shared + (chunk.m_begin - slab_begin) * round_up(p.K, kBlockK);
  run_panels(p, kernels, config, chunk, panels, blocks);
}

void copy_rows(const Int8GemmProblem& p, int threads, int8_t* copy) {
  parallel_for(p.M, threads, [&](int64_t m, int) {
    const int8_t* row = p.a + m * p.stride_am;
    for (int64_t k = 0; k < p.K; ++k) copy[m * p.K + k] = row[k * p.stride_ak];
  });
}

void pack_panels(const Int8GemmProblem& p, int64_t m_begin, int64_t m_end, int threads, int8_t flip,
                 int8_t* panels) {
  const int64_t padded_k = round_up(p.K, kBlockK);
  const int64_t useful = (m_end - m_begin) * padded_k / kPackedBytesPerThread + 1;
  threads = static_cast<int>(std::min<int64_t>(threads, useful));
  const int64_t tasks = (m_end - m_begin + kPanelRows - 1) / kPanelRows;
  parallel_for(tasks, threads, [&](int64_t task, int) {
    const int64_t m = m_begin + task * kPanelRows;
    const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, m_end - m));
    pack_panel(p.a + m * p.stride_am, p.stride_am, p.stride_ak, p.K, rows, flip,
               panels + (m - m_begin) * padded_k);
  });
}

void pack_rows(const Int8GemmProblem& p, const GemmKernels& kernels, int threads, int8_t* blocks) {
  const int64_t tasks = (p.M + kBlockN - 1) / kBlockN;
  parallel_for(tasks, threads, [&](int64_t task, int) {
    const int64_t m = task * kBlockN;
    pack_columns(kernels, p.a + m * p.stride_am, p.stride_ak, p.stride_am, p.K,
                 std::min<int64_t>(kBlockN, p.M - m), blocks + task * packed_block_stride(p.K));
  });
}

// Rows [m_begin, m_end): the whole of a, or one slab of it.
void run_rows(const Int8GemmProblem& p, const GemmKernels& kernels, const GemmConfig& config,
              const Space& space, int64_t m_begin, int64_t m_end) {
  if (config.pack_a) {
    pack_panels(p, m_begin, m_end, config.threads, kernels.panel_flip, space.shared);
  }
  const int64_t chunks_m = (m_end - m_begin + config.chunk_m - 1) / config.chunk_m;
  const int64_t chunks_n = (p.N + config.chunk_n - 1) / config.chunk_n;
  // Consecutive tasks share what stays in cache: rows, or columns of b.
  const bool rows_stay = config.pack_a && config.algorithm == GemmAlgorithm::kPacked;
  parallel_for(chunks_m * chunks_n, config.threads, [&](int64_t task, int slot) {
    const int64_t chunk_m = rows_stay ? task / chunks_n : task % chunks_m;
    const int64_t chunk_n = rows_stay ? task % chunks_n : task / chunks_m;
    const int64_t m = m_begin + chunk_m * config.chunk_m, n = chunk_n * config.chunk_n;
    const Chunk chunk{m, std::min(m + config.chunk_m, m_end), n, std::min(n + config.chunk_n, p.N)};
    run_chunk(p, kernels, config, chunk, space, slot, m_begin);
  });
}

const char* layout_name(const Int8GemmProblem& p) {
  if (p.b_packed != nullptr) return "packed";
  if (b_is_contiguous(p)) return "plain_nk";
  return p.stride_bn == 1 ? "plain_kn" : "plain_strided";
}

}  // namespace

GemmConfig select_gemm_config(const Int8GemmProblem& p, Isa isa, int max_threads) {
  GemmConfig config{};
  config.isa = isa;
  config.algorithm = choose_algorithm(p, isa);
  const double useful = estimate_nanoseconds(p, isa) / kThreadNanoseconds;
  config.threads = static_cast<int>(std::clamp(useful, 1.0, static_cast<double>(max_threads)));
  const bool swapped = config.algorithm == GemmAlgorithm::kSwapped;
  const bool repack = config.algorithm == GemmAlgorithm::kRepack;
  const bool packed = config.algorithm == GemmAlgorithm::kPacked;
  config.pack_a = (isa == Isa::kAvx512Vnni || isa == Isa::kAmx) && (packed || repack);
  config.copy_a = !swapped && !config.pack_a && !a_is_contiguous(p);

  const int64_t padded_k = std::max<int64_t>(round_up(p.K, kBlockK), kBlockK);
  config.tile_m = std::clamp<int64_t>(kRowsInCache / padded_k / 32 * 32, 32, kTileM);
  config.slab_m = p.M;
  if (config.pack_a)
    config.slab_m = chunk_size(p.M, kTileM, kSlabBytes / padded_k / kTileM * kTileM, 1);
  // Several tasks a thread, so that a late one costs little; but each repacked group of columns
  // makes all of a pass by once more.
  const int64_t wanted = config.threads == 1 ? 1 : config.threads * (repack ? 2 : 4);
  const int64_t slab_m = std::min(config.slab_m, p.M);
  if (config.pack_a && packed) {
    const int64_t in_cache = isa == Isa::kAmx ? kPanelsInCacheAmx : kPanelsInCacheVnni;
    const int64_t limit_m = in_cache / padded_k / kPanelRows * kPanelRows;
    config.chunk_m = chunk_size(slab_m, kPanelRows, limit_m, 1);
    const int64_t chunks_m = (slab_m + config.chunk_m - 1) / config.chunk_m;
    config.chunk_n = chunk_size(p.N, kTileN, p.N, (wanted + chunks_m - 1) / chunks_m);
  } else {
    int64_t limit_n = p.N;
    if (repack || packed) limit_n = kColumnsInCache / padded_k / kTileN * kTileN;
    config.chunk_n = chunk_size(p.N, kTileN, limit_n, wanted);
    const int64_t chunks_n = (p.N + config.chunk_n - 1) / config.chunk_n;
    // Too few columns for all threads: share the rows as well.
    config.chunk_m = chunk_size(slab_m, kTileM, slab_m, std::max<int64_t>(1, wanted / chunks_n));
  }

  if (swapped) {
    config.shared_bytes = round_up(p.M, kBlockN) / kBlockN * packed_block_stride(p.K);
  } else if (config.pack_a) {
    config.shared_bytes = round_up(slab_m * round_up(p.K, kBlockK), 256);
  } else if (config.copy_a) {
    config.shared_bytes = round_up(p.M * p.K, 256);
  }
  if (repack) config.thread_bytes = round_up(config.chunk_n * padded_k, 256);
  return config;
}

size_t int8_gemm_workspace_size(const Int8GemmProblem& problem) {
  return select_gemm_config(problem, active_isa(), get_num_threads()).workspace_bytes();
}

void int8_gemm(const Int8GemmProblem& problem, Workspace& workspace) {
  GemmConfig config = select_gemm_config(problem, active_isa(), get_num_threads());
  // The number of threads may have grown since the caller asked for the size.
  while (config.threads > 1 && !workspace.holds(config.workspace_bytes())) --config.threads;
  const GemmKernels& kernels = gemm_kernels(config.isa);
  auto* shared = static_cast<int8_t*>(workspace.get("int8_gemm", config.workspace_bytes()));
  const Space space{shared, shared + config.shared_bytes, config.thread_bytes};

  Int8GemmProblem p = problem;
  if (p.b_packed != nullptr) packed_blocks(p.b_packed, p.K, p.N);  // refuses foreign bytes
  if (config.copy_a) {
    copy_rows(p, config.threads, space.shared);
    p.a = space.shared;
    p.stride_am = p.K;
    p.stride_ak = 1;
  } else if (config.algorithm == GemmAlgorithm::kSwapped) {
    pack_rows(p, kernels, config.threads, space.shared);
  }
  for (int64_t m = 0; m < p.M; m += config.slab_m) {
    run_rows(p, kernels, config, space, m, std::min(m + config.slab_m, p.M));
  }
}

std::string int8_gemm_describe(const Int8GemmProblem& problem) {
  return std::string("cpu/") + isa_name(active_isa()) + "/" + layout_name(problem);
}

}  // namespace fastq::cpu
