// A whole step of a decoder in one call: embedding, layers, norm, head. Included once per instruction
// set.
//
// Invariant: it computes what model/decoder.py and model/layers.py say, with activations in float32
// from the embedding to the logits, whatever the model's dtype: only weights and the KV pool are
// rounded. Every thread goes through the same phases; see team.h.

struct StepRoom {
  std::vector<float> x, normed, qkv, mixed, inner;
  RowRoom rows;
  AttentionRoom attention;

  void fit(std::vector<float>& values, size_t count) {
    if (values.size() < count) values.resize(count);
  }
};

HR_INLINE void embed(const Model& m, int64_t token, float* x) {
  if (m.embedding_bf16 != 0) {
    const uint16_t* from = static_cast<const uint16_t*>(m.embedding) + token * m.hidden;
    for (int i = 0; i < m.hidden; ++i) x[i] = from_bf16(from[i]) * m.embedding_scale;
  } else {
    const float* from = static_cast<const float*>(m.embedding) + token * m.hidden;
    for (int i = 0; i < m.hidden; ++i) x[i] = from[i] * m.embedding_scale;
  }
}

// x / rms(x) * weight, of `size` numbers, a multiple of the vector's width or not.
HR_INLINE void rms_norm(const float* x, const float* weight, int size, float eps, float* out) {
  vf squares = zero();
  int i = 0;
  for (; i + W <= size; i += W) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (; i < size; ++i) total += x[i] * x[i];
  const float inverse = 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
  for (i = 0; i + W <= size; i += W) store(out + i, mul(mul(load(x + i), set1(inverse)), load(weight + i)));
  for (; i < size; ++i) out[i] = x[i] * inverse * weight[i];
}

// Turns the first `rotated` dimensions of a head, in place; the first half of `sin` is negated.
HR_INLINE void turn_head(float* x, const float* cos, const float* sin, int rotated) {
  const int half = rotated / 2;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] + b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

