#include "core/backend.hpp"

#include <array>

#include "core/error.hpp"

namespace fastq {
namespace {

// A function-local static: backends register from static initialisers of other files, in no order.
std::array<const Backend*, 2>& table() {
  static std::array<const Backend*, 2> backends{};
  return backends;
}

}  // namespace

void* Workspace::get(const char* op, size_t bytes) {
  if (bytes <= size_) return data_;
  if (allocate_ != nullptr) {
    data_ = allocate_(context_, bytes);
    if (data_ == nullptr) {
      runtime_error(std::string(op) + ": the caller's allocator gave no workspace of " +
                    std::to_string(bytes) + " bytes");
    }
    size_ = bytes;
    return data_;
  }
  invalid_value(std::string(op) + ": workspace holds " + std::to_string(size_) +
                " bytes, expected at least " + std::to_string(bytes));
}

bool register_backend(DeviceType device, const Backend& backend) {
  table()[static_cast<size_t>(device)] = &backend;
  return true;
}

const Backend* find_backend(DeviceType device) {
  const auto index = static_cast<size_t>(device);
  return index < table().size() ? table()[index] : nullptr;
}

const Backend& backend_for(DeviceType device, const char* op) {
  if (const Backend* backend = find_backend(device)) return *backend;
  not_implemented(
      std::string(op) +
      ": the tensors are on a CUDA device, and this build of fastq holds the CPU backend "
      "only; rebuild it where a CUDA compiler is at hand: FASTQ_CUDA=ON pip install "
      "--force-reinstall --no-deps .");
}

}  // namespace fastq
