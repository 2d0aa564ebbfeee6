// The kernels for processors with AVX2 and FMA.
#include <algorithm>
#include <atomic>
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
//
#include "round.inc.h"
//
#include "unpack.inc.h"
}  // namespace avx2

const Kernels kernels_avx2 = {
    avx2::linear,      avx2::attend,   avx2::run_step, avx2::weigh_all, avx2::sample,
    avx2::grid_errors, avx2::round_q4, avx2::round_q8, avx2::pack,      avx2::unpack,
};

}  // namespace headrace
