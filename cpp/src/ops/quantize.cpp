#include "ops/quantize.hpp"

#include "core/backend.hpp"
#include "core/error.hpp"
#include "ops/checks.hpp"

namespace fastq {
namespace {

void quantize(const char* op, const char* x_name, const fastq_quantize_args& args, int min_rank,
              int max_rank) {
  check_struct_size(op, &args, args.struct_size, sizeof(fastq_quantize_args),
                    sizeof(fastq_quantize_args));
  const NamedTensor x{x_name, &args.x}, q{"q", &args.q}, scale{"scale", &args.scale};
  for (const NamedTensor& tensor : {x, q, scale}) check_well_formed(op, tensor);
  check_dtype(op, x, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  check_dtype(op, q, {DType::kInt8});
  check_dtype(op, scale, {DType::kFloat32});
  check_rank(op, x, min_rank, max_rank);
  check_same_device(op, {x, q, scale});
  check_same_shape(op, q, x);
  const RowStrides scale_rows = row_strides(op, scale, x, false);
  check_output(op, q, {x, scale});
  check_output(op, scale, {x});

  const int last = args.x.rank - 1;
  QuantizeProblem p;
  p.cols = args.x.sizes[last];
  p.x_dtype = dtype_of(args.x);
  p.stride_xc = args.x.strides[last];
  p.stride_qc = args.q.strides[last];
  p.device_index = args.x.device_index;
  p.stream = args.stream;
  int64_t rows = 1;
  for (int i = 0; i < last; ++i) rows *= args.x.sizes[i];
  if (rows == 0) return;

  const Backend& backend = backend_for(device_of(args.x), op);
  const int64_t* const strides[3] = {args.x.strides, args.q.strides, scale_rows.strides};
  for_each_row_group(last, args.x.sizes, strides,
                     [&](const int64_t* offsets, int64_t group, const int64_t* row_stride) {
                       p.rows = group;
                       p.x = static_cast<const char*>(args.x.data) +
                             offsets[0] * element_size(p.x_dtype);
                       p.q = static_cast<int8_t*>(args.q.data) + offsets[1];
                       p.scale = static_cast<float*>(args.scale.data) + offsets[2];
                       p.stride_xr = row_stride[0], p.stride_qr = row_stride[1];
                       p.stride_s = row_stride[2];
                       backend.quantize(p);
                     });
}

}  // namespace

void quantize_per_token(const fastq_quantize_args& args) {
  quantize("quantize_per_token", "x", args, 1, FASTQ_MAX_RANK);
}

void quantize_per_channel(const fastq_quantize_args& args) {
  quantize("quantize_per_channel", "w", args, 2, 2);
}

}  // namespace fastq
