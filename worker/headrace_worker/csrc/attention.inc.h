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
  static inline __attribute__((always_inline)) __m256 eight(const uint16_t* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
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

// One row's keys or values of all KV heads into the pool.
static void keep(const Pool& p, int64_t slot, int layer, int value, const float* x) {
  const int token = static_cast<int>(slot % BLOCK_TOKENS), size = p.kv_heads * p.head_dim;
  uint8_t* chunk = chunk_of(p, slot / BLOCK_TOKENS, layer, value);
  if (p.kind == KV_F32) {
    std::memcpy(reinterpret_cast<float*>(chunk) + static_cast<int64_t>(token) * size, x, size * sizeof(float));
  } else if (p.kind == KV_BF16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(chunk) + static_cast<int64_t>(token) * size;
    for (int i = 0; i < size; ++i) to[i] = to_bf16(x[i]);
  } else {
    int8_t* to = reinterpret_cast<int8_t*>(chunk) + static_cast<int64_t>(token) * size;
    uint8_t* scales = const_cast<uint8_t*>(scales_in(p, chunk));
    for (int h = 0; h < p.kv_heads; ++h) {
      const float* from = x + h * p.head_dim;
      float most = 0.0f;
      for (int i = 0; i < p.head_dim; ++i) most = std::fabs(from[i]) > most ? std::fabs(from[i]) : most;
      float scale = most / 127.0f > SMALLEST ? most / 127.0f : SMALLEST;
      if (!(most <= 3.4e38f)) scale = NAN;
      if (p.scale_kind == KV_F32) {
        reinterpret_cast<float*>(scales)[token * p.kv_heads + h] = scale;
      } else {
        uint16_t rounded = to_bf16(scale);
        reinterpret_cast<uint16_t*>(scales)[token * p.kv_heads + h] = rounded;
        scale = from_bf16(rounded);
      }
      for (int i = 0; i < p.head_dim; ++i) {
        float q = std::nearbyint(from[i] / scale);
        if (q != q) q = 0;
        to[h * p.head_dim + i] = static_cast<int8_t>(q > 127 ? 127 : q < -127 ? -127 : q);
      }
    }
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

// scores [R][SPAN] of 16 tokens: q [R, size] times turned keys [size][SPAN].
template <int R>
static void scores_of(const float* q, int size, const float* keys, float* scores) {
  vf acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = zero();
  for (int d = 0; d < size; ++d) {
    vf key[NV];
    for (int v = 0; v < NV; ++v) key[v] = load(keys + d * SPAN + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf value = set1(q[r * size + d]);
      for (int v = 0; v < NV; ++v) acc[r][v] = fma(key[v], value, acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(scores + r * SPAN + v * W, acc[r][v]);
}

// mixed [R][size], 16 dimensions of it: weights [R][SPAN] times the values of `blocks` blocks.
template <int R, int KIND>
static void mix_of(const float* weights, const typename Stored<KIND>::type* const* values, int blocks,
                   int64_t stride, int at, int size, float* mixed) {
  vf acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = zero();
  for (int b = 0; b < blocks; ++b) {
    const typename Stored<KIND>::type* from = values[b] + at;
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

// What one thread needs for a tile of queries.
struct TileRoom {
  std::vector<float> q, keys, scores, span, total;
  std::vector<float> peak, weight;

  void fit(int queries, int size) {
    size_t wide = static_cast<size_t>(queries) * size;
    if (q.size() < wide) {
      q.resize(wide);
      span.resize(wide);
      total.resize(wide);
    }
    if (scores.size() < static_cast<size_t>(queries) * SPAN) {
      scores.resize(queries * SPAN);
      peak.resize(queries);
      weight.resize(queries);
    }
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
                    int index, TileRoom& room) {
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
      for (int d = 0; d < size; d += 8) {
        __m256 in[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) in[i] = Stored<KIND>::eight(keys + (t + i) * stride + d);
        transpose8(in, to + d * SPAN, SPAN);
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
  for (int q = 0; q < queries; q += TILE_SCORES) {
    const float* from = room.q.data() + q * size;
    const int count = queries - q < TILE_SCORES ? queries - q : TILE_SCORES;
    for (int b = 0; b < blocks; ++b) {
      const float* keys = room.keys.data() + b * BLOCK_TOKENS;
      float* to = scores + q * SPAN + b * BLOCK_TOKENS;
      switch (count) {
        case 1: scores_of<1>(from, size, keys, to); break;
        case 2: scores_of<2>(from, size, keys, to); break;
        case 3: scores_of<3>(from, size, keys, to); break;
        case 4: scores_of<4>(from, size, keys, to); break;
        case 5: scores_of<5>(from, size, keys, to); break;
        default: scores_of<6>(from, size, keys, to);
      }
    }
  }
  const bool scaled = KIND == KV_INT8;
  soften(scores, tile.last - tile.first, group, tile.position, window, first, scaled ? key_scales : nullptr,
         scaled ? value_scales : nullptr, room.peak.data(), room.weight.data());
  for (int q = 0; q < queries; q += TILE_SCORES) {
    const float* weights = scores + q * SPAN;
    float* to = room.span.data() + q * size;
    const int count = queries - q < TILE_SCORES ? queries - q : TILE_SCORES;
    for (int d = 0; d < size; d += PANEL) {
      switch (count) {
        case 1: mix_of<1, KIND>(weights, values, blocks, stride, d, size, to); break;
        case 2: mix_of<2, KIND>(weights, values, blocks, stride, d, size, to); break;
        case 3: mix_of<3, KIND>(weights, values, blocks, stride, d, size, to); break;
        case 4: mix_of<4, KIND>(weights, values, blocks, stride, d, size, to); break;
        case 5: mix_of<5, KIND>(weights, values, blocks, stride, d, size, to); break;
        default: mix_of<6, KIND>(weights, values, blocks, stride, d, size, to);
      }
    }
  }
}

static void span_of_kind(const Pool& p, const Batch& batch, int layer, const Tile& tile, int group, int window,
                         int index, TileRoom& room) {
  switch (p.kind) {
    case KV_F32: return span_of<KV_F32>(p, batch, layer, tile, group, window, index, room);
    case KV_BF16: return span_of<KV_BF16>(p, batch, layer, tile, group, window, index, room);
    default: return span_of<KV_INT8>(p, batch, layer, tile, group, window, index, room);
  }
}

// One step's tiles, the same for all layers.
struct Tiles {
  std::vector<Tile> tiles;
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
        const int last = first + rows_max < stop ? first + rows_max : stop;
        if ((last - first) * group > queries_max) queries_max = (last - first) * group;
        for (int h = 0; h < kv_heads; ++h) tiles.push_back({s, h, first, last, before + first - start});
      }
    }
  }
};

struct AttentionRoom {
  std::vector<TileRoom> threads;
  std::vector<float> parts;  // of tiles whose spans are computed apart: [tile][span][query][2 + size]
};

// Fewer tiles than this for each thread, of at most so many queries each, and their spans are shared
// out too. It changes no result; the second limit bounds what the parts take.
constexpr int TILES_PER_THREAD = 4;
constexpr int QUERIES_APART_MAX = 16;

HR_INLINE bool takes_spans_apart(const Team& team, const Tiles& step) {
  return team.size() > 1 && static_cast<int>(step.tiles.size()) < team.size() * TILES_PER_THREAD &&
         step.spans_max > 1 && step.queries_max <= QUERIES_APART_MAX;
}

HR_INLINE void take_queries(const Tile& tile, int group, int size, float scale, const float* q, int q_stride,
                            TileRoom& room) {
  for (int r = tile.first; r < tile.last; ++r) {
    const float* from = q + static_cast<int64_t>(r) * q_stride + tile.kv_head * group * size;
    float* to = room.q.data() + (r - tile.first) * group * size;
    for (int i = 0; i < group * size; i += W) store(to + i, mul(load(from + i), set1(scale)));
  }
}

HR_INLINE void give(const Tile& tile, int group, int heads, int size, const float* all, const float* weights,
                    float* out) {
  for (int r = tile.first; r < tile.last; ++r)
    for (int g = 0; g < group; ++g) {
      const int query = (r - tile.first) * group + g;
      float* to = out + static_cast<int64_t>(r) * heads * size + (tile.kv_head * group + g) * size;
      vf whole = set1(weights[query]);
      for (int d = 0; d < size; d += W) store(to + d, div(load(all + query * size + d), whole));
    }
}

// out [rows, heads * size] for q [rows, heads * size] with `q_stride` floats from row to row.
static void attend_tiles(Team& team, int thread, const Pool& p, const Batch& batch, const Tiles& step, int layer,
                         int heads, float scale, int window, const float* q, int q_stride, float* out,
                         AttentionRoom& shared) {
  const int group = heads / p.kv_heads, size = p.head_dim, count = static_cast<int>(step.tiles.size());
  TileRoom& room = shared.threads[thread];
  const int part = 2 + size;
  const int64_t per_span = static_cast<int64_t>(step.queries_max) * part;
  if (!takes_spans_apart(team, step)) {
    team.phase(count, 1, [&](int from, int to) {
      for (int t = from; t < to; ++t) {
        const Tile& tile = step.tiles[t];
        const int queries = (tile.last - tile.first) * group;
        room.fit(queries, size);
        take_queries(tile, group, size, scale, q, q_stride, room);
        std::vector<float> peaks(queries, -INFINITY), weights(queries, 0.0f);
        const int end = tile.position + tile.last - tile.first;
        const int begin = window != 0 && tile.position - window + 1 > 0 ? (tile.position - window + 1) / SPAN : 0;
        for (int s = begin; s * SPAN < end; ++s) {
          span_of_kind(p, batch, layer, tile, group, window, s, room);
          for (int i = 0; i < queries; ++i)
            if (room.weight[i] >= 0.0f || room.weight[i] != room.weight[i])
              merge(room.peak[i], room.weight[i], room.span.data() + i * size, size, peaks[i], weights[i],
                    room.total.data() + i * size);
        }
        give(tile, group, heads, size, room.total.data(), weights.data(), out);
      }
    });
    return;
  }
  const int spans = step.spans_max;
  team.phase(count * spans, 1, [&](int from, int to) {
    for (int item = from; item < to; ++item) {
      const Tile& tile = step.tiles[item / spans];
      const int s = item % spans, queries = (tile.last - tile.first) * group;
      float* parts = shared.parts.data() + item * per_span;
      const int end = tile.position + tile.last - tile.first;
      const bool seen = window == 0 || (s + 1) * SPAN > tile.position - window + 1;
      if (s * SPAN >= end || !seen) {
        for (int i = 0; i < queries; ++i) parts[i * part + 1] = -1.0f;
        continue;
      }
      room.fit(queries, size);
      take_queries(tile, group, size, scale, q, q_stride, room);
      span_of_kind(p, batch, layer, tile, group, window, s, room);
      for (int i = 0; i < queries; ++i) {
        parts[i * part] = room.peak[i];
        parts[i * part + 1] = room.weight[i];
        std::memcpy(parts + i * part + 2, room.span.data() + i * size, size * sizeof(float));
      }
    }
  });
  team.phase(count, 1, [&](int from, int to) {
    for (int t = from; t < to; ++t) {
      const Tile& tile = step.tiles[t];
      const int queries = (tile.last - tile.first) * group;
      room.fit(queries, size);
      std::vector<float> weights(queries, 0.0f);
      for (int i = 0; i < queries; ++i) {
        float peak = -INFINITY;
        for (int s = 0; s < spans; ++s) {
          const float* parts = shared.parts.data() + (static_cast<int64_t>(t) * spans + s) * per_span + i * part;
          if (parts[1] == -1.0f) continue;
          merge(parts[0], parts[1], parts + 2, size, peak, weights[i], room.total.data() + i * size);
        }
      }
      give(tile, group, heads, size, room.total.data(), weights.data(), out);
    }
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
  team.run([&](int thread) {
    team.phase(batch.rows, team.grain(batch.rows), [&](int first, int last) {
      for (int r = first; r < last; ++r) {
        keep(p, batch.slots[r], layer, 0, k + static_cast<int64_t>(r) * kv_stride);
        keep(p, batch.slots[r], layer, 1, v + static_cast<int64_t>(r) * kv_stride);
      }
    });
    attend_tiles(team, thread, p, batch, step, layer, heads, scale, window, q, q_stride, out, room);
  });
}
