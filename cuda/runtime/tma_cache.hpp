// A small cache of TMA descriptors, one per descriptor type and thread.
//
// Encoding a descriptor costs the host about as much as a launch. One depends on nothing but what
// is in its key, so each is kept: weights, and buffers that the allocator gives again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace fastq::cuda {

// All that a descriptor of a given type depends on.
struct TmaKey {
  const void* data = nullptr;
  int64_t rows = 0, cols = 0, ld = 0;
  int box_rows = 0;  // where the type does not fix the box

  friend bool operator==(const TmaKey& x, const TmaKey& y) {
    return x.data == y.data && x.rows == y.rows && x.cols == y.cols && x.ld == y.ld &&
           x.box_rows == y.box_rows;
  }
};

// Direct-mapped: a collision encodes again, nothing grows. 1024 slots hold every linear layer of a
// large model; the slots are allocated at the first use.
template <class Descriptor, class Make>
Descriptor cached_tma(const TmaKey& key, const Make& make) {
  constexpr size_t kSlots = 1024;
  struct Slot {
    TmaKey key;
    Descriptor descriptor;
  };
  static thread_local std::vector<Slot> slots(kSlots);
  uint64_t hash = reinterpret_cast<uintptr_t>(key.data) >> 4;
  hash ^= static_cast<uint64_t>(key.rows) * 0x9E3779B97F4A7C15u;
  hash ^= static_cast<uint64_t>(key.cols) * 0xC2B2AE3D27D4EB4Fu;
  hash ^= static_cast<uint64_t>(key.ld) * 0x165667B19E3779F9u;
  hash ^= static_cast<uint64_t>(key.box_rows) * 0x27D4EB2F165667C5u;
  hash *= 0x9E3779B97F4A7C15u;
  Slot& slot = slots[hash >> 54];
  if (slot.key.data == nullptr || !(slot.key == key)) {
    slot.descriptor = make();
    slot.key = key;
  }
  return slot.descriptor;
}

}  // namespace fastq::cuda
