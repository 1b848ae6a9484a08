// Reads CPUID once and decides which kernels may run. Owns the AMX permission request (Linux wants
// it before the first tile instruction) and the count of CPUs this process may really use.
#include "backend/cpu/isa.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <thread>

#include "base/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace turbomind::cpu {
namespace {

#if defined(__x86_64__)
uint64_t enabled_states() {  // XCR0: which register files the system saves
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}
#endif

#if defined(__x86_64__) && defined(__linux__)
// The kernel enables tile data per process on request; it refuses where a signal stack is too
// small.
bool request_amx() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#elif defined(__x86_64__)
bool request_amx() { return false; }
#endif

CpuFeatures detect() {
  CpuFeatures f;
#if defined(__x86_64__)
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c & (1U << 27);
  if (!osxsave) return f;
  const uint64_t states = enabled_states();
  const bool ymm = (states & 0x6) == 0x6;
  const bool zmm = (states & 0xe6) == 0xe6;
  const bool tiles = (states & 0x60000) == 0x60000;
  const bool avx = c & (1U << 28);
  if (!ymm || !avx) return f;
  f.fma = c & (1U << 12);
  f.f16c = c & (1U << 29);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const uint32_t leaves = a;
  f.avx2 = b & (1U << 5);
  const bool avx512 = (b & (1U << 16)) && (b & (1U << 17)) && (b & (1U << 30)) && (b & (1U << 31));
  f.avx512 = zmm && avx512;
  f.avx512_vnni = f.avx512 && (c & (1U << 11));
  const bool amx_tile = d & (1U << 24);
  const bool amx_int8 = d & (1U << 25);
  const bool amx_bf16 = d & (1U << 22);
  if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    f.avx_vnni = f.avx2 && (a & (1U << 4));
    f.avx512_bf16 = f.avx512 && (a & (1U << 5));
  }
  if (tiles && amx_tile && request_amx()) {
    f.amx_tile = true;
    f.amx_int8 = amx_int8;
    f.amx_bf16 = amx_bf16;
  }
#endif
  return f;
}

#if defined(__linux__)
// CPUs granted by a cgroup quota, rounded up; 0 where there is none.
int cgroup_cpus() {
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2) {
    std::string quota;
    double period = 0;
    if (v2 >> quota >> period && quota != "max" && period > 0) {
      return static_cast<int>(std::ceil(std::strtod(quota.c_str(), nullptr) / period));
    }
  }
  std::ifstream quota_file("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  std::ifstream period_file("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double quota = 0, period = 0;
  if (quota_file >> quota && period_file >> period && quota > 0 && period > 0) {
    return static_cast<int>(std::ceil(quota / period));
  }
  return 0;
}

int affinity_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 0;
  return CPU_COUNT(&set);
}
#else
int cgroup_cpus() { return 0; }
int affinity_cpus() { return 0; }
#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

Isa best_isa() {
  const CpuFeatures& f = cpu_features();
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  const bool avx512 = avx2 && f.avx512 && f.avx512_vnni;
  if (avx512 && f.amx_tile && f.amx_int8 && f.amx_bf16) return Isa::amx;
  if (avx512) return Isa::avx512;
  return avx2 ? Isa::avx2 : Isa::scalar;
}

const char* to_string(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::amx:
      return "amx";
  }
  return "?";
}

Isa parse_isa(const std::string& cap) {
  const Isa best = best_isa();
  if (cap.empty()) return best;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (cap != to_string(isa)) continue;
    if (isa > best) {
      throw Error(ErrorCode::unsupported_device,
                  format("instruction set %s: this machine has %s at best; ask for that or less",
                         cap.c_str(), to_string(best)));
    }
    return isa;
  }
  throw Error(
      ErrorCode::invalid_argument,
      format("unknown instruction set \"%s\"; expected scalar, avx2, avx512 or amx", cap.c_str()));
}

std::vector<std::string> feature_names() {
  const CpuFeatures& f = cpu_features();
  const std::pair<bool, const char*> all[] = {{f.avx2, "avx2"},
                                              {f.fma, "fma"},
                                              {f.f16c, "f16c"},
                                              {f.avx_vnni, "avx_vnni"},
                                              {f.avx512, "avx512"},
                                              {f.avx512_vnni, "avx512_vnni"},
                                              {f.avx512_bf16, "avx512_bf16"},
                                              {f.amx_tile, "amx_tile"},
                                              {f.amx_int8, "amx_int8"},
                                              {f.amx_bf16, "amx_bf16"}};
  std::vector<std::string> names;
  for (const auto& [present, name] : all) {
    if (present) names.emplace_back(name);
  }
  return names;
}

int usable_threads() {
  int count = affinity_cpus();
  if (count <= 0) count = static_cast<int>(std::thread::hardware_concurrency());
  const int quota = cgroup_cpus();
  if (quota > 0) count = std::min(count, quota);
  return std::max(count, 1);
}

}  // namespace turbomind::cpu
