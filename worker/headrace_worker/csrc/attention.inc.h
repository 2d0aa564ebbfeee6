// Paged attention straight from the pool. Included once per instruction set.
//
// Source: Dao et al., "FlashAttention", 2022, for the running softmax; the heads that share a KV head
// and the rows of a tile are one small matrix, so that each key and value is read once for all.
//
// Invariant: a row's result depends on its query and its sequence's keys and values alone, bit for
// bit, whether it decodes or stands in a chunk, beside whomever. Each row takes its tokens in spans
// of SPAN, by absolute position, with a softmax of its own, and spans are merged in order; who
// computes which span, and when, cannot show.

constexpr int SPAN = 64;
constexpr int TILE_QUERIES = 48;  // rows times heads of one KV head that are taken together
constexpr int TILE_SCORES = 6;

HR_INLINE vf exp(vf x) {  // 0 below -87
  const vf low = set1(-87.0f);
  vf c = min(max(x, low), set1(88.0f));
  vf n = round(mul(c, set1(1.44269504f)));
  vf r = fma(n, set1(-0.693359375f), c);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(mul(p, r), r, add(r, set1(1.0f)));
  return keep_above(x, low, mul(p, exponent(to_int(n))));
}

HR_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
HR_INLINE float from_bf16(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <int KIND>
struct Stored;
template <>
struct Stored<KV_F32> {
  using type = float;
  static inline __attribute__((always_inline)) vf get(const float* p) { return load(p); }
  static inline __attribute__((always_inline)) __m256 eight(const float* p) { return _mm256_loadu_ps(p); }
};
template <>
struct Stored<KV_BF16> {
  using type = uint16_t;
  static inline __attribute__((always_inline)) vf get(const uint16_t* p) { return bf16(p); }
  // pairs of them, as they are
  static inline __attribute__((always_inline)) __m256 eight(const uint16_t* p) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  }
};
template <>
struct Stored<KV_INT8> {
  using type = int8_t;
  static inline __attribute__((always_inline)) vf get(const int8_t* p) { return int8(p); }
  static inline __attribute__((always_inline)) __m256 eight(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
};

HR_INLINE uint8_t* chunk_of(const Pool& p, int64_t block, int layer, int value) {
  return p.base + block * p.block_bytes + (layer * 2 + value) * p.chunk_bytes;
}

HR_INLINE const uint8_t* scales_in(const Pool& p, const uint8_t* chunk) {
  return chunk + BLOCK_TOKENS * p.kv_heads * p.head_dim;
}
HR_INLINE float scale_at(const Pool& p, const uint8_t* scales, int at) {
  if (p.scale_kind == KV_F32) return reinterpret_cast<const float*>(scales)[at];
  return from_bf16(reinterpret_cast<const uint16_t*>(scales)[at]);
}

// One row's keys or values of one KV head into the pool.
static void keep(const Pool& p, int64_t slot, int layer, int value, int kv_head, const float* x) {
  const int token = static_cast<int>(slot % BLOCK_TOKENS), at = token * p.kv_heads + kv_head;
  uint8_t* chunk = chunk_of(p, slot / BLOCK_TOKENS, layer, value);
  const int64_t place = static_cast<int64_t>(at) * p.head_dim;
  if (p.kind == KV_F32) {
    std::memcpy(reinterpret_cast<float*>(chunk) + place, x, p.head_dim * sizeof(float));
    return;
  }
  if (p.kind == KV_BF16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(chunk) + place;
    for (int i = 0; i < p.head_dim; ++i) to[i] = to_bf16(x[i]);
    return;
  }
  int8_t* to = reinterpret_cast<int8_t*>(chunk) + place;
  uint8_t* scales = const_cast<uint8_t*>(scales_in(p, chunk));
  float most = 0.0f;
  for (int i = 0; i < p.head_dim; ++i) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
  float scale = most / 127.0f > SMALLEST ? most / 127.0f : SMALLEST;
  if (!(most <= 3.4e38f)) scale = NAN;
  if (p.scale_kind == KV_F32) {
    reinterpret_cast<float*>(scales)[at] = scale;
  } else {
    const uint16_t rounded = to_bf16(scale);
    reinterpret_cast<uint16_t*>(scales)[at] = rounded;
    scale = from_bf16(rounded);
  }
  for (int i = 0; i < p.head_dim; ++i) {
    float q = std::nearbyint(x[i] / scale);
    if (q != q) q = 0;
    to[i] = static_cast<int8_t>(q > 127 ? 127 : q < -127 ? -127 : q);
  }
}

HR_INLINE void transpose8(const __m256* in, float* out, int stride) {
  __m256 a0 = _mm256_unpacklo_ps(in[0], in[1]), a1 = _mm256_unpackhi_ps(in[0], in[1]);
  __m256 a2 = _mm256_unpacklo_ps(in[2], in[3]), a3 = _mm256_unpackhi_ps(in[2], in[3]);
  __m256 a4 = _mm256_unpacklo_ps(in[4], in[5]), a5 = _mm256_unpackhi_ps(in[4], in[5]);
  __m256 a6 = _mm256_unpacklo_ps(in[6], in[7]), a7 = _mm256_unpackhi_ps(in[6], in[7]);
  __m256 b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xee);
  __m256 b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xee);
  __m256 b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xee);
  __m256 b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xee);
  _mm256_storeu_ps(out + 0 * stride, _mm256_permute2f128_ps(b0, b4, 0x20));
  _mm256_storeu_ps(out + 1 * stride, _mm256_permute2f128_ps(b1, b5, 0x20));
  _mm256_storeu_ps(out + 2 * stride, _mm256_permute2f128_ps(b2, b6, 0x20));
  _mm256_storeu_ps(out + 3 * stride, _mm256_permute2f128_ps(b3, b7, 0x20));
  _mm256_storeu_ps(out + 4 * stride, _mm256_permute2f128_ps(b0, b4, 0x31));
  _mm256_storeu_ps(out + 5 * stride, _mm256_permute2f128_ps(b1, b5, 0x31));
  _mm256_storeu_ps(out + 6 * stride, _mm256_permute2f128_ps(b2, b6, 0x31));
  _mm256_storeu_ps(out + 7 * stride, _mm256_permute2f128_ps(b3, b7, 0x31));
}

