#include "linear.hpp"

#include <cstring>
#include <stdexcept>

// Appends a tensor's bytes to those that `end` bytes of `to` hold already.
static void append(const Tensor& to, size_t& end, const Tensor& from, const std::string& name) {
  if (from.dtype() != to.dtype()) {
    throw std::runtime_error(name + " is not " + (to.dtype() == FASTQ_INT8 ? "int8" : "float32") +
                             ", as fastq.save_quantized writes it");
  }
  std::memcpy(static_cast<char*>(to.data()) + end, from.data(), from.bytes());
  end += from.bytes();
}

Linear::Linear(const Checkpoint& checkpoint,
               const std::vector<std::pair<std::string, int64_t>>& parts, int64_t in_features,
               fastq::Device device) {
  int64_t out_features = 0;
  for (const auto& part : parts) out_features += part.second;
  data_ = Tensor(FASTQ_INT8, {out_features, in_features});
  scale_ = Tensor(FASTQ_FLOAT32, {out_features});
  size_t data_end = 0, scale_end = 0;
  for (const auto& [name, rows] : parts) {
    const std::string weight = name + ".weight", scale = name + ".weight_scale";
    append(data_, data_end, checkpoint.read(weight, {rows, in_features}), weight);
    append(scale_, scale_end, checkpoint.read(scale, {rows, 1}), scale);
  }

  if (device.type == FASTQ_CPU) {
    const fastq_weight plain = fastq::weight(fastq::transposed(data_.view()));
    const auto bytes = static_cast<int64_t>(fastq::pack_weight_size(plain));
    const Tensor packed(FASTQ_UINT8, {bytes});
    fastq::pack_weight(plain, packed.view());
    data_ = packed;
    weight_ = fastq::packed_weight(data_.view(), in_features, out_features, scale_.view());
  } else {
    data_ = data_.to(device);
    scale_ = scale_.to(device);
    weight_ = fastq::weight(fastq::transposed(data_.view()), scale_.view());
  }
}

void Linear::operator()(const fastq_tensor& q, const fastq_tensor& scale, const fastq_tensor& out,
                        Workspace& workspace, const fastq_tensor& residual) const {
  fastq_int8_gemm_args args = fastq::int8_gemm_args(q, weight_, scale, out);
  args.residual = residual;
  args.b_is_constant = 1;  // nothing in the stream writes a weight
  const size_t bytes = fastq::int8_gemm_workspace_size(args);
  fastq::int8_gemm(args, workspace.at_least(bytes), bytes);
}
