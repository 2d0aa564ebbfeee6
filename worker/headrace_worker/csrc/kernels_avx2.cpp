// The kernels for processors with AVX2 and FMA.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "abi.h"
#include "sums.h"
#include "team.h"
#include "times.h"

#pragma GCC target("avx2,fma,f16c,bmi2")
#include "simd_avx2.h"

namespace headrace {
namespace avx2 {
#include "linear.inc.h"
//
#include "attention.inc.h"
//
#include "sample.inc.h"
//
#include "step.inc.h"
}  // namespace avx2

const Kernels kernels_avx2 = {avx2::linear, avx2::attend, avx2::run_step, avx2::weigh_all, avx2::sample};

}  // namespace headrace
