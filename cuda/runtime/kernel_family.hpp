// The families of kernels: mma.sync for Ampere and all that came after it, WGMMA for Hopper.
#pragma once

namespace fastq::cuda {

enum class KernelFamily { kSm80, kSm90 };

inline const char* family_name(KernelFamily family) {
  return family == KernelFamily::kSm90 ? "sm90" : "sm80";
}

}  // namespace fastq::cuda
