#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace samp {

const char* const kLevelNames[kLevels] = {"avx512_vnni", "avx2_vnni", "avx2", "portable"};

namespace {

// __builtin_cpu_supports looks at what the system saves of the registers, too.
bool cpu_runs(int index) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (index == 0)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
  if (index == 1) {
    // AVX-VNNI is bit 4 of EAX in leaf 7, sub-leaf 1; gcc 12 has no name for it.
    unsigned a = 0, b = 0, c = 0, d = 0;
    return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  }
  if (index == 2) return avx2;
#endif
  return index == 3;
}

}  // namespace

const Level* built_level(int index) {
  switch (index) {
#if defined(SAMP_HAVE_LEVEL_3)
    case 0: return level_avx512_vnni();
#endif
#if defined(SAMP_HAVE_LEVEL_2)
    case 1: return level_avx2_vnni();
#endif
#if defined(SAMP_HAVE_LEVEL_1)
    case 2: return level_avx2();
#endif
    case 3: return level_portable();
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
