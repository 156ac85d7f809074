#include "cpu/isa.hpp"

#include <cstdlib>
#include <cstring>

#include "core/error.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fastq::cpu {
namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni, Isa::kAmx, Isa::kNeon};

#if defined(__x86_64__)

// The register states that the operating system saves (XCR0).
unsigned long long enabled_states() {
  unsigned eax = 0, edx = 0;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (static_cast<unsigned long long>(edx) << 32) | eax;
}

// Linux hands the tile registers to a process only on request.
bool request_tile_data() {
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

Isa detect() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Isa::kScalar;
  const bool osxsave = ecx & bit_OSXSAVE;
  const bool f16c = ecx & bit_F16C, fma = ecx & bit_FMA;
  if (!osxsave || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Isa::kScalar;

  const unsigned long long states = enabled_states();
  constexpr unsigned long long kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  if ((states & kYmm) != kYmm || !f16c || !fma || !(ebx & bit_AVX2)) return Isa::kScalar;

  constexpr unsigned kAvx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if ((states & kZmm) != kZmm || (ebx & kAvx512) != kAvx512 || !(ecx & bit_AVX512VNNI)) {
    return Isa::kAvx2;
  }
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  constexpr unsigned kAmx = kAmxBf16 | kAmxTile | kAmxInt8, kAvx512Bf16 = 1u << 5;
  const bool has_tiles = (edx & kAmx) == kAmx && (states & kTiles) == kTiles;
  const bool amx =
      has_tiles && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvx512Bf16);
  return amx && request_tile_data() ? Isa::kAmx : Isa::kAvx512Vnni;
}

#elif defined(__aarch64__) && defined(__linux__)

Isa detect() {
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProduct ? Isa::kNeon : Isa::kScalar;
}

#else

Isa detect() { return Isa::kScalar; }

#endif

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512Vnni:
      return "avx512vnni";
    case Isa::kAmx:
      return "amx";
    case Isa::kNeon:
      return "neon";
  }
  return "unknown";
}

// Each instruction set of x86-64 implies the ones before it.
bool isa_supported(Isa isa) {
  if (isa == Isa::kScalar || isa == best_isa()) return true;
  return isa != Isa::kNeon && best_isa() != Isa::kNeon && isa < best_isa();
}

Isa active_isa() {
  const char* forced = std::getenv("FASTQ_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return best_isa();
  for (Isa isa : kAll) {
    if (std::strcmp(forced, isa_name(isa)) != 0) continue;
    if (isa_supported(isa)) return isa;
    not_implemented(std::string("FASTQ_CPU_ISA=") + forced +
                    ": this machine does not offer it; it offers " + supported_isas_json());
  }
  invalid_value(
      std::string("FASTQ_CPU_ISA: expected scalar, avx2, avx512vnni, amx or neon, got '") + forced +
      "'");
}

std::string supported_isas_json() {
  std::string json = "[";
  for (Isa isa : kAll) {
    if (!isa_supported(isa)) continue;
    if (json.size() > 1) json += ",";
    json += std::string("\"") + isa_name(isa) + "\"";
  }
  return json + "]";
}

}  // namespace fastq::cpu
