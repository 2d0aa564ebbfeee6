// What Python and the kernels agree on: plain structs, pointers and sizes, no ownership.
//
// Invariant: every pointer here belongs to the caller and outlives the call. The structs are mirrored
// field by field in native/abi.py; a change of one is a change of ABI_VERSION.
#pragma once

#include <cstdint>

namespace headrace {

constexpr int32_t ABI_VERSION = 6;

// Outputs are computed PANEL at a time, quantized columns in groups of GROUP that share a scale.
constexpr int PANEL = 16;
constexpr int GROUP = 32;
constexpr int BLOCK_TOKENS = 16;

enum Format : int32_t {
  FORMAT_F32 = 0,  // per panel [column][16] float32
  FORMAT_Q8 = 1,   // per panel and group: [8][16][4] bytes (value + 128), 16 scales in bfloat16;
                   // groups are turned: W = W' H where W' is stored and H is Hadamard's matrix of 32
  FORMAT_Q4 = 2,   // per panel and group: [4][16][4] bytes (column c low, c + 16 high), 16 scales and
                   // 16 zero points in bfloat16
};

constexpr int CUTS_MAX = 3;

// y = x W^T + bias. W [outs, columns]; quantized columns are padded to whole groups. Its columns are
// summed in runs, which are added up two by two: `cuts` + 1 of them, 1, 2 or 4, each but the last up to
// its `cut`, in groups (FORMAT_F32: in columns). So ranks that hold whole runs come to the same bits.
struct Matrix {
  int32_t format;
  int32_t outs;
  int32_t columns;
  int32_t cuts;
  int32_t cut[CUTS_MAX + 1];
  const uint8_t* panels;
  const float* bias;  // [outs] or null
};

enum KvKind : int32_t { KV_F32 = 0, KV_BF16 = 1, KV_INT8 = 2 };

// [block][layer][key, value][token][kv_head][head_dim]; int8 chunks have their scales behind them,
// [token][kv_head], in float32 or bfloat16.
struct Pool {
  uint8_t* base;
  int64_t block_bytes;
  int64_t chunk_bytes;
  int32_t kind;
  int32_t scale_kind;  // KV_F32 or KV_BF16
  int32_t kv_heads;
  int32_t head_dim;
};

// Who the rows of a step belong to: see attention/interface.py.
struct Batch {
  int32_t sequences;
  int32_t rows;
  const int32_t* starts;        // [sequences + 1]
  const int32_t* lengths;       // [sequences]
  const int32_t* tables;        // blocks of all sequences, one after the other
  const int32_t* table_starts;  // [sequences]
  const int64_t* slots;         // [rows]
};

struct Layer {
  const float* attention_norm;
  const float* mlp_norm;
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;
  Matrix qkv, out, gate_up, down;
  int32_t rope;    // which table, -1 for none
  int32_t window;  // tokens that a row sees, 0 for all
};

// A decoder, or a rank's part of one. The first stage has an embedding, the last one norm and head.
struct Model {
  int32_t hidden, inner, heads, kv_heads, head_dim, vocab, layers, ropes;
  float eps, attention_scale, embedding_scale;
  int32_t embedding_bf16;
  int32_t first_token, unused;  // the embedding's rows are of tokens from this one on
  const void* embedding;        // [vocab, hidden]
  const Layer* layer;
  const float* norm;
  const int32_t* rotated;  // [ropes], how many dimensions each table turns
  Matrix head;
};

// Ranks that add up what each has of x: see sums.h.
struct Sums {
  uint8_t* flags;  // [size] turns that each rank has taken, 64 bytes apart
  uint8_t* slots;  // [2][size][slot_bytes]
  int64_t slot_bytes;
  int64_t one_turn_bytes;  // sums of more, over more than two ranks, take two turns
  int64_t patience_us;
  uint64_t turn;            // in and out
  int64_t bytes, messages;  // out: what was received from others
  int32_t rank, size;
  int32_t late;  // out: a rank that did not come in time, or `size` where `apart` failed; -1 for none
  int32_t unused;
  // Ranks without common memory: x [count] becomes everybody's sum over a network; 0 where it did. Null
  // where flags and slots are, of which nothing is needed then.
  int32_t (*apart)(float* x, int64_t count);
};

// What a row's token is chosen by: see sampling/. A `scale` of 0 takes the first highest logit.
struct Draw {
  double top_p;   // 1 for no limit
  float scale;    // log2(e) / temperature
  float min_p;    // 0 for no limit, as for top_k
  int32_t top_k;
  int32_t unused;
  uint64_t seed;
  int64_t position;
  int64_t row;
  int64_t token;  // in: that of the first highest logit, -1 where that is not finite, -2 to find it;
                  // out: the token; -1 for none
};

struct Step {
  const int64_t* tokens;     // [rows]
  const int64_t* positions;  // [rows]
  const float* const* cos;   // [ropes] tables [positions, rotated]
  const float* const* sin;   // the first half negated
  const int64_t* sampled;    // rows that go through the head; null for all
  int32_t sampled_rows;
  int32_t draw_count;
  float* logits;       // [sampled_rows, vocab]
  int64_t* tops;       // [sampled_rows], the first highest logit of each, -1 where that is not finite
  const float* given;  // [rows, hidden] what the stage before made; null for the first stage
  float* passed;       // [rows, hidden] for the stage after; null for the last one
  Sums* sums;          // null for a rank that has its layers alone
  Draw* draws;         // [draw_count] rows of logits whose tokens are drawn at once
};

// One instruction set's kernels.
struct Kernels {
  void (*linear)(const Matrix&, const float* x, int rows, const float* residual, float* out);
  void (*attend)(const Pool&, const Batch&, int layer, int heads, float scale, int window,
                 const float* q, int q_stride, const float* k, const float* v, int kv_stride,
                 float* out);
  void (*step)(const Model&, const Pool&, const Batch&, const Step&);
  void (*weigh)(const float* logits, int count, float best, float scale, float* out);
  void (*sample)(const float* logits, int vocab, Draw* draws, int count);
  void (*grid_errors)(const float* x, int64_t count, double* sums);
  void (*round_q4)(const float* x, int64_t count, bool grid, uint8_t* values, float* scales, float* zeros,
                   double* sums);
  void (*round_q8)(const float* x, int64_t count, int8_t* values, float* scales);
  void (*pack)(int format, int outs, int groups, const uint8_t* values, const float* scales,
               const float* zeros, uint8_t* panels);
  bool (*unpack)(int kind, const uint8_t* blocks, int64_t count, float* y);
};

extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace headrace
