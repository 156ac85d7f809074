/* fastq: the C ABI of libfastq.
 *
 * Every function returns a fastq_status; the message of the last failure on this thread is
 * fastq_last_error(). Ops never allocate: the caller passes `out` and a workspace whose size the
 * op tells. Argument structs begin with their own size (`struct_size = sizeof(...)`), so that they
 * can grow without breaking a program that was built against an older header: zero-initialise them.
 * A shorter struct of an older header lacks the newer fields, and they count as zero (absent). A
 * longer one of a newer header is taken as long as everything this library does not know is zero.
 */
#ifndef FASTQ_FASTQ_H_
#define FASTQ_FASTQ_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FASTQ_API __attribute__((visibility("default")))
#else
#define FASTQ_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define FASTQ_MAX_RANK 8

typedef enum fastq_status {
  FASTQ_SUCCESS = 0,
  FASTQ_INVALID_VALUE = 1,   /* a shape, stride, size or overlap the op cannot take */
  FASTQ_INVALID_TYPE = 2,    /* a dtype or device the op cannot take */
  FASTQ_NOT_IMPLEMENTED = 3, /* a combination that this build does not hold */
  FASTQ_RUNTIME_ERROR = 4    /* the device or the system failed; the message holds its words */
} fastq_status;

typedef enum fastq_dtype {
  FASTQ_DTYPE_NONE = 0, /* an absent tensor */
  FASTQ_FLOAT32 = 1,
  FASTQ_FLOAT16 = 2,
  FASTQ_BFLOAT16 = 3,
  FASTQ_INT8 = 4,
  FASTQ_INT32 = 5,
  FASTQ_UINT8 = 6
} fastq_dtype;

typedef enum fastq_device_type { FASTQ_CPU = 0, FASTQ_CUDA = 1 } fastq_device_type;

typedef enum fastq_tensor_flags {
  FASTQ_READ_ONLY = 1 /* an op that would write to the tensor refuses */
} fastq_tensor_flags;

/* A non-owning view. Strides are in elements and may be any value, 0 and negative ones included.
 * A zero-initialised view is "absent". */
typedef struct fastq_tensor {
  void* data;
  int32_t dtype;       /* fastq_dtype */
  int32_t device_type; /* fastq_device_type */
  int32_t device_index;
  int32_t rank;
  uint32_t flags; /* fastq_tensor_flags */
  uint32_t reserved;
  int64_t sizes[FASTQ_MAX_RANK];
  int64_t strides[FASTQ_MAX_RANK];
} fastq_tensor;

FASTQ_API const char* fastq_version(void);

/* The message of the last failed call on this thread; empty when none failed. Never NULL. */
FASTQ_API const char* fastq_last_error(void);

/* What the library was built with and what it finds, as one line of JSON: version, the CUDA
 * architectures compiled in, the instruction set the CPU backend takes, the number of threads, and
 * the CUDA devices or the reason why there are none. Touches the CUDA driver. The text belongs to
 * this thread and lives until its next call. */
FASTQ_API fastq_status fastq_describe(const char** json);

/* Threads the CPU backend uses, the caller included. The default is FASTQ_NUM_THREADS, else the
 * processors that this process may run on. */
FASTQ_API fastq_status fastq_set_num_threads(int32_t num_threads);
FASTQ_API fastq_status fastq_get_num_threads(int32_t* num_threads);

/* Not 0: a promise for this thread's calls from here on, till it is taken back by 0 (the default),
 * which are those of one step of a model: when the first of them has its turn in its stream,
 * whatever wrote what is settled has finished, and nothing writes that meanwhile. Settled are
 *
 * - the weights of which calls say b_is_constant;
 * - of kv_append and flash_decode the lengths, the block table, the tables of sines and cosines,
 *   and the cache's tokens but the last seqlen_new or seqlen_q of each sequence.
 *
 * On Hopper the small kernels between two products (quantisation, norms, decoding attention) then
 * let their successor start before they themselves have waited, so that a product's weight and the
 * cache are read while several kernels before still run. No effect on the bits, none on the CPU.
 */
