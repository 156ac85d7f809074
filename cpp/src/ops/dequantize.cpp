#include "ops/dequantize.hpp"

#include "core/backend.hpp"
#include "ops/checks.hpp"

namespace fastq {

void dequantize(const fastq_dequantize_args& args) {
  const char* op = "dequantize";
  check_struct_size(op, &args, args.struct_size, sizeof(fastq_dequantize_args),
                    sizeof(fastq_dequantize_args));
  const NamedTensor q{"q", &args.q}, scale{"s", &args.scale}, out{"out", &args.out};
  for (const NamedTensor& tensor : {q, scale, out}) check_well_formed(op, tensor);
  check_dtype(op, q, {DType::kInt8});
  check_dtype(op, scale, {DType::kFloat32});
  check_dtype(op, out, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  check_rank(op, q, 1, FASTQ_MAX_RANK);
  check_same_device(op, {q, scale, out});
  check_same_shape(op, out, q);
  const RowStrides scale_rows = row_strides(op, scale, q, true);
  check_output(op, out, {q, scale});
  if (numel(args.q) == 0) return;

  const int last = args.q.rank - 1;
  DequantizeProblem p;
  p.cols = args.q.sizes[last];
  p.stride_qc = args.q.strides[last];
  p.out_dtype = dtype_of(args.out);
  p.stride_oc = args.out.strides[last];
  p.device_index = args.q.device_index;
  p.stream = args.stream;

  const Backend& backend = backend_for(device_of(args.q), op);
  const int64_t* const strides[3] = {args.q.strides, scale_rows.strides, args.out.strides};
  for_each_row_group(last, args.q.sizes, strides,
                     [&](const int64_t* offsets, int64_t group, const int64_t* row_stride) {
                       p.rows = group;
                       p.q = static_cast<const int8_t*>(args.q.data) + offsets[0];
                       p.scale = static_cast<const float*>(args.scale.data) + offsets[1];
                       p.out = static_cast<char*>(args.out.data) +
                               offsets[2] * element_size(p.out_dtype);
                       p.stride_qr = row_stride[0], p.stride_s = row_stride[1];
                       p.stride_or = row_stride[2];
                       backend.dequantize(p);
                     });
}

}  // namespace fastq
