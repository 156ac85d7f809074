// The INT8 GEMM that a user of CUTLASS has today, for the benchmarks to compare with: stock
// collectives and a stock epilogue visitor tree in the tiles that public dispatchers pick from on
// Hopper. Built beside the library, never into it; called through this plain C interface.
//
//   out (M, N) bf16 = round((f32(a (M, K) . b (N, K)^T) * scale_a[m]) * scale_b[n])
//
// a and b are int8 and out is bf16, dense and row-major; scale_a (M) and scale_b (N) are float32.
// All of them lie on the current device and start at multiples of 16 bytes.
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Tiles are told by their index, 0 <= tile < count.
int reference_int8_gemm_count(void);

// For example "128x128x128_pingpong_2x1": tile MxNxK, schedule, cluster MxN. A null pointer for an
// index out of range, here and below.
const char* reference_int8_gemm_name(int tile);

// "dispatched": a public dispatcher picks it for some M and N; "larger": it has no use for it;
// "beyond": it has nothing of the kind.
const char* reference_int8_gemm_group(int tile);

// Bytes of workspace that a call needs, 0 for most tiles.
size_t reference_int8_gemm_workspace_size(int tile, int M, int N, int K);

// Enqueues the product on a cudaStream_t. Returns 0, or a code for reference_int8_gemm_error:
// the tile does not take the shape, the workspace is too small, the launch failed.
int reference_int8_gemm(int tile, const void* a, const void* b, const void* scale_a,
                        const void* scale_b, void* out, int M, int N, int K, void* workspace,
                        size_t workspace_size, void* stream);

const char* reference_int8_gemm_error(int code);

#ifdef __cplusplus
}
#endif
