// Matrices times rows of activations, 16 outputs at a time. Included once per instruction set.
//
// Invariant: a row's result depends on that row alone, bit for bit, in whatever batch or tile it
// stands. Within a group the sum is over integers; groups are added in the order of the columns, by
// one accumulator for each output and run of columns (see Matrix), and runs two by two. So tiles of
// several rows only share the loads of the weights.
//
// Quantized formats round each row to int8 by groups of 32 columns, as llama.cpp's Q8_0 does, not by
// whole rows: an outlier then spoils 31 neighbours and not all of the row. In 8 bits each group is
// turned by a Hadamard matrix first, which spreads the outlier over its group; weights come turned.

constexpr int NV = PANEL / W;
constexpr int Q8_BYTES = GROUP * PANEL + 2 * PANEL;
constexpr int Q4_BYTES = GROUP * PANEL / 2 + 4 * PANEL;
constexpr int TILE_QUANTIZED = W == 8 ? 4 : 8;  // rows whose sums fit into the registers
constexpr int TILE_F32 = W == 8 ? 6 : 8;
constexpr int TILE_MAX = 8;
constexpr int64_t ROW_BLOCK_BYTES = 256 << 10;  // activations that stay in the second-level cache
constexpr float SMALLEST = 1e-30f;              // groups below are taken for zero

// Rows of activations in the form that a format multiplies.
struct Rows {
  int format = FORMAT_F32;
  int columns = 0, groups = 0;
  const float* x = nullptr;  // FORMAT_F32: the rows as they are
  int64_t stride = 0;        // floats or bytes from row to row
  uint8_t* bytes = nullptr;
  float* scales = nullptr;     // [rows, groups]
  float* sums = nullptr;       // scale times the sum of a group's integers
  int32_t* offsets = nullptr;  // minus 128 times that sum: stored weights are 128 too large
};

HR_INLINE int padded(int columns) { return (columns + GROUP - 1) / GROUP * GROUP; }
HR_INLINE int panels_of(int outs) { return (outs + PANEL - 1) / PANEL; }
HR_INLINE bool wide(int format) { return WIDE_Q8 && format == FORMAT_Q8; }

HR_INLINE float sum8(__m256 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
HR_INLINE float largest8(__m256 a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
HR_INLINE int32_t isum8(__m256i a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// One group times Sylvester's Hadamard matrix of 32, in place: five rounds of sums and differences.
HR_INLINE void turn_group(float* x) {
  __m256 v[4];
  for (int i = 0; i < 4; ++i) {
    __m256 a = _mm256_loadu_ps(x + i * 8), b = _mm256_permute_ps(a, 0xb1);
    a = _mm256_blend_ps(_mm256_add_ps(a, b), _mm256_sub_ps(b, a), 0xaa);
    b = _mm256_permute_ps(a, 0x4e);
    a = _mm256_blend_ps(_mm256_add_ps(a, b), _mm256_sub_ps(b, a), 0xcc);
    b = _mm256_permute2f128_ps(a, a, 1);
    v[i] = _mm256_blend_ps(_mm256_add_ps(a, b), _mm256_sub_ps(b, a), 0xf0);
  }
  __m256 low = _mm256_add_ps(v[0], v[1]), low_difference = _mm256_sub_ps(v[0], v[1]);
  __m256 high = _mm256_add_ps(v[2], v[3]), high_difference = _mm256_sub_ps(v[2], v[3]);
  _mm256_storeu_ps(x, _mm256_add_ps(low, high));
  _mm256_storeu_ps(x + 8, _mm256_add_ps(low_difference, high_difference));
  _mm256_storeu_ps(x + 16, _mm256_sub_ps(low, high));
  _mm256_storeu_ps(x + 24, _mm256_sub_ps(low_difference, high_difference));
}

// Rounds one group of 32 floats to int8. Where a number is not finite, the scale is NaN.
HR_INLINE void quantize_group(const float* x, const Rows& a, int row, int g, bool two_bytes) {
  const __m256 sign = _mm256_set1_ps(-0.0f), nothing = _mm256_setzero_ps();
  __m256 v[4], top = nothing, poison = nothing;
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_loadu_ps(x + i * 8);
    top = _mm256_max_ps(top, _mm256_andnot_ps(sign, v[i]));
    poison = _mm256_fmadd_ps(v[i], nothing, poison);
  }
  const float most = largest8(top), broken = sum8(poison);
  const float inverse = most > SMALLEST ? 127.0f / most : 0.0f;
  const float scale = (most > SMALLEST ? most / 127.0f : 0.0f) + broken;
  __m256i n[4];
  for (int i = 0; i < 4; ++i) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], _mm256_set1_ps(inverse)));
  const int32_t all = isum8(_mm256_add_epi32(_mm256_add_epi32(n[0], n[1]), _mm256_add_epi32(n[2], n[3])));
  const int64_t at = static_cast<int64_t>(row) * a.groups + g;
  a.scales[at] = scale;
  a.sums[at] = scale * static_cast<float>(all);
  a.offsets[at] = -128 * all;
  // packing takes the two halves of its operands in turn, so they are put in order after it
  __m256i low = _mm256_permute4x64_epi64(_mm256_packs_epi32(n[0], n[1]), 0xd8);
  __m256i high = _mm256_permute4x64_epi64(_mm256_packs_epi32(n[2], n[3]), 0xd8);
  uint8_t* to = a.bytes + row * a.stride + g * GROUP * (two_bytes ? 2 : 1);
  if (!two_bytes) {
    __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
    return;
  }
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4,
                                         5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_shuffle_epi8(low, order));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm256_shuffle_epi8(high, order));
}

