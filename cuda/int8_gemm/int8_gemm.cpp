#include "int8_gemm/int8_gemm.hpp"

#include <cstdlib>
#include <vector>

#include "core/error.hpp"
#include "int8_gemm/gather_outliers.hpp"
#include "int8_gemm/int8_gemm_config.hpp"
#include "int8_gemm/int8_gemm_kernels.hpp"
#include "int8_gemm/int8_gemm_tuning.hpp"
#include "int8_gemm/relayout.hpp"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

std::vector<GemmKernel>& kernels() {
  static std::vector<GemmKernel> list;
  return list;
}

GemmDevice gemm_device(const DeviceProps& props) {
  return {props.cc_major, props.cc_minor, props.sm_count, built_for_sm90a(),
          props.shared_memory_per_sm};
}

void check_sizes(const Int8GemmProblem& p) {
  if (p.M > INT32_MAX || p.N > INT32_MAX) {
    not_implemented("int8_gemm: M = " + std::to_string(p.M) + ", N = " + std::to_string(p.N) +
                    ", expected at most 2147483647 each on CUDA");
  }
}

// Read at the first product. A table that cannot be read is an error of this one and of the next.
const TuningTable& tuning_table() {
  static const TuningTable table =
      load_tuning_table(std::getenv("FASTQ_TUNING_TABLE"), shipped_tuning_table());
  return table;
}

// FASTQ_KERNELS names a family, or a whole configuration as config_name writes it; where it is set,
// no tuning table has a say.
GemmChoice choose(const Int8GemmProblem& p) {
  check_sizes(p);
  const GemmDevice device = gemm_device(device_props(p.device_index));
  const GemmShape shape = gemm_shape(p);
  const char* forced = std::getenv("FASTQ_KERNELS");
  if (forced == nullptr || *forced == '\0') return select_config(shape, device, tuning_table());

  const std::string name = forced;
  GemmConfig config;
  const bool whole = name != "sm80" && name != "sm90";
  if (whole && !parse_config(name, config)) {
    invalid_value("FASTQ_KERNELS is " + name +
                  ", expected sm80, sm90 or a configuration such as sm90/128x128x128_pingpong");
  }
  const bool sm80 = name == "sm80" || (whole && config.family == KernelFamily::kSm80);
  GemmChoice choice = select_config(shape, device, sm80);
  if (!sm80 && choice.config.family != KernelFamily::kSm90) {
    not_implemented("int8_gemm: FASTQ_KERNELS=" + name + ", but " + choice.reason);
  }
  if (whole) {
    const char* problem = config_problem(config, shape);
    if (*problem != '\0') {
      not_implemented("int8_gemm: FASTQ_KERNELS=" + name + ", but " + problem);
    }
    choice.take(config, shape);
  }
  return choice;
}

[[maybe_unused]] const bool registered = register_loader([](const DeviceProps& props) {
  for (const GemmKernel& kernel : kernels()) {
    if (kernel.family == KernelFamily::kSm80 || props.cc_major == 9) kernel.load();
  }
});

}  // namespace

bool register_gemm_kernel(const GemmKernel& kernel) {
  kernels().push_back(kernel);
  return true;
}

const GemmKernel* find_gemm_kernel(KernelFamily family, const TileConfig& tile) {
  for (const GemmKernel& kernel : kernels()) {
    if (kernel.family == family && kernel.tile == tile) return &kernel;
  }
  return nullptr;
}

size_t int8_gemm_workspace_size(const Int8GemmProblem& p) { return choose(p).workspace_size(); }

void int8_gemm(const Int8GemmProblem& p, Workspace& workspace) {
  const GemmChoice choice = choose(p);
  const GemmKernel* kernel = find_gemm_kernel(choice.config.family, choice.config.tile);
  if (kernel == nullptr) {
    not_implemented("int8_gemm: this build holds no instance " + config_name(choice.config));
  }
  const DeviceGuard guard(p.device_index);
  const DeviceProps& props = device_props(p.device_index);
  const auto stream = static_cast<cudaStream_t>(p.stream);

  // TMA wants a row stride even where there is one row.
  const int64_t padded_k = round_up(p.K, 16);
  GemmLaunch launch{&p,
                    &choice.config,
                    p.a,
                    p.M == 1 ? padded_k : p.stride_am,
                    p.b,
                    p.N == 1 ? padded_k : p.stride_bn,
                    p.b_is_constant && !choice.relayout_b,
                    &props,
                    stream};
  auto* space = static_cast<int8_t*>(workspace.get("int8_gemm", choice.workspace_size()));
  if (choice.relayout_a) {
    relayout(p.a, p.stride_am, p.stride_ak, p.M, p.K, space, padded_k, stream);
    launch.a = space, launch.ld_a = padded_k;
    space += choice.relayout_a_bytes;
  }
  if (choice.relayout_b) {
    relayout(p.b, p.stride_bn, p.stride_bk, p.N, p.K, space, padded_k, stream);
    launch.b = space, launch.ld_b = padded_k;
    space += choice.relayout_b_bytes;
  }
  launch.partial_sums = reinterpret_cast<int32_t*>(space);
  if (p.outliers != nullptr && choice.config.family == KernelFamily::kSm80) gather_outliers(p);
  kernel->launch(launch);
}

std::string int8_gemm_describe(const Int8GemmProblem& p) {
  const GemmChoice choice = choose(p);
  std::string text = "cuda/" + config_name(choice.config);
  if (choice.relayout_a) text += "+relayout_a";
  if (choice.relayout_b) text += "+relayout_b";
  if (*choice.reason != '\0') text += std::string(" (") + choice.reason + ")";
  return text;
}

std::vector<std::string> int8_gemm_candidates(const Int8GemmProblem& p) {
  check_sizes(p);
  std::vector<std::string> names;
  const GemmDevice device = gemm_device(device_props(p.device_index));
  for (const GemmConfig& config : candidate_configs(gemm_shape(p), device)) {
    names.push_back(config_name(config));
  }
  return names;
}

std::vector<std::string> int8_gemm_instances() {
  std::vector<std::string> names;
  for (const GemmKernel& kernel : kernels()) {
    GemmConfig config;
    config.family = kernel.family;
    config.tile = kernel.tile;
    names.push_back(config_name(config));
  }
  return names;
}

}  // namespace fastq::cuda
