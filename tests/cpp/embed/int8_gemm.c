/* A plain C99 program on the installed libfastq. Prints the product, one row a line; the test
 * computes the same product with NumPy. */
#include <stdio.h>
#include <stdlib.h>

#include <fastq/fastq.h>

enum { M = 3, N = 5, K = 70 };

static fastq_tensor view(void* data, int32_t dtype, int32_t rank, int64_t rows, int64_t cols) {
  fastq_tensor t = {0};
  t.data = data;
  t.dtype = dtype;
  t.device_type = FASTQ_CPU;
  t.rank = rank;
  t.sizes[0] = rows;
  t.sizes[1] = cols;
  t.strides[0] = rank == 2 ? cols : 1;
  t.strides[1] = rank == 2 ? 1 : 0;
  return t;
}

static int fail(const char* what) {
  fprintf(stderr, "%s: %s\n", what, fastq_last_error());
  return EXIT_FAILURE;
}

int main(void) {
  static int8_t a[M * K], w[N * K]; /* w is (N, K), as a linear layer stores it */
  static float scale_a[M], scale_b[N], bias[N], out[M * N];
  for (int i = 0; i < M * K; ++i) a[i] = (int8_t)(i * 37 % 255 - 127);
  for (int i = 0; i < N * K; ++i) w[i] = (int8_t)(i * 91 % 255 - 127);
  for (int m = 0; m < M; ++m) scale_a[m] = 0.01f * (float)(m + 1);
  for (int n = 0; n < N; ++n) scale_b[n] = 0.002f * (float)(n + 1), bias[n] = 0.5f * (float)n;

  fastq_weight b = {0};
  b.struct_size = sizeof(b);
  b.data = view(w, FASTQ_INT8, 2, K, N); /* the (K, N) operand: the same memory, transposed */
  b.data.strides[0] = 1;
  b.data.strides[1] = K;
  b.scale = view(scale_b, FASTQ_FLOAT32, 1, N, 0);
  b.layout = FASTQ_WEIGHT_PLAIN;

  fastq_int8_gemm_args args = {0};
  args.struct_size = sizeof(args);
  args.a = view(a, FASTQ_INT8, 2, M, K);
  args.b = &b;
  args.scale_a = view(scale_a, FASTQ_FLOAT32, 1, M, 0);
  args.bias = view(bias, FASTQ_FLOAT32, 1, N, 0);
  args.out = view(out, FASTQ_FLOAT32, 2, M, N);

  /* C99 has no aligned allocation: over-allocate, then round up. */
  if (fastq_int8_gemm_workspace_size(&args, &args.workspace_size)) return fail("workspace_size");
  char* block = args.workspace_size ? malloc(args.workspace_size + 256) : NULL;
  if (block) args.workspace = block + (256 - (uintptr_t)block % 256) % 256;
  if (fastq_int8_gemm(&args)) return fail("int8_gemm");
  free(block);

  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) printf(n ? " %.9g" : "%.9g", (double)out[m * N + n]);
    printf("\n");
  }

  /* A wrong call says so, and writes nothing. */
  out[0] = 42.0f;
  args.a.sizes[1] = K - 1;
  if (fastq_int8_gemm(&args) != FASTQ_INVALID_VALUE || out[0] != 42.0f) return EXIT_FAILURE;
  printf("error: %s\n", fastq_last_error());
  return EXIT_SUCCESS;
}