FASTQ_API fastq_status fastq_set_settled_weights(int32_t are_settled);
FASTQ_API fastq_status fastq_get_settled_weights(int32_t* are_settled);

/* ---- int8_gemm -------------------------------------------------------------------------------
 * acc      = sum_k a[m,k] * b[k,n]  - zero_point[m] * b.column_sums[n]
 * y        = (f32(acc) * scale_a[m]) * scale_b[n]  + bias[n]
 * y        = activation(y)  + f32(residual[m,n])
 * out[m,n] = round_to(out.dtype, y)
 *          | clamp(round_half_even(y / out_scale), -127, 127)   for int8
 *
 * The integer sum is exact in int32; what follows is float32 in this order, each operation rounded
 * to nearest even (no fused multiply-add), with one rounding to out.dtype at the end. Only the
 * activations differ between devices, in their last bits: relu is `y < 0 ? 0 : y`, the others have
 * a relative error below 1e-6. K is at most 131071, with zero_point 65535.
 *
 * out.dtype is bfloat16, float16, float32 or int8; with int32 the raw sums `acc` are written, and
 * everything but zero_point must be absent. In an int8 out -128 stands for NaN; no other y gives
 * it.
 */
typedef enum fastq_activation {
  FASTQ_ACTIVATION_NONE = 0,
  FASTQ_ACTIVATION_RELU = 1,
  FASTQ_ACTIVATION_GELU = 2,      /* y * (1 + erf(y / sqrt(2))) / 2 */
  FASTQ_ACTIVATION_GELU_TANH = 3, /* y * (1 + tanh(sqrt(2 / pi) * (y + 0.044715 * y^3))) / 2 */
  FASTQ_ACTIVATION_SILU = 4       /* y / (1 + exp(-y)) */
} fastq_activation;

typedef enum fastq_weight_layout {
  FASTQ_WEIGHT_PLAIN = 0, /* data: (K, N) int8, any strides; K contiguous is the fast path */
  FASTQ_WEIGHT_PACKED = 1 /* data: (bytes,) uint8, written by fastq_pack_weight; sizes in k and n */
} fastq_weight_layout;

typedef struct fastq_weight {
  size_t struct_size;
  fastq_tensor data;
  fastq_tensor scale; /* float32 multipliers: a scalar, (N,) or (1, N) */
  int32_t layout;     /* fastq_weight_layout */
  int32_t reserved;
  int64_t k; /* logical sizes of a packed weight; ignored for a plain one */
  int64_t n;
  int64_t group_size;       /* rows of K that share a scale; 0: all of them */
  fastq_tensor column_sums; /* sum_k b[k,n], int32: (N,) or (1, N); read with zero_point only */
} fastq_weight;

/* Gives `bytes` of workspace, aligned as fastq_int8_gemm_args says, or NULL. They stay valid until
 * the call's work is done: when it returns on the CPU, in the stream's order on CUDA. */
typedef void* (*fastq_allocate)(void* context, size_t bytes);

typedef struct fastq_int8_gemm_args {
  size_t struct_size;
  fastq_tensor a; /* (..., M, K) int8 */
  const fastq_weight* b;
  fastq_tensor scale_a; /* float32: a scalar, a.shape[:-1], that plus (1,), flat (M,) or (M, 1) */
  fastq_tensor bias;    /* (N,) or (1, N), float32 or a floating out.dtype, or absent */
  fastq_tensor out;     /* (..., M, N) */
  void* workspace;      /* at least fastq_int8_gemm_workspace_size bytes on the tensors' device,
                           64-byte aligned (256 on CUDA); undefined on entry; not shared between
                           streams */
  size_t workspace_size;
  fastq_allocate allocate; /* asked when the workspace is too small; may be NULL */
  void* allocate_context;
  void* stream;            /* a cudaStream_t; ignored on the CPU */
  fastq_tensor zero_point; /* int32, shapes as scale_a, or absent: a ~ (q - zero_point) * scale_a.
                              Within -128..127, or the sums may wrap around. Needs b.column_sums */
  fastq_tensor residual;   /* like out; float32, float16 or bfloat16, any strides, or absent. May
                              be out itself (same data, dtype, sizes, strides), else apart from it */
  fastq_tensor out_scale;  /* float32, one element; present exactly when out is int8 */
  int32_t activation;      /* fastq_activation */
  int32_t b_is_constant; /* not 0: no work that the stream has still to do writes b's data, or some
                            does, but a fastq call with work follows it (where weights are settled:
                            as fastq_set_settled_weights says). CUDA may then read b before
                            the call's turn in the stream, while the kernel before it still runs
                            (programmatic dependent launch); with few tokens that is a good part
                            of the time. No effect on the bits, none on the CPU */
} fastq_int8_gemm_args;

