// A small cache of TMA descriptors, one per descriptor type and thread.
//
// Encoding a descriptor costs the host about as much as a launch. One depends on nothing but what
// is in its key, so each is kept: weights, and buffers that the allocator gives again.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace fastq::cuda {

// All that a descriptor of a given type depends on.
struct TmaKey {
  const void* data = nullptr;
  std::array<int64_t, 8> layout = {};  // sizes, strides and the box, in an order of the type's

  friend bool operator==(const TmaKey& x, const TmaKey& y) {
    return x.data == y.data && x.layout == y.layout;
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
  for (const int64_t x : key.layout) {
    hash = (hash ^ static_cast<uint64_t>(x)) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  Slot& slot = slots[hash % kSlots];
  if (slot.key.data == nullptr || !(slot.key == key)) {
    slot.descriptor = make();
    slot.key = key;
  }
  return slot.descriptor;
}

}  // namespace fastq::cuda