// Rounds `groups` groups of a row from number `first` on; x: where the first of them stands.
static void quantize_part(const float* x, const Rows& a, int row, int first, int groups) {
  const bool two_bytes = wide(a.format);
  for (int g = first; g < first + groups; ++g, x += GROUP) {
    const int left = a.columns - g * GROUP;
    if (a.format != FORMAT_Q8 && left >= GROUP) {
      quantize_group(x, a, row, g, two_bytes);
      continue;
    }
    alignas(64) float group[GROUP] = {};
    std::memcpy(group, x, (left < GROUP ? left : GROUP) * sizeof(float));
    if (a.format == FORMAT_Q8) turn_group(group);
    quantize_group(group, a, row, g, two_bytes);
  }
}

static void quantize_row(const float* x, const Rows& a, int row) { quantize_part(x, a, row, 0, a.groups); }

// Takes a run's sums in: acc becomes the sum of all runs up to number `run` that it makes a pair of.
template <int R>
HR_INLINE void pair_up(int run, vf (&acc)[R][NV], vf (&kept)[2][R][NV]) {
  int level = 0;
  for (; run & 1; run >>= 1, ++level)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) acc[r][v] = add(kept[level][r][v], acc[r][v]);
  if (level > 1) return;
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) kept[level][r][v] = acc[r][v];
}

// out [R][16]: of each run of columns what `sum_of(first, last, acc)` adds to zeros, paired up.
template <int R, typename F>
HR_INLINE void sum_runs(const Matrix& m, int columns, float* out, const F& sum_of) {
  vf acc[R][NV], kept[2][R][NV];
  int first = 0;
  for (int run = 0;; ++run) {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) acc[r][v] = zero();
    const int last = run < m.cuts ? m.cut[run] : columns;
    sum_of(first, last, acc);
    first = last;
    if (m.cuts == 0) break;
    pair_up<R>(run, acc, kept);
    if (run == m.cuts) break;
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(out + r * PANEL + v * W, acc[r][v]);
}

// Products of R rows with one panel: out [R][16].

template <int R>
static void tile_f32(const Matrix& m, const Rows& a, int panel, int row, float* out) {
  const float* w = reinterpret_cast<const float*>(m.panels) + static_cast<int64_t>(panel) * m.columns * PANEL;
  const float* x = a.x + row * a.stride;
  sum_runs<R>(m, m.columns, out, [&](int first, int last, vf(&acc)[R][NV]) __attribute__((always_inline)) {
    for (int k = first; k < last; ++k) {
      vf weight[NV];
      for (int v = 0; v < NV; ++v) weight[v] = load(w + k * PANEL + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        vf value = set1(x[r * a.stride + k]);
        for (int v = 0; v < NV; ++v) acc[r][v] = fma(weight[v], value, acc[r][v]);
      }
    }
  });
}

