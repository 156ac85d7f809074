#include "runtime/device.hpp"

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <vector>

#include "core/error.hpp"

namespace fastq::cuda {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string explain(cudaError_t error) {
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    return "; fastq was built with CUDA " + version_text(runtime) + " and the driver " +
           (driver == 0 ? std::string("is absent")
                        : "supports up to CUDA " + version_text(driver)) +
           ": update the NVIDIA driver, or rebuild fastq with an older CUDA toolkit";
  }
  if (error == cudaErrorNoKernelImageForDevice) {
    int device = 0;
    cudaGetDevice(&device);
    std::string found = "this GPU";
    cudaDeviceProp props;
    if (cudaGetDeviceProperties(&props, device) == cudaSuccess) {
      found = std::string(props.name) + " (" + std::to_string(props.major) + "." +
              std::to_string(props.minor) + ")";
    }
    return "; this build of fastq has code for " + built_archs() + " and the device is " + found +
           ": rebuild it there with FASTQ_CUDA=ON pip install --force-reinstall --no-deps .";
  }
  return "";
}

DeviceProps read_props(int device) {
  DeviceProps props;
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "reading a device attribute");
    return value;
  };
  props.cc_major = attribute(cudaDevAttrComputeCapabilityMajor);
  props.cc_minor = attribute(cudaDevAttrComputeCapabilityMinor);
  props.sm_count = attribute(cudaDevAttrMultiProcessorCount);
  props.shared_memory_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  props.shared_memory_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  props.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  const double bus_bytes = attribute(cudaDevAttrGlobalMemoryBusWidth) / 8.0;
  props.memory_bytes_per_cycle = 2 * bus_bytes * attribute(cudaDevAttrMemoryClockRate) /
                                 std::max(attribute(cudaDevAttrClockRate), 1);
  cudaDeviceProp full;
  check(cudaGetDeviceProperties(&full, device), "reading the device properties");
  props.name = full.name;
  props.index = device;
  return props;
}

std::vector<void (*)(const DeviceProps&)>& loaders() {
  static std::vector<void (*)(const DeviceProps&)> list;
  return list;
}

// The current device is `device`. A capture that is under way on this thread does not forbid what
// loading needs as long as it is told so.
void load_all_once(int device, const DeviceProps& props) {
  static std::array<std::once_flag, kMaxDevices> once;
  std::call_once(once[device], [&props] {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "relaxing the capture mode");
    for (const auto load : loaders()) load(props);
    check(cudaThreadExchangeStreamCaptureMode(&mode), "restoring the capture mode");
  });
}

std::string json_string(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return quoted + "\"";
}

}  // namespace

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is reported here is not found again by the next call
  runtime_error(std::string("CUDA: ") + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
                ") while " + doing + explain(error));
}

const DeviceProps& device_props(int device) {
  static std::array<std::unique_ptr<DeviceProps>, kMaxDevices> props;
  static std::array<std::once_flag, kMaxDevices> once;
  if (device < 0 || device >= kMaxDevices) {
    invalid_value("the device index is " + std::to_string(device) + ", expected 0 to " +
                  std::to_string(kMaxDevices - 1));
  }
  std::call_once(once[device],
                 [&] { props[device] = std::make_unique<DeviceProps>(read_props(device)); });
  return *props[device];
}

bool register_loader(void (*load)(const DeviceProps&)) {
  loaders().push_back(load);
  return true;
}

int load_kernel(const void* kernel) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "loading a kernel");
  return attributes.ptxVersion;
}

DeviceGuard::DeviceGuard(int device) : device_(device) {
  const DeviceProps& props = device_props(device);
  check(cudaGetDevice(&previous_), "reading the current device");
  if (previous_ != device_) check(cudaSetDevice(device_), "selecting the tensors' device");
  try {
    load_all_once(device, props);
  } catch (...) {
    if (previous_ != device_) cudaSetDevice(previous_);  // no destructor runs
    throw;
  }
}

DeviceGuard::~DeviceGuard() {
  if (previous_ != device_) cudaSetDevice(previous_);
}

std::string built_archs() { return FASTQ_CUDA_ARCHS; }

bool built_for_sm90a() { return built_archs().find("90a") != std::string::npos; }

std::string describe() {
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  std::string json =
      "{\"archs\":" + json_string(built_archs()) + ",\"runtime\":\"" + version_text(runtime) +
      "\",\"driver\":" + (driver == 0 ? "null" : "\"" + version_text(driver) + "\"") +
      ",\"cutlass\":\"" FASTQ_CUTLASS_VERSION "\",\"devices\":[";
  for (int i = 0; error == cudaSuccess && i < count; ++i) {
    const DeviceProps& props = device_props(i);
    json += std::string(i > 0 ? "," : "") + "{\"name\":" + json_string(props.name) +
            ",\"compute_capability\":\"" + std::to_string(props.cc_major) + "." +
            std::to_string(props.cc_minor) + "\",\"sm_count\":" + std::to_string(props.sm_count) +
            ",\"l2_bytes\":" + std::to_string(props.l2_bytes) + "}";
  }
  return json + "],\"reason\":" +
         (error == cudaSuccess ? "null" : json_string(cudaGetErrorString(error))) + "}";
}

}  // namespace fastq::cuda
