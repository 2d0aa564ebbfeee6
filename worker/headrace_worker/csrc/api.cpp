// What the library exports: C functions over the kernels of the best instruction set that is here.
#include "abi.h"
#include "sums.h"
#include "team.h"
#include "times.h"

namespace headrace {
namespace {

enum Isa : int32_t { ISA_NONE = 0, ISA_AVX2 = 1, ISA_AVX512 = 2 };

Isa find() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return ISA_NONE;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    return ISA_AVX512;
  return ISA_AVX2;
}

Isa chosen = find();

const Kernels& kernels() { return chosen == ISA_AVX512 ? kernels_avx512 : kernels_avx2; }

}  // namespace
}  // namespace headrace

#pragma GCC visibility push(default)
extern "C" {

int32_t headrace_abi_version() { return headrace::ABI_VERSION; }

int32_t headrace_isa() { return headrace::chosen; }

// Takes a lesser instruction set than there is; returns the one in use. For tests.
int32_t headrace_use_isa(int32_t isa) {
  const headrace::Isa best = headrace::find();
  if (isa > headrace::ISA_NONE && isa <= best) headrace::chosen = static_cast<headrace::Isa>(isa);
  return headrace::chosen;
}

void headrace_set_threads(int32_t count) { headrace::set_threads(count); }

// Ends the team's threads, until a call needs them again.
void headrace_rest() {
  headrace::set_threads(1);
  headrace::Turn turn;
}

void headrace_linear(const headrace::Matrix* matrix, const float* x, int32_t rows, const float* residual,
                     float* out) {
  headrace::kernels().linear(*matrix, x, rows, residual, out);
}

void headrace_attend(const headrace::Pool* pool, const headrace::Batch* batch, int32_t layer, int32_t heads,
                     float scale, int32_t window, const float* q, int32_t q_stride, const float* k,
                     const float* v, int32_t kv_stride, float* out) {
  headrace::kernels().attend(*pool, *batch, layer, heads, scale, window, q, q_stride, k, v, kv_stride, out);
}

void headrace_step(const headrace::Model* model, const headrace::Pool* pool, const headrace::Batch* batch,
                   const headrace::Step* step) {
  headrace::kernels().step(*model, *pool, *batch, *step);
}

// What logits [count] weigh beside `best`, by one thread; `out` may be the logits.
void headrace_weigh(const float* logits, int32_t count, float best, float scale, float* out) {
  headrace::kernels().weigh(logits, count, best, scale, out);
}

// logits [rows, vocab]: of some of the rows a token each.
void headrace_sample(const float* logits, int32_t vocab, headrace::Draw* draws, int32_t count) {
  headrace::kernels().sample(logits, vocab, draws, count);
}

// x: `count` groups of 32 weights. See round.inc.h.
void headrace_grid_errors(const float* x, int64_t count, double* sums) {
  headrace::kernels().grid_errors(x, count, sums);
}

void headrace_round_q4(const float* x, int64_t count, int32_t grid, uint8_t* values, float* scales, float* zeros,
                       double* sums) {
  headrace::kernels().round_q4(x, count, grid != 0, values, scales, zeros, sums);
}

void headrace_round_q8(const float* x, int64_t count, int8_t* values, float* scales) {
  headrace::kernels().round_q8(x, count, values, scales);
}

// Rounded weights into `panels`, for a Matrix of this format.
void headrace_pack(int32_t format, int32_t outs, int32_t groups, const uint8_t* values, const float* scales,
                   const float* zeros, uint8_t* panels) {
  headrace::kernels().pack(format, outs, groups, values, scales, zeros, panels);
}

// `count` blocks of a GGUF file's kind → floats; 0 where one of them is not finite. See unpack.inc.h.
int32_t headrace_unpack(int32_t kind, const uint8_t* blocks, int64_t count, float* y) {
  return headrace::kernels().unpack(kind, blocks, count, y);
}

// What steps do within: for tests.
void headrace_add_up(headrace::Sums* sums, float* x, int64_t count) { headrace::add_up(*sums, x, count); }

#ifdef HEADRACE_TIMES
void headrace_times(int32_t print) {
  if (print != 0) headrace::times.print();
  headrace::times = headrace::Times();
}
#endif

}  // extern "C"
#pragma GCC visibility pop
