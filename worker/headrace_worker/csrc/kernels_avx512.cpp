// The kernels for processors with AVX-512 and VNNI.
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

#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "simd_avx512.h"

namespace headrace {
namespace avx512 {
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
}  // namespace avx512

const Kernels kernels_avx512 = {
    avx512::linear,      avx512::attend,   avx512::run_step, avx512::weigh_all, avx512::sample,
    avx512::grid_errors, avx512::round_q4, avx512::round_q8, avx512::pack,      avx512::unpack,
};

}  // namespace headrace
