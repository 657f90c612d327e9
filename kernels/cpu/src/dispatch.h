// Which level runs: by what this build has, what this CPU can, and SAMP_CPU_LEVEL.
#pragma once

#include <string>

#include "level.h"

namespace samp {

constexpr int kLevels = 5;
extern const char* const kLevelNames[kLevels];  // best first

// null where this build was made without the level, or where this CPU cannot run it.
const Level* built_level(int index);
const Level* runnable_level(int index);

// By name, or for "" the best that can run. Throws std::invalid_argument naming what can.
const Level& find_level(const std::string& name);

// The level of this process: SAMP_CPU_LEVEL, else the best. Throws as find_level.
const Level* current_level();

}  // namespace samp
