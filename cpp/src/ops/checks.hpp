// The checks that several ops share. Each names the op, the argument, what was expected, what came.
#pragma once

#include <cstring>
#include <initializer_list>
#include <string>

#include "core/problem.hpp"
#include "core/tensor.hpp"

namespace fastq {

struct NamedTensor {
  const char* name;
  const TensorView* view;
};

// Rank, sizes, dtype and device of a view that came from outside are within what the ABI allows.
void check_well_formed(const char* op, const NamedTensor& tensor);
void check_dtype(const char* op, const NamedTensor& tensor, std::initializer_list<DType> allowed);
void check_rank(const char* op, const NamedTensor& tensor, int at_least, int at_most);
void check_same_device(const char* op, std::initializer_list<NamedTensor> tensors);
void check_same_shape(const char* op, const NamedTensor& tensor, const NamedTensor& like);
[[noreturn]] void wrong_shape(const char* op, const NamedTensor& tensor,
                              const std::string& expected);

// Writable, no element written twice, and no byte shared with an input.
void check_output(const char* op, const NamedTensor& out,
                  std::initializer_list<NamedTensor> inputs);

// Strides of a per-row vector along the leading dimensions of `rows` (a tensor (..., cols)):
// `scale` may be a scalar, rows.shape[:-1], that plus (1,), or flat (R,) or (R, 1) with R the
// product of the leading dimensions. strides[i] belongs to rows' dimension i.
struct RowStrides {
  int64_t strides[FASTQ_MAX_RANK];
};
RowStrides row_strides(const char* op, const NamedTensor& scale, const NamedTensor& rows,
                       bool scalar_allowed);

// A vector along `length`: a scalar (when allowed), (length,) or (1, length).
VectorView column_vector(const char* op, const NamedTensor& vector, int64_t length,
                         const char* length_name, bool scalar_allowed);

// Throws when a struct is shorter than its first version (`least`), or longer than ours (`known`)
// with something in the part that this library does not know.
void check_struct_size(const char* op, const void* args, size_t got, size_t least, size_t known);

// `args` with every field that this library knows: a shorter struct is completed in `space`.
template <class Args>
const Args& known_struct(const char* op, const Args& args, size_t least, Args& space) {
  check_struct_size(op, &args, args.struct_size, least, sizeof(Args));
  if (args.struct_size >= sizeof(Args)) return args;
  space = {};
  std::memcpy(&space, &args, args.struct_size);
  return space;
}

// Calls visit(offsets, rows, row_strides) for every group of rows of a (..., cols) tensor that has
// one stride in each of `count` operands: leading dimensions are folded into one where every
// operand's strides allow, and walked otherwise. leading_strides[o][i] is operand o's stride along
// leading dimension i.
template <int kCount, class Visit>
void for_each_row_group(int leading, const int64_t* sizes,
                        const int64_t* const (&leading_strides)[kCount], const Visit& visit) {
  int64_t fold_size = 1;
  int64_t fold_stride[kCount] = {};
  int outer = leading;  // dimensions [outer, leading) are folded
  while (outer > 0) {
    const int i = outer - 1;
    if (sizes[i] != 1) {
      bool folds = true;
      for (int o = 0; o < kCount && fold_size > 1; ++o) {
        folds = folds && leading_strides[o][i] == fold_stride[o] * fold_size;
      }
      if (!folds) break;
      if (fold_size == 1) {
        for (int o = 0; o < kCount; ++o) fold_stride[o] = leading_strides[o][i];
      }
      fold_size *= sizes[i];
    }
    --outer;
  }
  int64_t index[FASTQ_MAX_RANK] = {};
  int64_t offsets[kCount] = {};
  for (;;) {
    visit(offsets, fold_size, fold_stride);
    int i = outer - 1;
    for (; i >= 0; --i) {
      for (int o = 0; o < kCount; ++o) offsets[o] += leading_strides[o][i];
      if (++index[i] < sizes[i]) break;
      for (int o = 0; o < kCount; ++o) offsets[o] -= leading_strides[o][i] * sizes[i];
      index[i] = 0;
    }
    if (i < 0) return;
  }
}

}  // namespace fastq