FASTQ_API fastq_status fastq_int8_gemm_workspace_size(const fastq_int8_gemm_args* args,
                                                      size_t* bytes);
FASTQ_API fastq_status fastq_int8_gemm(const fastq_int8_gemm_args* args);

/* Names the kernel and configuration that fastq_int8_gemm would take, as "cpu/amx/packed" or
 * "cuda/sm90/128x128x128_pingpong", then in parentheses why, "(tuned)" where a tuning table chose.
 * Writes at most `size` bytes, the final 0 included.
 *
 * On CUDA the environment decides in this order: FASTQ_KERNELS, a kernel family or a configuration;
 * FASTQ_TUNING_TABLE, the path of a table that `fastq tune` wrote, read at the first product; the
 * table that the library ships; and for every other shape the library's own estimate.
 * FASTQ_TUNING_TABLE=none turns both tables off. A configuration never changes a product's bits. */
FASTQ_API fastq_status fastq_int8_gemm_describe(const fastq_int8_gemm_args* args, char* text,
                                                size_t size);

/* Names the CUDA configurations that are worth timing for these arguments, as FASTQ_KERNELS takes
 * them, one a line without a final line break; the library's own estimate comes first.
 * FASTQ_KERNELS and tuning tables have no effect on it. FASTQ_INVALID_VALUE where they do not fit
 * into `size` bytes, the final 0 included; 8192 are enough. */
FASTQ_API fastq_status fastq_int8_gemm_candidates(const fastq_int8_gemm_args* args, char* text,
                                                  size_t size);

/* Rearranges a plain CPU weight once into the form its kernels read fastest. The form does not
 * depend on the instruction set. `packed` is (bytes,) uint8, contiguous, 64-byte aligned. */
FASTQ_API fastq_status fastq_pack_weight_size(const fastq_weight* plain, size_t* bytes);
FASTQ_API fastq_status fastq_pack_weight(const fastq_weight* plain, const fastq_tensor* packed);

/* ---- quantize --------------------------------------------------------------------------------
 * y[r,c]   = x[r,c], or x[r,c] * (1 / smooth[c]), each operation rounded to float32; smooth is
 *            positive, from 2^-126 to 2^125
 * scale[r] = absmax(y[r,:]) / 127 (1 for a row of zeros, never below FLT_MIN)
 * q[r,c]   = clamp(round_half_even(y[r,c] / scale[r]), -127, 127)
 *
 * A row with a NaN has scale NaN, one with an Inf has scale Inf, and q = 0, so that what follows
 * shows NaN. per_token: x (..., K) -> scale x.shape[:-1] or that plus (1,). per_channel:
 * x (N, K) -> scale (N,) or (N, 1); it takes neither smooth nor zero_point and is never static.
 *
 * With zero_point it is asymmetric, x ~ (q - zero_point) * scale: with the smallest and the largest
 * element of a row or 0, low <= 0 <= high,
 *   scale[r]      = high / 255 - low / 255 (1 where both are 0, never below FLT_MIN)
 *   zero_point[r] = clamp(round_half_even(-128 - low / scale[r]), -128, 127)
 *   q[r,c]        = clamp(round_half_even(y[r,c] / scale[r]) + zero_point[r], -128, 127)
 * and zero_point = 0 in a row with a NaN or an Inf.
 *
 * With is_static scale and zero_point, one element each, are read instead of written; the scale is
 * finite and positive, zero_point within -128..127. What is out of range is clamped, and a NaN
 * becomes -128: in a symmetric q nothing else does.
 *
 * With a rotation R (2, 4, 8, 16 or 32; K a multiple of it), each R consecutive elements of a row
 * of y are first replaced, in float32, by their product with the Hadamard matrix H of order R:
 *   H[i,j] = popcount(i & j) even ? 1 : -1,  as butterflies (a + b, a - b) of strides 1, 2, .. R/2
 * It spreads an outlier over its block. H is symmetric and H * H = R * I: the product of a rotated
 * x and a rotated weight is R times that of the plain ones, so divide the weight's scale by R.
 * A row whose rotated values overflow float32 is one with an Inf or a NaN.
 *
 * Source: ZeroQuant (Yao et al., 2022), token-wise; SmoothQuant (Xiao et al., 2022), smooth and
 * static scales; QuaRot (Ashkboos et al., 2024), rotation.
 */
