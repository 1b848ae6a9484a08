// Which instruction sets the kernels may use on this machine.
#pragma once

#include <string>
#include <vector>

namespace turbomind::cpu {

// Ordered: each level may use all below it. avx512 needs F, BW, VL, DQ and VNNI (kernels check
// BF16 on their own); amx adds AMX tile, int8 and bf16, with the kernel's permission granted.
enum class Isa { scalar, avx2, avx512, amx };

struct CpuFeatures {
  bool avx2 = false, fma = false, f16c = false, avx_vnni = false;
  bool avx512 = false, avx512_vnni = false, avx512_bf16 = false;
  bool amx_tile = false, amx_int8 = false, amx_bf16 = false;
};

const CpuFeatures& cpu_features();  // read once (CPUID, XCR0, and AMX permission on Linux)
Isa best_isa();
Isa parse_isa(
    const std::string& cap);  // "" → best_isa(); a cap above the machine's best is refused
const char* to_string(Isa isa);
std::vector<std::string> feature_names();
int usable_threads();  // CPUs in the affinity mask, bounded by a cgroup quota where there is one

}  // namespace turbomind::cpu
