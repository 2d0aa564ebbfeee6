// A GGUF file's quantized blocks into floats. Included once per instruction set.
//
// Invariant: bit for bit what the `gguf` package's numpy code makes of them: scales are multiplied
// before their values, and nothing is fused. Layouts: llama.cpp's ggml-common.h.

enum Kind : int32_t {  // GGMLQuantizationType's numbers
  KIND_Q4_0 = 2, KIND_Q4_1 = 3, KIND_Q5_0 = 6, KIND_Q5_1 = 7, KIND_Q8_0 = 8,
  KIND_Q4_K = 12, KIND_Q5_K = 13, KIND_Q6_K = 14,
};
constexpr int SUPER = 256;             // values of a block whose kind ends in K, in eight runs of 32
constexpr int BLOCKS_AT_A_TIME = 256;  // of a thread, before it asks for more

HR_INLINE float half(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return _cvtsh_ss(bits);
}

// 32 values from 16 bytes: low halves first, then high ones, each with its bit of `fifth` on top.
HR_INLINE void nibbles(const uint8_t* q, uint32_t fifth, int middle, float scale, float* y) {
  for (int i = 0; i < 16; ++i) {
    const int first = (q[i] & 15) | static_cast<int>(fifth >> i & 1) << 4;
    const int second = q[i] >> 4 | static_cast<int>(fifth >> (i + 16) & 1) << 4;
    y[i] = scale * static_cast<float>(first - middle);
    y[i + 16] = scale * static_cast<float>(second - middle);
  }
}
HR_INLINE void raise(float low, float* y) {
  for (int i = 0; i < 32; ++i) y[i] += low;
}

HR_INLINE void unpack_small(int kind, const uint8_t* b, float* y) {
  const float scale = half(b);
  uint32_t fifth = 0;
  switch (kind) {
    case KIND_Q4_0: return nibbles(b + 2, 0, 8, scale, y);
    case KIND_Q4_1: nibbles(b + 4, 0, 0, scale, y); return raise(half(b + 2), y);
    case KIND_Q5_0: std::memcpy(&fifth, b + 2, 4); return nibbles(b + 6, fifth, 16, scale, y);
    case KIND_Q5_1:
      std::memcpy(&fifth, b + 4, 4);
      nibbles(b + 8, fifth, 0, scale, y);
      return raise(half(b + 2), y);
    default:  // Q8_0
      for (int i = 0; i < 32; ++i) y[i] = scale * static_cast<float>(static_cast<int8_t>(b[2 + i]));
  }
}

// Scale and least value of run j, 6 bits each in 12 bytes.
HR_INLINE void run_factors(const uint8_t* s, int j, int& scale, int& least) {
  if (j < 4) {
    scale = s[j] & 63;
    least = s[j + 4] & 63;
  } else {
    scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
    least = s[j + 4] >> 4 | (s[j] >> 6) << 4;
  }
}

// Q4_K, and Q5_K with its fifth bits in front of the nibbles.
HR_INLINE void unpack_4_5(const uint8_t* b, bool five, float* y) {
  const float d = half(b), d_least = half(b + 2);
  const uint8_t *fifth = b + 16, *q = five ? b + 48 : b + 16;
  for (int j = 0; j < 8; ++j) {
    int scale, least;
    run_factors(b + 4, j, scale, least);
    const float by = d * static_cast<float>(scale), minus = d_least * static_cast<float>(least);
    const uint8_t* bytes = q + j / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      const int value = (j % 2 ? bytes[i] >> 4 : bytes[i] & 15) | (five ? (fifth[i] >> j & 1) << 4 : 0);
      y[j * 32 + i] = by * static_cast<float>(value) - minus;
    }
  }
}

HR_INLINE void unpack_6(const uint8_t* b, float* y) {
  const float d = half(b + 208);
  for (int run = 0; run < 8; ++run) {  // of 32 values; four of them share 64 low and 32 high bytes
    const int part = run / 4, quarter = run % 4;
    const uint8_t *low = b + part * 64 + quarter % 2 * 32, *high = b + 128 + part * 32;
    for (int i = 0; i < 32; ++i) {
      const int four = quarter < 2 ? low[i] & 15 : low[i] >> 4;
      const int value = (four | (high[i] >> 2 * quarter & 3) << 4) - 32;
      const float scale = d * static_cast<float>(static_cast<int8_t>(b[192 + run * 2 + i / 16]));
      y[run * 32 + i] = scale * static_cast<float>(value);
    }
  }
}

static int block_bytes_of(int kind) {
  switch (kind) {
    case KIND_Q4_0: return 18;
    case KIND_Q4_1: return 20;
    case KIND_Q5_0: return 22;
    case KIND_Q5_1: return 24;
    case KIND_Q8_0: return 34;
    case KIND_Q4_K: return 144;
    case KIND_Q5_K: return 176;
    case KIND_Q6_K: return 210;
    default: return 0;
  }
}

// `count` blocks into y; whether all that came out are numbers. Nothing for a kind that is not here.
static bool unpack(int kind, const uint8_t* blocks, int64_t count, float* y) {
  const int bytes = block_bytes_of(kind), values = kind < KIND_Q4_K ? GROUP : SUPER;
  if (bytes == 0) return false;
  std::atomic<bool> sound{true};
  Turn turn;
  Team& team = turn.team();
  const int parts = static_cast<int>((count + BLOCKS_AT_A_TIME - 1) / BLOCKS_AT_A_TIME);
  team.run([&](int) {
    team.phase(parts, 1, [&](int first, int last) {
      const int64_t end = std::min(count, static_cast<int64_t>(last) * BLOCKS_AT_A_TIME);
      for (int64_t n = static_cast<int64_t>(first) * BLOCKS_AT_A_TIME; n < end; ++n) {
        const uint8_t* b = blocks + n * bytes;
        float* to = y + n * values;
        if (kind == KIND_Q6_K) unpack_6(b, to);
        else if (kind >= KIND_Q4_K) unpack_4_5(b, kind == KIND_Q5_K, to);
        else unpack_small(kind, b, to);
        vf all = zero();  // a number times nothing is nothing, but for those that are none
        for (int i = 0; i < values; i += W) all = fma(load(to + i), zero(), all);
        if (!(sum(all) == 0)) sound.store(false, std::memory_order_relaxed);
      }
    });
  });
  return sound.load();
}