typedef struct fastq_quantize_args {
  size_t struct_size;
  fastq_tensor x;     /* float32, float16 or bfloat16 */
  fastq_tensor q;     /* int8, like x */
  fastq_tensor scale; /* float32 */
  void* stream;
  int32_t rotation;        /* 0: none */
  int32_t is_static;       /* 0: scales are dynamic */
  fastq_tensor zero_point; /* int32, of scale's shapes, or absent */
  fastq_tensor smooth;     /* (K,) or (1, K), float32 or x's dtype, or absent */
} fastq_quantize_args;

FASTQ_API fastq_status fastq_quantize_per_token(const fastq_quantize_args* args);
FASTQ_API fastq_status fastq_quantize_per_channel(const fastq_quantize_args* args);

/* ---- llm_int8_matmul -------------------------------------------------------------------------
 * An element of x is an outlier where |x[m,k]| >= threshold; with threshold 0 none is. With
 *   scale[m] = largest magnitude of row m's other elements / 127 (1 where all are zeros, never
 *              below FLT_MIN; NaN where one is NaN)
 *   q[m,k]   = 0 for an outlier, else clamp(round_half_even(x[m,k] / scale[m]), -127, 127)
 *   v[k,n]   = f32(outlier_weight[i,n]) where k = outlier_columns[i], else f32(b[k,n]) * b.scale[n]
 * the output is
 *   y        = (f32(sum_k q[m,k] * b[k,n]) * scale[m]) * b.scale[n]
 *   y        = fma(x[m,k], v[k,n], y)  for the outliers k of row m, in ascending order
 *   out[m,n] = round_to(out.dtype, y + bias[n])
 * each operation rounded to float32, so that a row has the same bits whatever batch it came in.
 *
 * Nothing is read on the host: a CUDA graph may be replayed with other outliers. CUDA gathers the
 * columns that hold any in its workspace, 64 at the most; more are right, too, but slower.
 *
 * Source: LLM.int8() (Dettmers et al., 2022).
 */
typedef struct fastq_llm_int8_matmul_args {
  size_t struct_size;
  fastq_tensor x;               /* (..., M, K) float32, float16 or bfloat16; leading dimensions with
                                   one stride in common */
  const fastq_weight* b;        /* plain, K at most 131071; K contiguous is the fast path */
  fastq_tensor outlier_columns; /* int32 (C,), ascending: rows of b that are given in float, too */
  fastq_tensor outlier_weight;  /* (C, N) float32, float16 or bfloat16; both or neither */
  fastq_tensor bias;            /* (N,) or (1, N), float32 or out.dtype, or absent */
  fastq_tensor out;             /* (..., M, N) float32, float16 or bfloat16 */
  fastq_tensor outlier_count;   /* int32, one element, or absent: columns of x with an outlier */
  float threshold;              /* not negative */
  int32_t b_is_constant;        /* as in fastq_int8_gemm_args */
  void* workspace;              /* as in fastq_int8_gemm_args */
  size_t workspace_size;
  fastq_allocate allocate;
  void* allocate_context;
  void* stream;
} fastq_llm_int8_matmul_args;

