// Where a step's time goes: compile with -DHEADRACE_TIMES and the parts of steps are added up, as the
// caller's thread sees them, its waiting included. Without it nothing of this is in the code.
#pragma once

#ifdef HEADRACE_TIMES
#include <x86intrin.h>

#include <cstdint>
#include <cstdio>

namespace headrace {

enum Part { PART_QKV, PART_ATTEND, PART_OUT, PART_GATE, PART_DOWN, PART_HEAD, PART_REST, PARTS };

struct Times {
  uint64_t ticks[PARTS] = {};
  uint64_t steps = 0, last = 0;

  void begin() {
    steps += 1;
    last = __rdtsc();
  }
  void end(Part part) {
    const uint64_t now = __rdtsc();
    ticks[part] += now - last;
    last = now;
  }
  void print() {
    static const char* const names[PARTS] = {"qkv", "attend", "out", "gate", "down", "head", "rest"};
    for (int i = 0; i < PARTS; ++i)
      std::printf("%s %.1f  ", names[i], static_cast<double>(ticks[i]) / static_cast<double>(steps) / 1e3);
    std::printf("(thousands of ticks a step)\n");
  }
};

inline Times times;

}  // namespace headrace
#define HR_BEGIN(thread) \
  if ((thread) == 0) times.begin()
#define HR_END(thread, part) \
  if ((thread) == 0) times.end(part)
#else
#define HR_BEGIN(thread)
#define HR_END(thread, part)
#endif
