// Files of tensors by name: https://huggingface.co/docs/safetensors. Little-endian machines only.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tensor.hpp"

class SafetensorsFile {
 public:
  // Reads the header alone.
  explicit SafetensorsFile(const std::filesystem::path& path);

  bool contains(const std::string& name) const { return entries_.count(name) != 0; }
  // Reads one tensor into memory on the host.
  Tensor read(const std::string& name) const;

 private:
  struct Entry {
    std::string dtype;  // as the format has it, "BF16"
    std::vector<int64_t> shape;
    uint64_t begin, end;  // bytes from the beginning of the file
  };

  std::filesystem::path path_;
  std::map<std::string, Entry> entries_;
};

// Tensors are on the host.
void write_safetensors(const std::filesystem::path& path,
                       const std::vector<std::pair<std::string, Tensor>>& tensors);