FASTQ_API fastq_status fastq_llm_int8_matmul_workspace_size(const fastq_llm_int8_matmul_args* args,
                                                            size_t* bytes);
FASTQ_API fastq_status fastq_llm_int8_matmul(const fastq_llm_int8_matmul_args* args);

/* ---- norm_quant ------------------------------------------------------------------------------
 * h[r,c] = x[r,c], or round_to(x.dtype, x[r,c] + residual[r,c]), which residual_out receives
 * rms:    n[r,c] = h[r,c] / sqrt(mean(h[r,:]^2) + eps)
 * layer:  n[r,c] = (h[r,c] - mean(h[r,:])) / sqrt(mean((h[r,:] - mean(h[r,:]))^2) + eps)
 * y[r,c] = n[r,c] * weight[c] + bias[c]
 *
 * and y is quantised per token as x is by fastq_quantize_per_token: smooth, zero_point, is_static
 * and rotation included. All in float32; the order of sums differs between devices, and with it the
 * last bits of y.
 */
typedef enum fastq_norm { FASTQ_RMS_NORM = 0, FASTQ_LAYER_NORM = 1 } fastq_norm;

typedef struct fastq_norm_quant_args {
  size_t struct_size;
  const fastq_quantize_args* quantize; /* x, and where its norm goes */
  fastq_tensor weight;                 /* (K,) or (1, K), float32 or x's dtype, or absent: 1 */
  fastq_tensor bias;                   /* the same, or absent: 0 */
  fastq_tensor residual;               /* like x, any strides, or absent */
  fastq_tensor residual_out; /* like x; present exactly when residual is. May be residual itself
                                (same data and strides), else apart from it */
  float eps;                 /* not negative */
  int32_t norm;              /* fastq_norm */
} fastq_norm_quant_args;

FASTQ_API fastq_status fastq_norm_quant(const fastq_norm_quant_args* args);

/* ---- activation_quant ------------------------------------------------------------------------
 * y[r,c] = activation(x[r,c]), or activation(x[r,c]) * up[r,c]   (SwiGLU with silu)
 *
 * and y is quantised per token as x is by fastq_quantize_per_token. Activations as fastq_int8_gemm
 * has them, in float32.
 */
typedef struct fastq_activation_quant_args {
  size_t struct_size;
  const fastq_quantize_args* quantize; /* x, and where its activation goes */
  fastq_tensor up;                     /* like x, any strides, or absent */
  int32_t activation;                  /* fastq_activation */
  int32_t reserved;
} fastq_activation_quant_args;

FASTQ_API fastq_status fastq_activation_quant(const fastq_activation_quant_args* args);

/* ---- dequantize ------------------------------------------------------------------------------
 * out[r,c] = round_to(out.dtype, f32(q[r,c]) * scale[r])
 */
typedef struct fastq_dequantize_args {
  size_t struct_size;
  fastq_tensor q;     /* (..., K) int8 */
  fastq_tensor scale; /* float32: a scalar, q.shape[:-1] or that plus (1,) */
  fastq_tensor out;   /* like q; float32, float16 or bfloat16 */
  void* stream;
} fastq_dequantize_args;

FASTQ_API fastq_status fastq_dequantize(const fastq_dequantize_args* args);