HR_INLINE vf silu(vf x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// Norms `count` rows for `m` and brings them into its form; rows taken from x by `index`, if given.
static void norm_rows(Team& team, const Rows& a, const float* x, const float* weight, int hidden, float eps,
                      int count, const int64_t* index, float* normed) {
  team.phase(count, team.grain(count), [&](int first, int last) {
    for (int r = first; r < last; ++r) {
      const int64_t from = index != nullptr ? index[r] : r;
      float* to = normed + static_cast<int64_t>(r) * hidden;
      rms_norm(x + from * hidden, weight, hidden, eps, to);
      if (a.format != FORMAT_F32) quantize_row(to, a, r);
    }
  });
}

static void form_rows(Team& team, const Rows& a, const float* x, int columns, int count) {
  if (a.format == FORMAT_F32) return;
  team.phase(count, team.grain(count), [&](int first, int last) {
    for (int r = first; r < last; ++r) quantize_row(x + static_cast<int64_t>(r) * columns, a, r);
  });
}

// Query and key norms, rotation, keys and values into the pool.
static void place_rows(Team& team, const Model& m, const Layer& l, const Pool& p, const Batch& batch,
                       const Step& step, int layer, float* qkv) {
  const int width = (m.heads + 2 * m.kv_heads) * m.head_dim, turned = m.heads + m.kv_heads;
  team.phase(batch.rows, team.grain(batch.rows), [&](int first, int last) {
    for (int r = first; r < last; ++r) {
      float* row = qkv + static_cast<int64_t>(r) * width;
      for (int h = 0; h < turned; ++h) {
        float* head = row + h * m.head_dim;
        if (l.q_norm != nullptr) rms_norm(head, h < m.heads ? l.q_norm : l.k_norm, m.head_dim, m.eps, head);
        if (l.rope >= 0) {
          const int rotated = m.rotated[l.rope];
          const int64_t at = static_cast<int64_t>(r) * rotated;
          turn_head(head, step.cos[l.rope] + at, step.sin[l.rope] + at, rotated);
        }
      }
      keep(p, batch.slots[r], layer, 0, row + m.heads * m.head_dim);
      keep(p, batch.slots[r], layer, 1, row + turned * m.head_dim);
    }
  });
}

// inner [rows, m.inner] = silu(gate) * up; gate's panels and up's stand behind each other.
static void gate_rows(Team& team, const Matrix& w, const Rows& a, int inner, int rows, float* out) {
  const int panels = inner / PANEL, block = row_block(w), blocks = (rows + block - 1) / block;
  const int tall = tile_rows(w.format);
  team.phase(panels * blocks, team.grain(panels), [&](int first, int last) {
    alignas(64) float gate[TILE_MAX * PANEL], up[TILE_MAX * PANEL];
    for (int item = first; item < last; ++item) {
      const int panel = item % panels, start = item / panels * block;
      const int stop = start + block < rows ? start + block : rows;
      for (int row = start; row < stop; row += tall) {
        const int count = stop - row < tall ? stop - row : tall;
        tile(w, a, panel, row, count, gate);
        tile(w, a, panel + panels, row, count, up);
        for (int r = 0; r < count; ++r)
          for (int i = 0; i < PANEL; i += W) {
            vf g = load(gate + r * PANEL + i), u = load(up + r * PANEL + i);
            if (w.bias != nullptr) {
              g = add(g, load(w.bias + panel * PANEL + i));
              u = add(u, load(w.bias + inner + panel * PANEL + i));
            }
            store(out + static_cast<int64_t>(row + r) * inner + panel * PANEL + i, mul(silu(g), u));
          }
      }
    }
  });
}

static void run_step(const Model& m, const Pool& p, const Batch& batch, const Step& step) {
  if (batch.rows == 0) return;
  static StepRoom room;
  Turn turn;
  Team& team = turn.team();
  const int rows = batch.rows, qkv_width = (m.heads + 2 * m.kv_heads) * m.head_dim;
  const size_t count = rows;
  room.fit(room.x, count * m.hidden);
  room.fit(room.normed, count * m.hidden);
  room.fit(room.qkv, count * qkv_width);
  room.fit(room.mixed, count * m.heads * m.head_dim);
  room.fit(room.inner, count * m.inner);
  Tiles tiles(batch, m.kv_heads, m.heads / m.kv_heads);
  ready(room.attention, team, tiles, m.head_dim);
  // room for the widest rows first, so that later ones move nothing while others read it
  for (int i = 0; i < m.layers; ++i) {
    room.rows.rows_for(m.layer[i].down, rows, nullptr);
    room.rows.rows_for(m.layer[i].gate_up, rows, nullptr);
    room.rows.rows_for(m.layer[i].out, rows, nullptr);
    room.rows.rows_for(m.layer[i].qkv, rows, nullptr);
  }
  room.rows.rows_for(m.head, rows, nullptr);
  float *x = room.x.data(), *normed = room.normed.data(), *qkv = room.qkv.data();
  float *mixed = room.mixed.data(), *inner = room.inner.data();
  team.run([&](int thread) {
    team.phase(rows, team.grain(rows), [&](int first, int last) {
      for (int r = first; r < last; ++r) embed(m, step.tokens[r], x + static_cast<int64_t>(r) * m.hidden);
    });
    for (int i = 0; i < m.layers; ++i) {
      const Layer& l = m.layer[i];
      Rows a = room.rows.rows_for(l.qkv, rows, normed);
      norm_rows(team, a, x, l.attention_norm, m.hidden, m.eps, rows, nullptr, normed);
      multiply(team, l.qkv, a, rows, nullptr, qkv);
      place_rows(team, m, l, p, batch, step, i, qkv);
      attend_tiles(team, thread, p, batch, tiles, i, m.heads, m.attention_scale, l.window, qkv, qkv_width, mixed,
                   room.attention);
      a = room.rows.rows_for(l.out, rows, mixed);
      form_rows(team, a, mixed, m.heads * m.head_dim, rows);
      multiply(team, l.out, a, rows, x, x);
      a = room.rows.rows_for(l.gate_up, rows, normed);
      norm_rows(team, a, x, l.mlp_norm, m.hidden, m.eps, rows, nullptr, normed);
      gate_rows(team, l.gate_up, a, m.inner, rows, inner);
      a = room.rows.rows_for(l.down, rows, inner);
      form_rows(team, a, inner, m.inner, rows);
      multiply(team, l.down, a, rows, x, x);
    }
    if (step.sampled_rows > 0) {
      Rows a = room.rows.rows_for(m.head, step.sampled_rows, normed);
      norm_rows(team, a, x, m.norm, m.hidden, m.eps, step.sampled_rows, step.sampled, normed);
      multiply(team, m.head, a, step.sampled_rows, nullptr, step.logits);
    }
  });
}
