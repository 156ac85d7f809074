// The instruction sets of the CPU backend, found at run time.
#pragma once

#include <string>

namespace fastq::cpu {

enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512Vnni = 2, kAmx = 3, kNeon = 4 };

const char* isa_name(Isa isa);

// Whether the processor and the operating system offer it. For AMX the process asks the kernel for
// the tile registers once.
bool isa_supported(Isa isa);

// The best supported one, or the one FASTQ_CPU_ISA names (read at each call). Throws when that
// value is unknown, or names what this machine does not offer.
Isa active_isa();

// The supported ones as a JSON array, the plainest first.
std::string supported_isas_json();

}  // namespace fastq::cpu