/* ---- flash_attention -------------------------------------------------------------------------
 * t[i,j]   = softmax_scale * sum_d q[i,d] * k[j,d]
 * s[i,j]   = t, or softcap * tanh(t / softcap);  minus alibi_slope * |p(i) - j|
 * lse[i]   = log(sum_j exp(s[i,j]))                    over the keys j that query i attends to
 * out[i,d] = sum_j exp(s[i,j] - lse[i]) * v[j,d]
 *
 * for each sequence of the batch and each head. p(i) = i + seqlen_k - seqlen_q is where query i
 * stands among the keys: the last query stands at the last key. With causal it attends to j <=
 * p(i); with has_window, to p(i) - window_left <= j <= p(i) + window_right (a negative size: no
 * bound on that side). A query that attends to nothing has out = 0 and lse = -inf. Sums and
 * exponentials are float32; before the product with v, CUDA rounds exp(s) to q's dtype, and AMX
 * that of bfloat16 inputs. num_heads is a multiple of num_heads_k: query head h reads key head
 * h / (num_heads / num_heads_k).
 *
 * Sequences of one length: q, out (batch, seqlen_q, num_heads, head_dim), k, v (batch, seqlen_k,
 * num_heads_k, head_dim), lse (batch, num_heads, seqlen_q). Packed, with both cu_seqlens: q, out
 * (total_q, num_heads, head_dim), k, v (total_k, num_heads_k, head_dim), lse (num_heads, total_q);
 * sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1], none longer than max_seqlen (a GPU does
 * not look: queries past it are left out). Strides are free but for head_dim's, which is 1.
 * head_dim is at most 256. On a GPU rows that begin at multiples of 16 bytes are read faster.
 *
 * Source: FlashAttention (Dao et al., 2022), FlashAttention-2 (Dao, 2023).
 */
typedef struct fastq_flash_attention_args {
  size_t struct_size;
  fastq_tensor q, k, v;      /* float32 (on a CPU), float16 or bfloat16, all the same */
  fastq_tensor out;          /* like q */
  fastq_tensor lse;          /* float32, natural logarithm, or absent */
  fastq_tensor cu_seqlens_q; /* int32 (batch + 1,), from 0 to at most total_q, never falling */
  fastq_tensor cu_seqlens_k; /* the same for k and v; both or neither */
  fastq_tensor alibi_slopes; /* float32 (num_heads,) or (batch, num_heads), or absent */
  int64_t max_seqlen_q;      /* with cu_seqlens only */
  int64_t max_seqlen_k;
  int64_t window_left; /* with has_window only */
  int64_t window_right;
  int32_t has_window;
  int32_t causal;
  float softmax_scale; /* 0: 1 / sqrt(head_dim) */
  float softcap;       /* 0: none */
  void* workspace;     /* as in fastq_int8_gemm_args */
  size_t workspace_size;
  fastq_allocate allocate;
  void* allocate_context;
  void* stream;
} fastq_flash_attention_args;

FASTQ_API fastq_status fastq_flash_attention_workspace_size(const fastq_flash_attention_args* args,
                                                            size_t* bytes);
FASTQ_API fastq_status fastq_flash_attention(const fastq_flash_attention_args* args);

/* ---- the cache of keys and values ------------------------------------------------------------
 * k, v are (batch, capacity, num_heads_k, head_dim), or pages (num_pages, page_size, num_heads_k,
 * head_dim) with a block_table: token t of sequence b is then token t % page_size of page
 * block_table[b, t / page_size]. page_size is a power of two and at least 16. Strides are free but
 * for head_dim's, which is 1; on a GPU, rows that begin at multiples of 16 bytes are read faster.
 *
 * Their dtype is that of the queries, or int8 with a float32 scale for each token and head: x ~ q *
 * scale, quantised as fastq_quantize_per_token does. Scales are read fastest where those of one
 * head's tokens lie side by side, as in (batch, num_heads_k, capacity) transposed.
 *
 * seqlens are the tokens of each sequence, those of the call at hand included. They and block_table
 * are read on the tensors' device only, so a graph may be replayed with others. A CPU checks them;
 * a GPU leaves out what lies past the cache, and the pages that a sequence uses must exist.
 */
typedef struct fastq_kv_cache {
  size_t struct_size;
  fastq_tensor k, v;
  fastq_tensor k_scale;     /* float32 (batch, capacity, num_heads_k) or (num_pages, page_size, */
  fastq_tensor v_scale;     /* num_heads_k) of an int8 cache; absent otherwise */
  fastq_tensor seqlens;     /* int32 (batch,) */
  fastq_tensor block_table; /* int32 (batch, max_pages) with stride 1 along the pages, or absent */
} fastq_kv_cache;

struct fastq_kv_append_args;

