// Where the vectors lie that a thread holds of its row.
#pragma once

#include "quantize/quantize_row.cuh"
#include "quantize/row_reduction.cuh"

namespace fastq::cuda {

// Whether a vector along the columns is there, and in x's dtype.
template <class T>
__device__ inline bool is_usual(const VectorView& v) {
  return v.data != nullptr && (std::is_same_v<T, float> || v.dtype != DType::kFloat32);
}

// A pointer that is worked out once: without this the compiler adds its parts up anew for each
// load.
template <class P>
__device__ inline P* worked_out(P* pointer) {
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Of q's vectors. Without a sign there is nothing to extend to 64 bits.
template <int kVector>
__device__ inline void store_packed(const PackedBytes<kVector>& packed, int8_t* q, int at) {
  *reinterpret_cast<PackedBytes<kVector>*>(q + static_cast<uint32_t>(at)) = packed;
}

// Where a thread's vectors of a row lie. kCount: how many there are in a thread that has most; 0:
// known when it runs. Others have one fewer: they do their first once more, and a thread without
// any does the row's last: that changes no extreme, and is written as it is; but sums leave it out.
template <class Traits, int kCount>
struct HeldVectors {
  static constexpr int kVectors = kCount > 0 ? kCount : Traits::kInRegisters;
  const int count, step, first, last;
  const int tail;  // where the last of kCount is

  __device__ HeldVectors(const QuantizeParams& params, const RowBlocks& blocks)
      : count(params.vectors),
        step(static_cast<int>(blocks.count * blockDim.x) * Traits::kVector),
        first(static_cast<int>(blocks.rank * blockDim.x + threadIdx.x) * Traits::kVector),
        last(static_cast<int>(params.problem.cols) - Traits::kVector),
        tail(kCount > 0 ? not_first(place(kCount - 1)) : 0) {}

  __device__ bool is_any(int i) const { return kCount > 0 || i < count; }  // in any thread
  __device__ bool is_there(int i) const { return i + 1 < kCount || i * step + first <= last; }
  __device__ int at(int i) const {
    if (i + 1 < kCount) return i * step + first;
    if (kCount == 0) return place(i);
    return Traits::kOptions ? not_first(place(i)) : tail;  // by what takes fewer registers
  }

  // visit(i, at), of each vector that some thread has.
  template <class Visit>
  __device__ void for_each(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!is_any(i)) return;
      visit(i, at(i));
    }
  }

  // The q of a row with a NaN or an Inf.
  __device__ void store_zeros(int8_t* q) const {
    for_each([&](int, int at) { store_packed(PackedBytes<Traits::kVector>{}, q, at); });
  }

 private:
  // Or a copy of the first would take the place of a load, and wait for the first.
  __device__ static int not_first(int at) {
    asm("" : "+r"(at));
    return at;
  }
  __device__ int place(int i) const {
    return is_there(i) ? i * step + first : i == 0 ? last : first;
  }
};

}  // namespace fastq::cuda
