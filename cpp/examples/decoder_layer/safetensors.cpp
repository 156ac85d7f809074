#include "safetensors.hpp"

#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

using nlohmann::json;

static const std::map<std::string, fastq_dtype> kDtypes = {
    {"F32", FASTQ_FLOAT32}, {"F16", FASTQ_FLOAT16}, {"BF16", FASTQ_BFLOAT16},
    {"I8", FASTQ_INT8},     {"I32", FASTQ_INT32},   {"U8", FASTQ_UINT8},
};

// A file is the header's size in 8 bytes, the header, which is JSON, and the tensors' bytes.
SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : path_(path) {
  std::ifstream file(path, std::ios::binary);
  uint64_t header_size = 0;
  const uint64_t file_size = file ? std::filesystem::file_size(path) : 0;
  if (!file.read(reinterpret_cast<char*>(&header_size), 8) || header_size > file_size - 8) {
    throw std::runtime_error(path.string() + ": no safetensors file, or not all of it");
  }
  std::string text(header_size, '\0');
  file.read(text.data(), static_cast<std::streamsize>(header_size));
  const json header = json::parse(text);
  const uint64_t data = 8 + header_size;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const json& offsets = entry.at("data_offsets");
    const auto begin = offsets.at(0).get<uint64_t>(), end = offsets.at(1).get<uint64_t>();
    if (begin > end || end > file_size - data) {
      throw std::runtime_error(path.string() + ": " + name + " lies outside of the file");
    }
    entries_[name] = {entry.at("dtype"), entry.at("shape"), data + begin, data + end};
  }
}

Tensor SafetensorsFile::read(const std::string& name) const {
  const std::string where = path_.string() + ": " + name;
  const auto found = entries_.find(name);
  if (found == entries_.end()) throw std::runtime_error(where + ": no such tensor");
  const Entry& entry = found->second;
  const auto dtype = kDtypes.find(entry.dtype);
  if (dtype == kDtypes.end()) throw std::runtime_error(where + " is " + entry.dtype);

  // What the shape takes is compared before it is multiplied out: it may overflow.
  const auto size = static_cast<int64_t>(entry.end - entry.begin);
  auto expected = static_cast<int64_t>(element_size(dtype->second));
  for (const int64_t n : entry.shape) {
    if (n < 0 || (n > 0 && expected > size / n)) expected = -1;
    if (expected < 0) break;
    expected *= n;
  }
  if (expected != size) throw std::runtime_error(where + ": its shape and its size differ");

  Tensor tensor(dtype->second, entry.shape);
  std::ifstream file(path_, std::ios::binary);
  file.seekg(static_cast<std::streamoff>(entry.begin));
  if (!file.read(static_cast<char*>(tensor.data()), size)) {
    throw std::runtime_error(where + " cannot be read");
  }
  return tensor;
}

void write_safetensors(const std::filesystem::path& path,
                       const std::vector<std::pair<std::string, Tensor>>& tensors) {
  json header;
  size_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    json& entry = header[name];
    for (const auto& [dtype, value] : kDtypes) {
      if (value == tensor.dtype()) entry["dtype"] = dtype;
    }
    entry["shape"] = tensor.sizes();
    entry["data_offsets"] = {offset, offset + tensor.bytes()};
    offset += tensor.bytes();
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the tensors begin aligned
  const uint64_t header_size = text.size();

  std::ofstream file;
  file.exceptions(std::ios::failbit | std::ios::badbit);
  file.open(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&header_size), 8);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  for (const auto& [name, tensor] : tensors) {
    file.write(static_cast<const char*>(tensor.data()),
               static_cast<std::streamsize>(tensor.bytes()));
  }
}
