#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace samp {

const char* const kLevelNames[kLevels] = {"amx_int8", "avx512_vnni", "avx2_vnni", "avx2",
                                          "portable"};

namespace {

#if defined(__x86_64__)
unsigned leaf7(int sub, int reg) {
  unsigned r[4] = {};
  return __get_cpuid_count(7, static_cast<unsigned>(sub), &r[0], &r[1], &r[2], &r[3]) ? r[reg] : 0;
}

// AMX-TILE and AMX-INT8, and the system's leave to use the tiles: it is asked for once, for all
// threads of the process. An older system, or a container that forbids the call, says no.
bool has_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool has = (leaf7(0, 3) >> 24 & 1) && (leaf7(0, 3) >> 25 & 1) &&
                          syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return has;
#else
  return false;
#endif
}
#endif

// __builtin_cpu_supports looks at what the system saves of the registers, too.
bool cpu_runs(int index) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512_vnni =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni");
  if (index == 0) return avx512_vnni && has_tiles();
  if (index == 1) return avx512_vnni;
  // AVX-VNNI: gcc 12 has no name for it.
  if (index == 2) return avx2 && (leaf7(1, 0) >> 4 & 1);
  if (index == 3) return avx2;
#endif
  return index == kLevels - 1;
}

}  // namespace

const Level* built_level(int index) {
  switch (index) {
#if defined(SAMP_HAVE_LEVEL_4)
    case 0: return level_amx_int8();
#endif
#if defined(SAMP_HAVE_LEVEL_3)
    case 1: return level_avx512_vnni();
#endif
#if defined(SAMP_HAVE_LEVEL_2)
    case 2: return level_avx2_vnni();
#endif
#if defined(SAMP_HAVE_LEVEL_1)
    case 3: return level_avx2();
#endif
    case 4: return level_portable();
    default: return nullptr;
  }
}

const Level* runnable_level(int index) {
  return index >= 0 && index < kLevels && cpu_runs(index) ? built_level(index) : nullptr;
}

const Level& find_level(const std::string& name) {
  std::string can;
  for (int i = 0; i < kLevels; ++i) {
    const Level* level = runnable_level(i);
    if (level == nullptr) continue;
    if (name.empty() || name == kLevelNames[i]) return *level;
    can += (can.empty() ? "" : ", ") + std::string(kLevelNames[i]);
  }
  throw std::invalid_argument("SAMP_CPU_LEVEL " + name + "; this build runs here: " + can);
}

const Level* current_level() {
  const char* name = std::getenv("SAMP_CPU_LEVEL");
  static const Level* level = &find_level(name == nullptr ? "" : name);
  return level;
}

}  // namespace samp