template <int R>
static void tile_q8(const Matrix& m, const Rows& a, int panel, int row, float* out) {
  const uint8_t* w = m.panels + static_cast<int64_t>(panel) * a.groups * Q8_BYTES;
  const uint8_t* bytes = a.bytes + row * a.stride;
  const int64_t start = static_cast<int64_t>(row) * a.groups;
  sum_runs<R>(m, a.groups, out, [&](int first, int last, vf(&acc)[R][NV]) __attribute__((always_inline)) {
    for (int g = first; g < last; ++g, w += Q8_BYTES) {
      vi s[R][NV];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) s[r][v] = iset1(a.offsets[start + r * a.groups + g]);
      dot_q8<R>(w, bytes + g * GROUP * (WIDE_Q8 ? 2 : 1), a.stride, s);
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(w + GROUP * PANEL);
      vf scale[NV];
      for (int v = 0; v < NV; ++v) scale[v] = bf16(scales + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        vf row_scale = set1(a.scales[start + r * a.groups + g]);
        for (int v = 0; v < NV; ++v) acc[r][v] = fma(mul(to_float(s[r][v]), row_scale), scale[v], acc[r][v]);
      }
    }
  });
}

template <int R>
static void tile_q4(const Matrix& m, const Rows& a, int panel, int row, float* out) {
  const uint8_t* w = m.panels + static_cast<int64_t>(panel) * a.groups * Q4_BYTES;
  const uint8_t* bytes = a.bytes + row * a.stride;
  const int64_t start = static_cast<int64_t>(row) * a.groups;
  sum_runs<R>(m, a.groups, out, [&](int first, int last, vf(&acc)[R][NV]) __attribute__((always_inline)) {
    for (int g = first; g < last; ++g, w += Q4_BYTES) {
      vi s[R][NV];
      dot_q4<R>(w, bytes + g * GROUP, a.stride, s);
      const uint16_t* factors = reinterpret_cast<const uint16_t*>(w + GROUP * PANEL / 2);
      vf scale[NV], zero_point[NV];
      for (int v = 0; v < NV; ++v) {
        scale[v] = bf16(factors + v * W);
        // a weight is (q - 8) * scale + zero
        zero_point[v] = fma(set1(-8.0f), scale[v], bf16(factors + PANEL + v * W));
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        vf row_scale = set1(a.scales[start + r * a.groups + g]);
        vf row_sum = set1(a.sums[start + r * a.groups + g]);
        for (int v = 0; v < NV; ++v) {
          acc[r][v] = fma(mul(to_float(s[r][v]), row_scale), scale[v], acc[r][v]);
          acc[r][v] = fma(zero_point[v], row_sum, acc[r][v]);
        }
      }
    }
  });
}

#define HR_TILE(kind, rows)         \
  case rows:                        \
    return kind<rows>(m, a, panel, row, out)
#define HR_TILES(kind)  \
  switch (count) {      \
    HR_TILE(kind, 1);   \
    HR_TILE(kind, 2);   \
    HR_TILE(kind, 3);   \
    HR_TILE(kind, 4);   \
    HR_TILE(kind, 5);   \
    HR_TILE(kind, 6);   \
    HR_TILE(kind, 7);   \
    HR_TILE(kind, 8);   \
  }
#define HR_TILES_OF_4(kind) \
  switch (count) {          \
    HR_TILE(kind, 1);       \
    HR_TILE(kind, 2);       \
    HR_TILE(kind, 3);       \
    HR_TILE(kind, 4);       \
  }

HR_INLINE int tile_rows(int format) { return format == FORMAT_F32 ? TILE_F32 : TILE_QUANTIZED; }

static void tile(const Matrix& m, const Rows& a, int panel, int row, int count, float* out) {
  if (m.format == FORMAT_F32) {
    HR_TILES(tile_f32)
  } else if constexpr (TILE_QUANTIZED == 4) {
    if (m.format == FORMAT_Q8) {
      HR_TILES_OF_4(tile_q8)
    } else {
      HR_TILES_OF_4(tile_q4)
    }
  } else if (m.format == FORMAT_Q8) {
    HR_TILES(tile_q8)
  } else {
    HR_TILES(tile_q4)
  }
}

// Panels that a thread takes at a time: as few as keep it busy for a while, since who is done first
// waits for the other's last turn.
constexpr int64_t TURN_BYTES = 16 << 10;
HR_INLINE int panels_a_turn(const Matrix& m) {
  const int64_t groups = padded(m.columns) / GROUP;
  const int64_t bytes = m.format == FORMAT_F32 ? 4ll * PANEL * m.columns : groups * (m.format == FORMAT_Q8 ? Q8_BYTES : Q4_BYTES);
  return bytes < TURN_BYTES ? static_cast<int>(TURN_BYTES / bytes) : 1;
}

