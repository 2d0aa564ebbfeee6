// Matrices times rows of activations, 16 outputs at a time. Included once per instruction set.
//
// Invariant: a row's result depends on that row alone, bit for bit, in whatever batch or tile it
// stands. Within a group the sum is over integers; groups are added in the order of the columns, by
// one accumulator for each output. So tiles of several rows only share the loads of the weights.
//
// Quantized formats round each row to int8 by groups of 32 columns, as llama.cpp's Q8_0 does, not by
// whole rows: an outlier then spoils 31 neighbours and not all of the row, and no rotation is needed.

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

// Rounds one group of 32 floats to int8. `poison` is 0, or NaN where a number is not finite.
HR_INLINE void quantize_group(const float* x, const Rows& a, int row, int g, bool two_bytes) {
  vf top = zero(), poison = zero();
  for (int i = 0; i < GROUP; i += W) {
    vf v = load(x + i);
    top = max(top, abs(v));
    poison = fma(v, zero(), poison);
  }
  float most = largest(top), broken = sum(poison);
  float inverse = most > SMALLEST ? 127.0f / most : 0.0f;
  float scale = (most > SMALLEST ? most / 127.0f : 0.0f) + broken;
  alignas(64) int8_t q[GROUP];
  vi total = iset1(0);
  for (int i = 0; i < GROUP; i += W) {
    vi n = to_int(mul(load(x + i), set1(inverse)));
    total = iadd(total, n);
    store_int8(q + i, n);
  }
  int32_t all = isum(total);
  int64_t at = static_cast<int64_t>(row) * a.groups + g;
  a.scales[at] = scale;
  a.sums[at] = scale * static_cast<float>(all);
  a.offsets[at] = -128 * all;
  uint8_t* to = a.bytes + row * a.stride + g * GROUP * (two_bytes ? 2 : 1);
  if (!two_bytes) {
    std::memcpy(to, q, GROUP);
    return;
  }
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4,
                                         5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  for (int i = 0; i < GROUP; i += 16) {
    __m256i words = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(q + i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * 2), _mm256_shuffle_epi8(words, order));
  }
}

static void quantize_row(const float* x, const Rows& a, int row) {
  bool two_bytes = wide(a.format);
  int whole = a.columns / GROUP;
  for (int g = 0; g < whole; ++g) quantize_group(x + g * GROUP, a, row, g, two_bytes);
  if (whole < a.groups) {
    float rest[GROUP] = {};
    std::memcpy(rest, x + whole * GROUP, (a.columns - whole * GROUP) * sizeof(float));
    quantize_group(rest, a, row, whole, two_bytes);
  }
}

// Products of R rows with one panel: out [R][16].

template <int R>
static void tile_f32(const Matrix& m, const Rows& a, int panel, int row, float* out) {
  const float* w = reinterpret_cast<const float*>(m.panels) + static_cast<int64_t>(panel) * m.columns * PANEL;
  const float* x = a.x + row * a.stride;
  vf acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = zero();
  for (int k = 0; k < m.columns; ++k) {
    vf weight[NV];
    for (int v = 0; v < NV; ++v) weight[v] = load(w + k * PANEL + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf value = set1(x[r * a.stride + k]);
      for (int v = 0; v < NV; ++v) acc[r][v] = fma(weight[v], value, acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(out + r * PANEL + v * W, acc[r][v]);
}

template <int R>
static void tile_q8(const Matrix& m, const Rows& a, int panel, int row, float* out) {
  const uint8_t* w = m.panels + static_cast<int64_t>(panel) * a.groups * Q8_BYTES;
  const uint8_t* bytes = a.bytes + row * a.stride;
  const int64_t first = static_cast<int64_t>(row) * a.groups;
  vf acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = zero();
  for (int g = 0; g < a.groups; ++g, w += Q8_BYTES) {
    vi s[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) s[r][v] = iset1(a.offsets[first + r * a.groups + g]);
    dot_q8<R>(w, bytes + g * GROUP * (WIDE_Q8 ? 2 : 1), a.stride, s);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(w + GROUP * PANEL);
    vf scale[NV];
    for (int v = 0; v < NV; ++v) scale[v] = bf16(scales + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf row_scale = set1(a.scales[first + r * a.groups + g]);
      for (int v = 0; v < NV; ++v) acc[r][v] = fma(mul(to_float(s[r][v]), row_scale), scale[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(out + r * PANEL + v * W, acc[r][v]);
}

template <int R>
static void tile_q4(const Matrix& m, const Rows& a, int panel, int row, float* out) {
  const uint8_t* w = m.panels + static_cast<int64_t>(panel) * a.groups * Q4_BYTES;
  const uint8_t* bytes = a.bytes + row * a.stride;
  const int64_t first = static_cast<int64_t>(row) * a.groups;
  vf acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = zero();
  for (int g = 0; g < a.groups; ++g, w += Q4_BYTES) {
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
      vf row_scale = set1(a.scales[first + r * a.groups + g]);
      vf row_sum = set1(a.sums[first + r * a.groups + g]);
      for (int v = 0; v < NV; ++v) {
        acc[r][v] = fma(mul(to_float(s[r][v]), row_scale), scale[v], acc[r][v]);
        acc[r][v] = fma(zero_point[v], row_sum, acc[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(out + r * PANEL + v * W, acc[r][v]);
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

// How many rows are taken through all panels before the next ones: their activations stay cached.
HR_INLINE int row_block(const Matrix& m) {
  int64_t bytes = m.format == FORMAT_F32 ? 4ll * m.columns : (wide(m.format) ? 2ll : 1ll) * padded(m.columns);
  int64_t rows = ROW_BLOCK_BYTES / bytes / 24 * 24;
  return rows < 48 ? 48 : static_cast<int>(rows);
}

// out [rows, outs] = residual + rows W^T + bias, by a team. `out` may be the residual.
static void multiply(Team& team, const Matrix& m, const Rows& a, int rows, const float* residual, float* out) {
  const int panels = panels_of(m.outs), block = row_block(m), blocks = (rows + block - 1) / block;
  const int step = tile_rows(m.format);
  team.phase(panels * blocks, team.grain(panels), [&](int first, int last) {
    alignas(64) float part[TILE_MAX * PANEL];
    for (int item = first; item < last; ++item) {
      const int panel = item % panels, start = item / panels * block;
      const int stop = start + block < rows ? start + block : rows;
      const int at = panel * PANEL, width = m.outs - at < PANEL ? m.outs - at : PANEL;
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
          } else {
            for (int i = 0; i < width; ++i) {
              float v = from[i];
              if (m.bias != nullptr) v += m.bias[at + i];
              if (residual != nullptr) v += residual[to + i];
              out[to + i] = v;
            }
          }
        }
      }
    }
  });
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
    multiply(team, m, a, rows, residual, out);
  });
}
