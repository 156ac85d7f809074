#include "ops/quantize.hpp"

#include <cstddef>

#include "core/backend.hpp"
#include "core/error.hpp"
#include "ops/checks.hpp"

namespace fastq {
namespace {

constexpr int kMaxRotation = 32;
// The size of the struct in fastq 0.1.
constexpr size_t kLeastArgs = offsetof(fastq_quantize_args, rotation);

void check_rotation(const char* op, const NamedTensor& x, int rotation) {
  if (rotation == 0) return;
  if (rotation < 2 || rotation > kMaxRotation || (rotation & (rotation - 1)) != 0) {
    invalid_value(std::string(op) + ": rotation is " + std::to_string(rotation) +
                  ", expected 0, 2, 4, 8, 16 or 32");
  }
  if (x.view->sizes[x.view->rank - 1] % rotation != 0) {
    invalid_value(
        std::string(op) + ": " + x.name + " has shape " + shape_text(*x.view) +
        ", expected a last size that is a multiple of rotation = " + std::to_string(rotation));
  }
}

void quantize(const char* op, const char* x_name, const fastq_quantize_args& caller, int min_rank,
              int max_rank) {
  fastq_quantize_args space;
  const fastq_quantize_args& args = known_struct(op, caller, kLeastArgs, space);
  const NamedTensor x{x_name, &args.x}, q{"q", &args.q}, scale{"scale", &args.scale};
  for (const NamedTensor& tensor : {x, q, scale}) check_well_formed(op, tensor);
  check_dtype(op, x, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  check_dtype(op, q, {DType::kInt8});
  check_dtype(op, scale, {DType::kFloat32});
  check_rank(op, x, min_rank, max_rank);
  check_same_device(op, {x, q, scale});
  check_same_shape(op, q, x);
  check_rotation(op, x, args.rotation);
  const RowStrides scale_rows = row_strides(op, scale, x, false);
  check_output(op, q, {x, scale});
  check_output(op, scale, {x});

  const int last = args.x.rank - 1;
  QuantizeProblem p;
  p.cols = args.x.sizes[last];
  p.x_dtype = dtype_of(args.x);
  p.stride_xc = args.x.strides[last];
  p.stride_qc = args.q.strides[last];
  p.rotation = args.rotation;
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