// How many rows are taken through all panels before the next ones: their activations stay cached.
HR_INLINE int row_block(const Matrix& m) {
  int64_t bytes = m.format == FORMAT_F32 ? 4ll * m.columns : (wide(m.format) ? 2ll : 1ll) * padded(m.columns);
  int64_t rows = ROW_BLOCK_BYTES / bytes / 24 * 24;
  return rows < 48 ? 48 : static_cast<int>(rows);
}

// Rows from `start` to `stop` times one panel: its part of out [rows, outs] = residual + rows W^T + bias.
static void multiply_panel(const Matrix& m, const Rows& a, int panel, int start, int stop, const float* residual,
                           float* out) {
  alignas(64) float part[TILE_MAX * PANEL];
  const int step = tile_rows(m.format), at = panel * PANEL, width = m.outs - at < PANEL ? m.outs - at : PANEL;
  for (int row = start; row < stop; row += step) {
    const int count = stop - row < step ? stop - row : step;
    tile(m, a, panel, row, count, part);
    for (int r = 0; r < count; ++r) {
      const int64_t to = static_cast<int64_t>(row + r) * m.outs + at;
      const float* from = part + r * PANEL;
      if (width == PANEL) {
        for (int i = 0; i < PANEL; i += W) {
          vf v = load(from + i);
          if (m.bias != nullptr) v = add(v, load(m.bias + at + i));
          if (residual != nullptr) v = add(v, load(residual + to + i));
          store(out + to + i, v);
        }
        continue;
      }
      for (int i = 0; i < width; ++i) {
        float v = from[i];
        if (m.bias != nullptr) v += m.bias[at + i];
        if (residual != nullptr) v += residual[to + i];
        out[to + i] = v;
      }
    }
  }
}

// out [rows, outs] = residual + rows W^T + bias, by a team. `out` may be the residual. `finish()` is
// called once, when all of it is there.
template <typename F>
static void multiply(Team& team, const Matrix& m, const Rows& a, int rows, const float* residual, float* out,
                     const F& finish) {
  const int panels = panels_of(m.outs), block = row_block(m), blocks = (rows + block - 1) / block;
  team.phase(
      panels * blocks, std::min(team.grain(panels), panels_a_turn(m)),
      [&](int first, int last) {
        for (int item = first; item < last; ++item) {
          const int start = item / panels * block, stop = start + block < rows ? start + block : rows;
          multiply_panel(m, a, item % panels, start, stop, residual, out);
        }
      },
      finish);
}

// Memory for rows of activations, kept from call to call.
struct RowRoom {
  std::vector<uint8_t> bytes;
  std::vector<float> scales, sums;
  std::vector<int32_t> offsets;

  // Room for `rows` rows that `m` is to multiply; for float32 they stay where `x` is.
  Rows rows_for(const Matrix& m, int rows, const float* x) {
    Rows a;
    a.format = m.format;
    a.columns = m.columns;
    if (m.format == FORMAT_F32) {
      a.x = x;
      a.stride = m.columns;
      return a;
    }
    a.groups = padded(m.columns) / GROUP;
    a.stride = static_cast<int64_t>(padded(m.columns)) * (wide(m.format) ? 2 : 1);
    size_t factors = static_cast<size_t>(rows) * a.groups;
    if (bytes.size() < rows * static_cast<size_t>(a.stride)) bytes.resize(rows * a.stride);
    if (scales.size() < factors) {
      scales.resize(factors);
      sums.resize(factors);
      offsets.resize(factors);
    }
    a.bytes = bytes.data();
    a.scales = scales.data();
    a.sums = sums.data();
    a.offsets = offsets.data();
    return a;
  }
};

static void linear(const Matrix& m, const float* x, int rows, const float* residual, float* out) {
  if (rows == 0) return;
  static RowRoom room;
  Turn turn;
  Team& team = turn.team();
  Rows a = room.rows_for(m, rows, x);
  team.run([&](int) {
    if (m.format != FORMAT_F32)
      team.phase(rows, team.grain(rows), [&](int first, int last) {
        for (int r = first; r < last; ++r) quantize_row(x + static_cast<int64_t>(r) * m.columns, a, r);
      });
    multiply(team, m, a, rows, residual, out, [] {});
  });
}
