// A LLaMA in the format "int-quantized" of compressed-tensors, as fastq.save_quantized writes it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "safetensors.hpp"

// The entries of config.json that a decoder layer needs.
struct Config {
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t num_heads;
  int64_t num_heads_k;
  int64_t head_dim;
  float norm_eps;
  double rope_theta;
};

class Checkpoint {
 public:
  // Reads config.json and the headers of the tensors' files. Refuses what DecoderLayer does not
  // compute: another family, biases, scaled rotary embeddings, another quantisation.
  explicit Checkpoint(const std::filesystem::path& folder);

  const Config& config() const { return config_; }
  // Reads a tensor into memory on the host. Each of `sizes` is what the shape must be.
  Tensor read(const std::string& name, const std::vector<int64_t>& sizes) const;

 private:
  Config config_;
  std::vector<SafetensorsFile> files_;
};
