// Ampere's matrix product of a warp, mma.sync m16n8k16 of 16-bit operands, and how its operands
// come from shared memory and (on Hopper) go there.
//
// Of an operand's 8 x 8 elements a lane has row lane / 4, columns 2 * (lane % 4) and the next, in a
// register; of the float32 sums (16, 8) those of rows lane / 4 and lane / 4 + 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include <cute/arch/mma_sm80.hpp>

namespace fastq::cuda {

template <class T>
struct Mma16816;
template <>
struct Mma16816<__half> : cute::SM80_16x8x16_F32F16F16F32_TN {};
template <>
struct Mma16816<__nv_bfloat16> : cute::SM80_16x8x16_F32BF16BF16F32_TN {};

// c (16, 8) += a (16, 16) . b (16, 8)
template <class T>
__device__ inline void mma(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
  Mma16816<T>::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]);
}

// c (16, 8) += a (16, 32) . b (32, 8) of int8
__device__ inline void mma_int8(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                uint32_t (&c)[4]) {
  cute::SM80_16x8x32_S32S8S8S32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1,
                                        c[0], c[1], c[2], c[3]);
}

// Four 8 x 8 matrices, of which lanes 8 i to 8 i + 7 give the addresses of matrix i's rows.
__device__ inline void load_matrices(uint32_t address, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}
__device__ inline void load_transposed_matrices(uint32_t address, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}

// As load_matrices, the other way.
__device__ inline void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.x4.m8n8.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// An 8 x 8 matrix in the registers of a warp.
__device__ inline uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace fastq::cuda
