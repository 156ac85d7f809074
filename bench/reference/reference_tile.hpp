// What an instance of a reference tile gives to the table behind the C interface.
#pragma once

#include <cstddef>

namespace fastq::reference {

struct Problem {
  const void *a, *b, *scale_a, *scale_b;
  void* out;
  int M, N, K;
};

struct Tile {
  const char *name = nullptr, *group = nullptr;
  size_t (*workspace_size)(const Problem&) = nullptr;
  // Returns a cutlass::Status.
  int (*run)(const Problem&, void* workspace, void* stream) = nullptr;
};

// Called while the library is loaded, once for each instance.
bool register_tile(int index, const Tile& tile);

}  // namespace fastq::reference
