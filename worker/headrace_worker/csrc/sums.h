// What ranks add up within a step. Those of a host have mapped the same memory: turns, slots and flags
// are those of parallel/collective.py, whose other sums the same ranks go through before and after.
// Ranks apart call back, for Python to reach the others over a network, in the same order of sums.
//
// Invariant: sums are taken in one order, so all ranks leave with the same bits. A rank
// that does not come in time is named, and from then on nobody is waited for: what the step gives is
// worth nothing.
#pragma once

#include <cstdint>

#include "abi.h"

namespace headrace {

// x [count] becomes the sum of all ranks' x.
void add_up(Sums& s, float* x, int64_t count);

}  // namespace headrace
