// A C++ program on the installed libfastq: quantises float operands and multiplies them. Prints the
// product, one row a line; the test computes the same product with NumPy.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

#include <fastq/fastq.hpp>

int main() try {
  constexpr int64_t M = 4, N = 6, K = 50;
  std::vector<float> x(M * K), w(N * K);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 29 % 101) / 16 - 3;
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(i * 53 % 97) / 64 - 0.75f;

  std::vector<int8_t> qx(M * K), qw(N * K);
  std::vector<float> scale_x(M), scale_w(N), out(M * N);
  const auto view_qx = fastq::tensor_view(qx.data(), {M, K});
  const auto view_qw = fastq::tensor_view(qw.data(), {N, K});
  const auto view_sx = fastq::tensor_view(scale_x.data(), {M});
  const auto view_sw = fastq::tensor_view(scale_w.data(), {N});
  fastq::quantize_per_token(fastq::tensor_view(x.data(), {M, K}), view_qx, view_sx);
  fastq::quantize_per_channel(fastq::tensor_view(w.data(), {N, K}), view_qw, view_sw);

  const fastq_weight weight = fastq::weight(fastq::transposed(view_qw), view_sw);
  auto args =
      fastq::int8_gemm_args(view_qx, weight, view_sx, fastq::tensor_view(out.data(), {M, N}));
  size_t size = fastq::int8_gemm_workspace_size(args);
  size_t space = size + 256;
  std::vector<unsigned char> block(space);
  void* workspace = block.data();
  if (!std::align(256, size, workspace, space)) return 1;
  fastq::int8_gemm(args, workspace, size);

  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) std::printf(n ? " %.9g" : "%.9g", double{out[m * N + n]});
    std::printf("\n");
  }

  args.out.dtype = FASTQ_UINT8;
  try {
    fastq::int8_gemm(args, workspace, size);
  } catch (const fastq::Exception& error) {
    std::printf("error: %s\n", error.what());
    return error.status() == FASTQ_INVALID_TYPE ? 0 : 1;
  }
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