/* ---- flash_decode ----------------------------------------------------------------------------
 * flash_attention of a few queries to a cache: the queries are the last seqlen_q tokens of each
 * sequence, p(i) = i + seqlens[b] - seqlen_q. So with causal, the padding of a prompt that is
 * padded on the left (p(i) < 0) has out = 0 and lse = -inf.
 *
 * Keys are divided among the processors, and the parts combined in a fixed order: the same seqlens
 * give the same bits. With an int8 cache scores are multiplied by k's scale after their sum, and
 * exponentials by v's before theirs.
 *
 * With `append` it is fastq_kv_append of the new tokens first, and then attention of the queries as
 * that rotates them: the same bits as by the two calls. A single sequence with one token takes one
 * kernel on a GPU.
 *
 * Source: Flash-Decoding (Dao et al., 2023).
 */
typedef struct fastq_flash_decode_args {
  size_t struct_size;
  fastq_tensor q; /* (batch, seqlen_q, num_heads, head_dim), dtypes as for flash_attention */
  const fastq_kv_cache* cache;
  fastq_tensor out;          /* like q */
  fastq_tensor lse;          /* float32 (batch, num_heads, seqlen_q), or absent */
  fastq_tensor alibi_slopes; /* float32 (num_heads,) or (batch, num_heads), or absent */
  int64_t window_left;       /* with has_window only */
  int64_t window_right;
  int32_t has_window;
  int32_t causal;
  float softmax_scale; /* 0: 1 / sqrt(head_dim) */
  float softcap;       /* 0: none */
  void* workspace;     /* as in fastq_int8_gemm_args */
  size_t workspace_size;
  fastq_allocate allocate;
  void* allocate_context;
  void* stream;
  /* Or null. Of it k and v, (batch, seqlen_q, num_heads_k, head_dim), and the rotary tables count;
     q and out are absent, cache and stream are those of this struct. The cache is writable. */
  const struct fastq_kv_append_args* append;
} fastq_flash_decode_args;

FASTQ_API fastq_status fastq_flash_decode_workspace_size(const fastq_flash_decode_args* args,
                                                         size_t* bytes);
FASTQ_API fastq_status fastq_flash_decode(const fastq_flash_decode_args* args);

/* ---- kv_append -------------------------------------------------------------------------------
 * Writes new keys and values to a cache: row i of sequence b becomes token t = seqlens[b] -
 * seqlen_new + i. A row whose token is negative (padding on the left) is left out; in `out` it is
 * q's row as it is.
 *
 * With rotary tables the first R = 2 * cos.sizes[1] elements of k, and of q where it is given, are
 * rotated by pairs (x, y) -> (x cos - y sin, y cos + x sin), cos = cos[t, i], sin = sin[t, i]. Pair
 * i is elements i and i + R / 2, or 2 i and 2 i + 1 with rotary_interleaved (as in GPT-J). Products
 * and sums are rounded to float32 one by one, and the result once to q's dtype; an int8 cache
 * quantises the float32 numbers. Tables must reach as far as the sequences. A CPU checks it; on a
 * GPU the positions past them are the last one.
 */
typedef struct fastq_kv_append_args {
  size_t struct_size;
  fastq_tensor k, v; /* (batch, seqlen_new, num_heads_k, head_dim): float32 (on a CPU), float16 or
                        bfloat16, any strides but head_dim's 1 */
  const fastq_kv_cache* cache;
  fastq_tensor rotary_cos; /* (max_seqlen, R / 2), float32 or k's dtype, the same for both; both or
                              neither */
  fastq_tensor rotary_sin;
  fastq_tensor q;   /* (batch, seqlen_new, num_heads, head_dim), to be rotated as k; or absent */
  fastq_tensor out; /* the rotated q: like q, and may be q itself */
  int32_t rotary_interleaved;
  int32_t reserved;
  void* stream;
} fastq_kv_append_args;

FASTQ_API fastq_status fastq_kv_append(const fastq_kv_append_args* args);

#ifdef __cplusplus
}
#endif
#endif /* FASTQ_FASTQ_H_ */