// What is read after a span, to be fetched while it is computed: a part of each of its blocks. Memory
// is far and the processor does not guess where the next block is; nor can it wait for many lines at
// a time, so they are asked for in small lots.
struct Ahead {
  const uint8_t* parts[SPAN / BLOCK_TOKENS];
  int count = 0, bytes = 0;

  inline __attribute__((always_inline)) void some() {
    constexpr int LOT_BYTES = 4 * 64;
    if (count == 0) return;
    const uint8_t* from = parts[count - 1] + bytes_done;
#pragma GCC unroll 4
    for (int i = 0; i < LOT_BYTES; i += 64) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
    bytes_done += LOT_BYTES;
    if (bytes_done < bytes) return;
    bytes_done = 0;
    count -= 1;
  }

 private:
  int bytes_done = 0;
};

// scores [R][SPAN] of 16 tokens: q [R, size] times turned keys [size][SPAN], or, of bfloat16, pairs
// of them as they stand in memory, [size / 2][SPAN].
template <int R, bool PAIRS>
static void scores_of(const float* q, int size, const float* keys, float* scores, Ahead& ahead) {
  vf acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = zero();
  for (int d = 0; d < size; d += PAIRS ? 2 : 1) {
    const float* from = keys + (PAIRS ? d / 2 : d) * SPAN;
    if (d % 16 == 0) ahead.some();
    vf key[NV];
    for (int v = 0; v < NV; ++v) key[v] = PAIRS ? first_of_pair(from + v * W) : load(from + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf value = set1(q[r * size + d]);
      for (int v = 0; v < NV; ++v) acc[r][v] = fma(key[v], value, acc[r][v]);
    }
    if constexpr (PAIRS) {
      for (int v = 0; v < NV; ++v) key[v] = second_of_pair(from + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        vf value = set1(q[r * size + d + 1]);
        for (int v = 0; v < NV; ++v) acc[r][v] = fma(key[v], value, acc[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(scores + r * SPAN + v * W, acc[r][v]);
}

// mixed [R][size], 16 dimensions of it: weights [R][SPAN] times the values of `blocks` blocks.
template <int R, int KIND>
static void mix_of(const float* weights, const typename Stored<KIND>::type* const* values, int blocks,
                   int64_t stride, int at, int size, float* mixed, Ahead& ahead) {
  vf acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = zero();
  for (int b = 0; b < blocks; ++b) {
    const typename Stored<KIND>::type* from = values[b] + at;
    ahead.some();
    for (int t = 0; t < BLOCK_TOKENS; ++t) {
      vf value[NV];
      for (int v = 0; v < NV; ++v) value[v] = Stored<KIND>::get(from + t * stride + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        vf weight = set1(weights[r * SPAN + b * BLOCK_TOKENS + t]);
        for (int v = 0; v < NV; ++v) acc[r][v] = fma(value[v], weight, acc[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(mixed + r * size + at + v * W, acc[r][v]);
}

// What one thread needs for tiles of so many queries in all, the largest of `one`.
struct TileRoom {
  std::vector<float> q, keys, scores, span, total;
  std::vector<float> peak, weight;            // of a span
  std::vector<float> all_peaks, all_weights;  // of all spans so far

  void fit(int queries, int one, int size) {
    size_t wide = static_cast<size_t>(queries) * size;
    if (q.size() < wide) {
      q.resize(wide);
      total.resize(wide);
      all_peaks.resize(queries);
      all_weights.resize(queries);
    }
    if (scores.size() < static_cast<size_t>(one) * SPAN) {
      scores.resize(one * SPAN);
      peak.resize(one);
      weight.resize(one);
    }
    if (span.size() < static_cast<size_t>(one) * size) span.resize(static_cast<size_t>(one) * size);
    if (keys.size() < static_cast<size_t>(size) * SPAN) keys.resize(size * SPAN);
  }
};

// Adds a span's (peak, weight, mixed) of one query to what its earlier spans gave.
HR_INLINE void merge(float peak, float weight, const float* mixed, int size, float& all_peak, float& all_weight,
                     float* all) {
  if (all_weight == 0.0f && all_peak == -INFINITY) {
    all_peak = peak;
    all_weight = weight;
    std::memcpy(all, mixed, size * sizeof(float));
    return;
  }
  float top = peak > all_peak ? peak : all_peak;
  float ours[W], theirs[W];
  store(ours, exp(set1(all_peak - top)));
  store(theirs, exp(set1(peak - top)));
  vf a = set1(ours[0]), b = set1(theirs[0]);
  for (int d = 0; d < size; d += W) store(all + d, fma(load(mixed + d), b, mul(load(all + d), a)));
  all_weight = all_weight * ours[0] + weight * theirs[0];
  all_peak = top;
}

// One tile: rows of one sequence and the heads of one KV head.
struct Tile {
  int sequence, kv_head;
  int first, last;  // rows of the step
  int position;     // of the first of them
};

// The softmax of `queries` rows of scores over tokens [first, first + SPAN): weights in their place.
// A row that sees none of them gets a weight of -1.
HR_INLINE void soften(float* scores, int tile_rows, int group, int position, int window, int first,
                      const float* key_scales, const float* value_scales, float* peaks, float* weights) {
  for (int r = 0; r < tile_rows; ++r) {
    const int at = position + r;
    int from = window != 0 && at - window + 1 > first ? at - window + 1 - first : 0;
    int to = at + 1 - first < SPAN ? at + 1 - first : SPAN;
    for (int g = 0; g < group; ++g) {
      const int query = r * group + g;
      float* s = scores + query * SPAN;
      if (from >= to) {
        weights[query] = -1.0f;
        for (int i = 0; i < SPAN; i += W) store(s + i, zero());
        continue;
      }
      vf top = set1(-INFINITY);
      for (int i = 0; i < SPAN; i += W) {
        vf x = load(s + i);
        if (key_scales != nullptr) x = mul(x, load(key_scales + i));
        x = choose(between(i, from, to), x, set1(-INFINITY));
        store(s + i, x);
        top = max(x, top);
      }
      const float peak = largest(top);
      vf all = zero();
      for (int i = 0; i < SPAN; i += W) {
        vf p = exp(sub(load(s + i), set1(peak)));
        all = add(all, p);
        if (value_scales != nullptr) p = mul(p, load(value_scales + i));
        store(s + i, p);
      }
      peaks[query] = peak;
      weights[query] = sum(all);
    }
  }
}

template <int KIND>
static void span_of(const Pool& p, const Batch& batch, int layer, const Tile& tile, int group, int window,
                    int index, const float* q, Ahead& ahead, TileRoom& room) {
  using Value = typename Stored<KIND>::type;
  const int size = p.head_dim, first = index * SPAN, queries = (tile.last - tile.first) * group;
  const int end = tile.position + (tile.last - tile.first);  // tokens that the last row sees
  const int tokens = end - first < SPAN ? end - first : SPAN;
  const int blocks = (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
  const int64_t stride = static_cast<int64_t>(p.kv_heads) * size;
  const int32_t* table = batch.tables + batch.table_starts[tile.sequence] + first / BLOCK_TOKENS;
  const Value* values[SPAN / BLOCK_TOKENS];
  alignas(64) float key_scales[SPAN], value_scales[SPAN];
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* chunk = chunk_of(p, table[b], layer, 0);
    const Value* keys = reinterpret_cast<const Value*>(chunk) + tile.kv_head * size;
    const uint8_t* value_chunk = chunk_of(p, table[b], layer, 1);
    values[b] = reinterpret_cast<const Value*>(value_chunk) + tile.kv_head * size;
    for (int t = 0; t < BLOCK_TOKENS; t += 8) {
      float* to = room.keys.data() + b * BLOCK_TOKENS + t;
      constexpr int wide = KIND == KV_BF16 ? 16 : 8;  // dimensions in 8 times 32 bits
      for (int d = 0; d < size; d += wide, to += 8 * SPAN) {
        __m256 in[8];
        ahead.some();
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) in[i] = Stored<KIND>::eight(keys + (t + i) * stride + d);
        transpose8(in, to, SPAN);
      }
    }
    if (KIND == KV_INT8) {
      for (int t = 0; t < BLOCK_TOKENS; ++t) {
        const int at = t * p.kv_heads + tile.kv_head;
        key_scales[b * BLOCK_TOKENS + t] = scale_at(p, scales_in(p, chunk), at);
        value_scales[b * BLOCK_TOKENS + t] = scale_at(p, scales_in(p, value_chunk), at);
      }
    }
  }
  for (int i = blocks * BLOCK_TOKENS; i < SPAN; ++i) key_scales[i] = value_scales[i] = 0.0f;
  float* scores = room.scores.data();
  for (int at = 0; at < queries; at += TILE_SCORES) {
    const float* from = q + at * size;
    const int count = queries - at < TILE_SCORES ? queries - at : TILE_SCORES;
    for (int b = 0; b < blocks; ++b) {
      const float* keys = room.keys.data() + b * BLOCK_TOKENS;
      float* to = scores + at * SPAN + b * BLOCK_TOKENS;
      switch (count) {
        case 1: scores_of<1, KIND == KV_BF16>(from, size, keys, to, ahead); break;
        case 2: scores_of<2, KIND == KV_BF16>(from, size, keys, to, ahead); break;
        case 3: scores_of<3, KIND == KV_BF16>(from, size, keys, to, ahead); break;
        case 4: scores_of<4, KIND == KV_BF16>(from, size, keys, to, ahead); break;
        case 5: scores_of<5, KIND == KV_BF16>(from, size, keys, to, ahead); break;
        default: scores_of<6, KIND == KV_BF16>(from, size, keys, to, ahead);
      }
    }
  }
  const bool scaled = KIND == KV_INT8;
  soften(scores, tile.last - tile.first, group, tile.position, window, first, scaled ? key_scales : nullptr,
         scaled ? value_scales : nullptr, room.peak.data(), room.weight.data());
  for (int at = 0; at < queries; at += TILE_SCORES) {
    const float* weights = scores + at * SPAN;
    float* to = room.span.data() + at * size;
    const int count = queries - at < TILE_SCORES ? queries - at : TILE_SCORES;
    for (int d = 0; d < size; d += PANEL) {
      switch (count) {
        case 1: mix_of<1, KIND>(weights, values, blocks, stride, d, size, to, ahead); break;
        case 2: mix_of<2, KIND>(weights, values, blocks, stride, d, size, to, ahead); break;
        case 3: mix_of<3, KIND>(weights, values, blocks, stride, d, size, to, ahead); break;
        case 4: mix_of<4, KIND>(weights, values, blocks, stride, d, size, to, ahead); break;
        case 5: mix_of<5, KIND>(weights, values, blocks, stride, d, size, to, ahead); break;
        default: mix_of<6, KIND>(weights, values, blocks, stride, d, size, to, ahead);
      }
    }
  }
}

static void span_of_kind(const Pool& p, const Batch& batch, int layer, const Tile& tile, int group, int window,
                         int index, const float* q, Ahead& ahead, TileRoom& room) {
  switch (p.kind) {
    case KV_F32: return span_of<KV_F32>(p, batch, layer, tile, group, window, index, q, ahead, room);
    case KV_BF16: return span_of<KV_BF16>(p, batch, layer, tile, group, window, index, q, ahead, room);
    default: return span_of<KV_INT8>(p, batch, layer, tile, group, window, index, q, ahead, room);
  }
}

// Tiles of the same rows that one thread takes together, span by span, so that it reads the pool in
// the order in which it lies: those of all KV heads, unless they are many rows.
struct Item {
  int first, last;
};

// One step's tiles, the same for all layers.
struct Tiles {
  std::vector<Tile> tiles;
  std::vector<Item> items;
  int spans_max = 0;  // of the longest sequence
  int queries_max = 0;

  Tiles(const Batch& batch, int kv_heads, int group) {
    const int rows_max = TILE_QUERIES / group > 0 ? TILE_QUERIES / group : 1;
    for (int s = 0; s < batch.sequences; ++s) {
      const int start = batch.starts[s], stop = batch.starts[s + 1];
      const int before = batch.lengths[s] - (stop - start);
      const int spans = (batch.lengths[s] + SPAN - 1) / SPAN;
      if (spans > spans_max) spans_max = spans;
      for (int first = start; first < stop; first += rows_max) {
        const int last = first + rows_max < stop ? first + rows_max : stop, queries = (last - first) * group;
        if (queries > queries_max) queries_max = queries;
        const int together = queries * kv_heads <= TILE_QUERIES ? kv_heads : 1;
        for (int h = 0; h < kv_heads; ++h) {
          const int at = static_cast<int>(tiles.size());
          if (h % together == 0) items.push_back({at, at + together});
          tiles.push_back({s, h, first, last, before + first - start});
        }
      }
    }
  }
};

struct AttentionRoom {
  std::vector<TileRoom> threads;
  std::vector<float> parts;  // of tiles whose spans are computed apart: [span][tile][query][2 + size]
};

// Fewer items than this for each thread, of at most so many queries each, and their spans are shared
// out too. It changes no result; the second limit bounds what the parts take.
constexpr int ITEMS_PER_THREAD = 4;
constexpr int QUERIES_APART_MAX = 16;

HR_INLINE bool takes_spans_apart(const Team& team, const Tiles& step) {
  return team.size() > 1 && static_cast<int>(step.items.size()) < team.size() * ITEMS_PER_THREAD &&
         step.spans_max > 1 && step.queries_max <= QUERIES_APART_MAX;
}

// Where attention's results go: floats, and rounded for the matrix that is next, if `next` is there.
struct Mixed {
  float* out;
  const Rows* next = nullptr;
};

// Part `which` of `parts` of what a tile's span reads in a layer, nothing behind its last.
HR_INLINE Ahead ahead_of(const Pool& pool, const Batch& batch, int layer, const Tile& tile, int index, int which,
                         int parts) {
  Ahead ahead;
  const int end = tile.position + tile.last - tile.first, blocks = (end + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
  const int first = index * (SPAN / BLOCK_TOKENS);
  const int32_t* table = batch.tables + batch.table_starts[tile.sequence];
  ahead.bytes = static_cast<int>(2 * pool.chunk_bytes / parts);
  for (int b = first; b < blocks && b < first + SPAN / BLOCK_TOKENS; ++b)
    ahead.parts[ahead.count++] = chunk_of(pool, table[b], layer, 0) + which * ahead.bytes;
  return ahead;
}

// The span with which a thread begins a layer's attention, where spans are shared out: to be asked for
// before. Empty where they are not, or where it lies before the window.
static Ahead first_ahead(const Team& team, int thread, const Pool& pool, const Batch& batch, int layer,
                         int window, const Tiles& step) {
  const int tiles = static_cast<int>(step.tiles.size());
  if (!takes_spans_apart(team, step)) return {};
  const int first = team.share(tiles * step.spans_max, thread), index = first / tiles;
  const Tile& tile = step.tiles[first % tiles];
  if (window != 0 && (index + 1) * SPAN <= tile.position - window + 1) return {};
  return ahead_of(pool, batch, layer, tile, index, 0, 1);
}

// What a layer's attention reads and writes. q [rows, q_stride], out [rows, heads * size].
struct Attention {
  const Pool& pool;
  const Batch& batch;
  const Tiles& step;
  int layer, heads, group;
  float scale;
  int window;
  const float* q;
  int q_stride;
  Mixed mixed;

  int first_span(const Tile& tile) const {
    return window != 0 && tile.position - window + 1 > 0 ? (tile.position - window + 1) / SPAN : 0;
  }
  int end_of(const Tile& tile) const { return tile.position + tile.last - tile.first; }
  Ahead span(const Tile& tile, int index, int which, int parts) const {
    return ahead_of(pool, batch, layer, tile, index, which, parts);
  }
};

HR_INLINE void take_queries(const Attention& a, const Tile& tile, float* to) {
  const int size = a.pool.head_dim, wide = a.group * size;
  for (int r = tile.first; r < tile.last; ++r, to += wide) {
    const float* from = a.q + static_cast<int64_t>(r) * a.q_stride + tile.kv_head * wide;
    for (int i = 0; i < wide; i += W) store(to + i, mul(load(from + i), set1(a.scale)));
  }
}

HR_INLINE void give(const Attention& a, const Tile& tile, const float* all, const float* weights) {
  const int size = a.pool.head_dim, wide = a.group * size;
  for (int r = tile.first; r < tile.last; ++r) {
    float* to = a.mixed.out + static_cast<int64_t>(r) * a.heads * size + tile.kv_head * wide;
    for (int g = 0; g < a.group; ++g, all += size, ++weights) {
      vf whole = set1(*weights);
      for (int d = 0; d < size; d += W) store(to + g * size + d, div(load(all + d), whole));
    }
    if (a.mixed.next != nullptr) quantize_part(to, *a.mixed.next, r, tile.kv_head * wide / GROUP, wide / GROUP);
  }
}

// All spans of an item, one after the other.
static void attend_item(const Attention& a, int number, TileRoom& room) {
  const Item& item = a.step.items[number];
  const Tile& head = a.step.tiles[item.first];
  const int size = a.pool.head_dim, queries = (head.last - head.first) * a.group, tiles = item.last - item.first;
  room.fit(tiles * queries, queries, size);
  for (int t = 0; t < tiles; ++t) take_queries(a, a.step.tiles[item.first + t], room.q.data() + t * queries * size);
  std::fill_n(room.all_peaks.data(), tiles * queries, -INFINITY);
  std::fill_n(room.all_weights.data(), tiles * queries, 0.0f);
  for (int s = a.first_span(head); s * SPAN < a.end_of(head); ++s) {
    const bool done = (s + 1) * SPAN >= a.end_of(head), more = number + 1 < static_cast<int>(a.step.items.size());
    const Tile& next = done && more ? a.step.tiles[a.step.items[number + 1].first] : head;
    const int next_span = done ? a.first_span(next) : s + 1;
    for (int t = 0; t < tiles; ++t) {
      const int at = t * queries;
      Ahead ahead;
      if (tiles == a.pool.kv_heads && (more || !done)) ahead = a.span(next, next_span, t, tiles);
      span_of_kind(a.pool, a.batch, a.layer, a.step.tiles[item.first + t], a.group, a.window, s,
                   room.q.data() + at * size, ahead, room);
      for (int i = 0; i < queries; ++i)
        if (room.weight[i] >= 0.0f || room.weight[i] != room.weight[i])
          merge(room.peak[i], room.weight[i], room.span.data() + i * size, size, room.all_peaks[at + i],
                room.all_weights[at + i], room.total.data() + (at + i) * size);
    }
  }
  for (int t = 0; t < tiles; ++t) {
    const int at = t * queries;
    give(a, a.step.tiles[item.first + t], room.total.data() + at * size, room.all_weights.data() + at);
  }
}

// One span of one tile, kept for `join`.
static void attend_part(const Attention& a, const Tile& tile, int s, float* parts, TileRoom& room) {
  const int size = a.pool.head_dim, queries = (tile.last - tile.first) * a.group, part = 2 + size;
  const bool seen = a.window == 0 || (s + 1) * SPAN > tile.position - a.window + 1;
  if (s * SPAN >= a.end_of(tile) || !seen) {
    for (int i = 0; i < queries; ++i) parts[i * part + 1] = -1.0f;
    return;
  }
  room.fit(queries, queries, size);
  take_queries(a, tile, room.q.data());
  Ahead ahead = a.span(tile, s + 1, tile.kv_head, a.pool.kv_heads);
  span_of_kind(a.pool, a.batch, a.layer, tile, a.group, a.window, s, room.q.data(), ahead, room);
  for (int i = 0; i < queries; ++i) {
    parts[i * part] = room.peak[i];
    parts[i * part + 1] = room.weight[i];
    std::memcpy(parts + i * part + 2, room.span.data() + i * size, size * sizeof(float));
  }
}

// A tile's parts in the order of their spans, `step` floats from one to the next.
static void join(const Attention& a, const Tile& tile, const float* parts, int64_t step, TileRoom& room) {
  const int size = a.pool.head_dim, queries = (tile.last - tile.first) * a.group, part = 2 + size;
  room.fit(queries, queries, size);
  for (int i = 0; i < queries; ++i) {
    float peak = -INFINITY, weight = 0.0f;
    const float* from = parts + i * part;
    for (int s = 0; s < a.step.spans_max; ++s, from += step)
      if (from[1] != -1.0f) merge(from[0], from[1], from + 2, size, peak, weight, room.total.data() + i * size);
    room.all_weights[i] = weight;
  }
  give(a, tile, room.total.data(), room.all_weights.data());
}

static void attend_tiles(Team& team, int thread, const Attention& a, AttentionRoom& shared) {
  const int tiles = static_cast<int>(a.step.tiles.size()), items = static_cast<int>(a.step.items.size());
  TileRoom& room = shared.threads[thread];
  if (!takes_spans_apart(team, a.step)) {
    team.phase(items, 1, [&](int from, int to) {
      for (int i = from; i < to; ++i) attend_item(a, i, room);
    });
    return;
  }
  const int64_t per_part = static_cast<int64_t>(a.step.queries_max) * (2 + a.pool.head_dim);
  float* parts = shared.parts.data();
  team.phase(tiles * a.step.spans_max, 1, [&](int from, int to) {
    for (int i = from; i < to; ++i)
      attend_part(a, a.step.tiles[i % tiles], i / tiles, parts + i * per_part, room);
  });
  team.phase(tiles, 1, [&](int from, int to) {
    for (int t = from; t < to; ++t) join(a, a.step.tiles[t], parts + t * per_part, tiles * per_part, room);
  });
}

HR_INLINE void ready(AttentionRoom& room, const Team& team, const Tiles& step, int size) {
  if (static_cast<int>(room.threads.size()) < team.size()) room.threads.resize(team.size());
  if (takes_spans_apart(team, step)) {
    size_t needed = step.tiles.size() * step.spans_max * step.queries_max * (2 + size);
    if (room.parts.size() < needed) room.parts.resize(needed);
  }
}

static void attend(const Pool& p, const Batch& batch, int layer, int heads, float scale, int window,
                   const float* q, int q_stride, const float* k, const float* v, int kv_stride, float* out) {
  if (batch.rows == 0) return;
  static AttentionRoom room;
  Turn turn;
  Team& team = turn.team();
  Tiles step(batch, p.kv_heads, heads / p.kv_heads);
  ready(room, team, step, p.head_dim);
  const Attention a{p, batch, step, layer, heads, heads / p.kv_heads, scale, window, q, q_stride, {out}};
  team.run([&](int thread) {
    team.phase(batch.rows, team.grain(batch.rows), [&](int first, int last) {
      for (int r = first; r < last; ++r)
        for (int h = 0; h < p.kv_heads; ++h) {
          const int64_t at = static_cast<int64_t>(r) * kv_stride + h * p.head_dim;
          keep(p, batch.slots[r], layer, 0, h, k + at);
          keep(p, batch.slots[r], layer, 1, h, v + at);
        }
    });
    attend_tiles(team, thread, a, room);
  });
}
