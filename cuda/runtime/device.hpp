// Devices, errors and the current device: what every CUDA op needs from the runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace fastq::cuda {

// Throws the CUDA message, with what was being done; explains the cases that a user can mend.
void check(cudaError_t error, const char* doing);

constexpr int kMaxDevices = 64;

struct DeviceProps {
  int cc_major = 0, cc_minor = 0;
  int sm_count = 0;
  int shared_memory_per_block = 0;  // the most a block may opt in to, bytes
  int shared_memory_per_sm = 0;
  int l2_bytes = 0;
  double memory_bytes_per_cycle = 0;  // of a multiprocessor's clock, all multiprocessors together
  std::string name;
  int index = 0;
};

// Read once per device. The first call initialises CUDA.
const DeviceProps& device_props(int device);

// Kernels are loaded lazily by the runtime, and must not be while a graph is captured. So each file
// of kernels registers how its own are loaded (from a static initialiser), and the first op on a
// device loads them all.
bool register_loader(void (*load)(const DeviceProps&));
// The result is the architecture that the kernel's code was compiled for, such as 90: lower than
// the device's where the driver compiled it from PTX.
int load_kernel(const void* kernel);

// Makes `device` current for a scope; the first scope on a device loads every kernel there.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0, device_ = 0;
};

// The architectures this build has code for, "80,90a".
std::string built_archs();
bool built_for_sm90a();

// A JSON object for fastq_describe.
std::string describe();

}  // namespace fastq::cuda
