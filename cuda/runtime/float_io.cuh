// Loads and stores of the float dtypes, one element or 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastq::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// 16 bytes of T as floats, and back.
template <class T>
__device__ inline void unpack_16_bytes(const uint4& words, float (&x)[16 / sizeof(T)]) {
  const uint32_t its[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      x[i] = __uint_as_float(its[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      x[2 * i] = __uint_as_float(its[i] << 16);
      x[2 * i + 1] = __uint_as_float(its[i] & 0xffff0000u);
    } else {
      __half2 pair;
      memcpy(&pair, &its[i], 4);
      const float2 two = __half22float2(pair);
      x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
  }
}
template <class T>
__device__ inline uint4 pack_16_bytes(const float (&x)[16 / sizeof(T)]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = __float_as_uint(x[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      memcpy(&words[i], &pair, 4);
    } else {
      const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      memcpy(&words[i], &pair, 4);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace fastq::cuda
