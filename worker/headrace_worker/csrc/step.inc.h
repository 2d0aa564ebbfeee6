// A whole step of a decoder in one call: embedding, layers, norm, head. Included once per instruction
// set.
//
// A stage of a pipeline begins with what the one before made, and tensor ranks add up x where their
// parts of it meet, both without leaving the call.
//
// Invariant: it computes what model/decoder.py and model/layers.py say, with activations in float32
// from the embedding to the logits, whatever the model's dtype: only weights and the KV pool are
// rounded. Every thread goes through the same phases; see team.h.
// Behind the last layer's attention only the rows that are sampled go on: of the others nothing but
// keys and values is ever looked at.

struct StepRoom {
  std::vector<float> x, normed, qkv, mixed, inner, product;
  std::vector<float> kept;  // x of the rows that go on
  RowRoom rows, normed_rows;  // what attention and gates give; what norms give
  AttentionRoom attention;
  std::vector<Top> tops;

  void fit(std::vector<float>& values, size_t count) {
    if (values.size() < count) values.resize(count);
  }
};

HR_INLINE void embed(const Model& m, int64_t token, float* x) {
  token -= m.first_token;
  if (token < 0 || token >= m.vocab) {  // another rank's
    std::memset(x, 0, m.hidden * sizeof(float));
  } else if (m.embedding_bf16 != 0) {
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

// So few rows are normed by the thread that is the last of the phase before: to wait for each other
// once more takes the threads longer.
constexpr int ROWS_NORMED_BY_ONE = 2;

// What a step's phases share.
struct Running {
  Team& team;
  const Model& m;
  const Pool& pool;
  const Batch& batch;
  const Step& step;
  StepRoom& room;
  const Tiles& tiles;
  int rows;

  // Whether rows are chosen behind the last layer's attention. Where none goes on, ranks would not meet
  // there, and one would be done with the step before the others have kept their keys and values.
  bool chooses() const {
    if (step.passed != nullptr) return false;
    return step.sampled_rows == 0 ? step.sums == nullptr : step.sampled != nullptr;
  }
};

// The rows that go on behind a layer's attention: x [rows, hidden].
struct Going {
  float* x;
  int rows;
};

static Going going(const Running& s, int layer) {
  const bool chosen = s.chooses() && layer + 1 >= s.m.layers;
  return chosen ? Going{s.room.kept.data(), s.step.sampled_rows} : Going{s.room.x.data(), s.rows};
}

// Norms rows and brings them into the next matrix' form.
HR_INLINE void norm_row(const Model& m, const Rows& a, const float* x, const float* weight, int64_t row, float* normed) {
  float* out = normed + row * m.hidden;
  rms_norm(x + row * m.hidden, weight, m.hidden, m.eps, out);
  if (a.format != FORMAT_F32) quantize_row(out, a, static_cast<int>(row));
}

static void norm_rows(Running& s, const Rows& a, const float* x, const float* weight, int count) {
  s.team.phase(count, s.team.grain(count), [&](int first, int last) {
    for (int r = first; r < last; ++r) norm_row(s.m, a, x, weight, r, s.room.normed.data());
  });
}

// Rotates one head of one row; keys and values go into the pool.
HR_INLINE void place_head(const Running& s, const Layer& l, int layer, int r, int h, float* head) {
  const Model& m = s.m;
  const int turned = m.heads + m.kv_heads;
  if (h < turned) {
    if (l.q_norm != nullptr) rms_norm(head, h < m.heads ? l.q_norm : l.k_norm, m.head_dim, m.eps, head);
    if (l.rope >= 0) {
      const int rotated = m.rotated[l.rope];
      const int64_t at = s.step.positions[r] * rotated;
      turn_head(head, s.step.cos[l.rope] + at, s.step.sin[l.rope] + at, rotated);
    }
  }
  if (h < m.heads) return;
  const bool value = h >= turned;
  keep(s.pool, s.batch.slots[r], layer, value ? 1 : 0, h - (value ? turned : m.heads), head);
}

// Of the KV that attention will begin with, asked for with each panel of queries, keys and values.
constexpr int LOTS_A_PANEL = 8;

// Queries, keys and values, head by head: rotated where they stand, kept where they belong.
static void make_heads(Running& s, int thread, const Layer& l, int layer, const Rows& a) {
  const Model& m = s.m;
  const int heads = m.heads + 2 * m.kv_heads, width = heads * m.head_dim, panels = m.head_dim / PANEL;
  const int block = row_block(l.qkv), blocks = (s.rows + block - 1) / block;
  float* qkv = s.room.qkv.data();
  Ahead ahead = first_ahead(s.team, thread, s.pool, s.batch, layer, l.window, s.tiles);
  s.team.phase(heads * blocks, 1, [&](int first, int last) {
    for (int item = first; item < last; ++item) {
      const int h = item % heads, start = item / heads * block;
      const int stop = start + block < s.rows ? start + block : s.rows;
      for (int p = h * panels; p < (h + 1) * panels; ++p) {
        multiply_panel(l.qkv, a, p, start, stop, nullptr, qkv);
        for (int lot = 0; lot < LOTS_A_PANEL; ++lot) ahead.some();
      }
      for (int r = start; r < stop; ++r)
        place_head(s, l, layer, r, h, qkv + static_cast<int64_t>(r) * width + h * m.head_dim);
    }
  });
}

// inner [rows, m.inner] = silu(gate) * up; gate's panels and up's stand behind each other. Two panels
// of each make a group of columns, which is rounded for the next matrix at once.
static void gate_rows(Running& s, const Matrix& w, const Rows& a, int rows, const Rows& next) {
  const int inner = s.m.inner, panels = inner / PANEL, count = (panels + 1) / 2;
  const int block = row_block(w), blocks = (rows + block - 1) / block, tall = tile_rows(w.format);
  float* out = s.room.inner.data();
  const int grain = std::min(s.team.grain(count), std::max(1, panels_a_turn(w) / 4));
  s.team.phase(count * blocks, grain, [&](int first, int last) {
    alignas(64) float gate[TILE_MAX * PANEL], up[TILE_MAX * PANEL];
    for (int item = first; item < last; ++item) {
      const int pair = item % count * 2, start = item / count * block;
      const int stop = start + block < rows ? start + block : rows;
      for (int panel = pair; panel < pair + 2 && panel < panels; ++panel)
        for (int row = start; row < stop; row += tall) {
          const int some = stop - row < tall ? stop - row : tall;
          tile(w, a, panel, row, some, gate);
          tile(w, a, panel + panels, row, some, up);
          for (int r = 0; r < some; ++r)
            for (int i = 0; i < PANEL; i += W) {
              vf g = load(gate + r * PANEL + i), u = load(up + r * PANEL + i);
              if (w.bias != nullptr) {
                g = add(g, load(w.bias + panel * PANEL + i));
                u = add(u, load(w.bias + inner + panel * PANEL + i));
              }
              store(out + static_cast<int64_t>(row + r) * inner + panel * PANEL + i, mul(silu(g), u));
            }
        }
      if (next.format == FORMAT_F32) continue;
      for (int r = start; r < stop; ++r)
        quantize_part(out + static_cast<int64_t>(r) * inner + pair * PANEL, next, r, pair / 2, 1);
    }
  });
}

static void attend_layer(Running& s, int thread, const Layer& l, int layer, const Rows& next) {
  const Model& m = s.m;
  const int group = m.heads / m.kv_heads, qkv_width = (m.heads + 2 * m.kv_heads) * m.head_dim;
  const bool at_once = next.format != FORMAT_F32 && group * m.head_dim % GROUP == 0;
  const Attention a{s.pool, s.batch, s.tiles, layer, m.heads, group, m.attention_scale, l.window,
                    s.room.qkv.data(), qkv_width, {s.room.mixed.data(), at_once ? &next : nullptr}};
  attend_tiles(s.team, thread, a, s.room.attention);
  if (at_once || next.format == FORMAT_F32) return;
  s.team.phase(s.rows, s.team.grain(s.rows), [&](int first, int last) {
    for (int r = first; r < last; ++r)
      quantize_row(s.room.mixed.data() + static_cast<int64_t>(r) * m.heads * m.head_dim, next, r);
  });
}

// The rows that go on, side by side: x among the kept ones, and what attention gave in `to`.
static void keep_rows(Running& s, const Rows& from, const Rows& to) {
  const int64_t hidden = s.m.hidden, wide = from.columns;
  s.team.phase(s.step.sampled_rows, 1, [&](int first, int last) {
    for (int r = first; r < last; ++r) {
      const int64_t at = s.step.sampled[r];
      std::memcpy(s.room.kept.data() + r * hidden, s.room.x.data() + at * hidden, hidden * sizeof(float));
      if (from.format == FORMAT_F32) {
        std::memcpy(s.room.normed.data() + r * wide, from.x + at * wide, wide * sizeof(float));
        continue;
      }
      const int64_t groups = from.groups;
      std::memcpy(to.bytes + r * to.stride, from.bytes + at * from.stride, from.stride);
      std::memcpy(to.scales + r * groups, from.scales + at * groups, groups * sizeof(float));
      std::memcpy(to.sums + r * groups, from.sums + at * groups, groups * sizeof(float));
      std::memcpy(to.offsets + r * groups, from.offsets + at * groups, groups * sizeof(int32_t));
    }
  });
}

static void meet(Running& s, float* x, int rows) {
  if (s.step.sums != nullptr) add_up(*s.step.sums, x, static_cast<int64_t>(rows) * s.m.hidden);
}

// x += rows W^T + bias, on all ranks together; `finish()` is called once x is there. What ranks add up
// is the product alone: with x among it, it would be another order of sums than one process has.
template <typename F>
static void add_product(Running& s, const Matrix& w, const Rows& a, const Going& to, const F& finish) {
  float* x = to.x;
  if (s.step.sums == nullptr) {
    multiply(s.team, w, a, to.rows, x, x, finish);
    return;
  }
  float* product = s.room.product.data();
  multiply(s.team, w, a, to.rows, nullptr, product, [&] {
    meet(s, product, to.rows);
    const int64_t count = static_cast<int64_t>(to.rows) * s.m.hidden;
    for (int64_t i = 0; i < count; ++i) x[i] = product[i] + x[i];
    finish();
  });
}

// x += rows W^T + bias, and with it, for few rows, the norm that follows.
static void add_rows(Running& s, const Matrix& w, const Rows& a, const Going& to, const float* weight,
                     const Rows& next) {
  const bool few = to.rows <= ROWS_NORMED_BY_ONE;
  add_product(s, w, a, to, [&] {
    for (int r = 0; few && r < to.rows; ++r) norm_row(s.m, next, to.x, weight, r, s.room.normed.data());
  });
  if (!few) norm_rows(s, next, to.x, weight, to.rows);
}

static void run_layer(Running& s, int thread, int number) {
  const Layer& l = s.m.layer[number];
  const Going to = going(s, number);
  StepRoom& room = s.room;
  const Rows into = room.normed_rows.rows_for(l.qkv, s.rows, room.normed.data());
  make_heads(s, thread, l, number, into);
  HR_END(thread, PART_QKV);
  if (to.rows == 0) return;
  Rows mixed = room.rows.rows_for(l.out, s.rows, room.mixed.data());
  attend_layer(s, thread, l, number, mixed);
  HR_END(thread, PART_ATTEND);
  if (to.x != room.x.data()) {
    // what is normed next stands there only when this has been multiplied
    const Rows kept = room.normed_rows.rows_for(l.out, to.rows, room.normed.data());
    keep_rows(s, mixed, kept);
    mixed = kept;
  }
  const Rows normed = room.normed_rows.rows_for(l.gate_up, to.rows, room.normed.data());
  add_rows(s, l.out, mixed, to, l.mlp_norm, normed);
  HR_END(thread, PART_OUT);
  const Rows inner = room.rows.rows_for(l.down, to.rows, room.inner.data());
  gate_rows(s, l.gate_up, normed, to.rows, inner);
  HR_END(thread, PART_GATE);
  if (number + 1 < s.m.layers) {
    const Layer& above = s.m.layer[number + 1];
    add_rows(s, l.down, inner, to, above.attention_norm,
             room.normed_rows.rows_for(above.qkv, s.rows, room.normed.data()));
  } else {
    add_product(s, l.down, inner, to, [] {});
  }
  HR_END(thread, PART_DOWN);
}

// Sizes everything for a step, so that later nothing moves while others read it.
static void make_room(StepRoom& room, const Model& m, int rows, int sampled_rows, bool adds_up) {
  rows = std::max(rows, sampled_rows);  // one may be wanted twice
  const size_t count = rows;
  room.fit(room.x, count * m.hidden);
  room.fit(room.kept, static_cast<size_t>(sampled_rows) * m.hidden);
  if (adds_up) room.fit(room.product, count * m.hidden);
  room.fit(room.normed, count * std::max(m.hidden, m.heads * m.head_dim));
  room.fit(room.qkv, count * (m.heads + 2 * m.kv_heads) * m.head_dim);
  room.fit(room.mixed, count * m.heads * m.head_dim);
  room.fit(room.inner, count * m.inner);
  for (int i = 0; i < m.layers; ++i) {
    const Layer& l = m.layer[i];
    for (const Matrix* w : {&l.qkv, &l.out, &l.gate_up, &l.down}) {
      room.rows.rows_for(*w, rows, nullptr);
      room.normed_rows.rows_for(*w, rows, nullptr);
    }
  }
  if (m.head.outs > 0) room.normed_rows.rows_for(m.head, rows, nullptr);
}

// x, from the tokens or from the stage before, normed for the first layer.
static void begin(Running& s) {
  const Model& m = s.m;
  float *x = s.room.x.data(), *normed = s.room.normed.data();
  const Rows first = s.room.normed_rows.rows_for(m.layer[0].qkv, s.rows, normed);
  const bool alone = s.step.sums == nullptr || s.step.given != nullptr;
  s.team.phase(
      s.rows, s.team.grain(s.rows),
      [&](int from, int to) {
        for (int r = from; r < to; ++r) {
          float* row = x + static_cast<int64_t>(r) * m.hidden;
          if (s.step.given != nullptr) {
            std::memcpy(row, s.step.given + static_cast<int64_t>(r) * m.hidden, m.hidden * sizeof(float));
          } else {
            embed(m, s.step.tokens[r], row);
          }
          if (alone) norm_row(m, first, x, m.layer[0].attention_norm, r, normed);
        }
      },
      [&] {
        if (!alone) meet(s, x, s.rows);
      });
  if (!alone) norm_rows(s, first, x, m.layer[0].attention_norm, s.rows);
}

constexpr int TOP_PART = 8192;

// The token of each row's first highest logit.
static void find_tops(Running& s) {
  const int vocab = s.m.vocab, parts = (vocab + TOP_PART - 1) / TOP_PART, rows = s.step.sampled_rows;
  Top* tops = s.room.tops.data();
  s.team.phase(
      rows * parts, 1,
      [&](int first, int last) {
        for (int item = first; item < last; ++item) {
          const int start = item % parts * TOP_PART, stop = start + TOP_PART < vocab ? start + TOP_PART : vocab;
          tops[item] = top_of(s.step.logits + static_cast<int64_t>(item / parts) * vocab, start, stop);
        }
      },
      [&] {
        for (int r = 0; r < rows; ++r) {
          const Top* best = tops + r * parts;
          for (const Top* other = best; other < tops + (r + 1) * parts; ++other)
            if (other->peak > best->peak || other->peak != other->peak) best = other;
          s.step.tops[r] = std::isfinite(best->peak) ? best->at : -1;
        }
      });
}

// What comes behind the layers: x for the next stage, or logits, their peaks and the tokens drawn.
static void end(Running& s) {
  const Model& m = s.m;
  if (s.step.passed != nullptr) {
    s.team.phase(s.rows, s.team.grain(s.rows), [&](int from, int to) {
      const int64_t at = static_cast<int64_t>(from) * m.hidden, count = static_cast<int64_t>(to - from) * m.hidden;
      std::memcpy(s.step.passed + at, s.room.x.data() + at, count * sizeof(float));
    });
  } else if (s.step.sampled_rows > 0) {
    const Rows a = s.room.normed_rows.rows_for(m.head, s.step.sampled_rows, s.room.normed.data());
    norm_rows(s, a, going(s, m.layers).x, m.norm, s.step.sampled_rows);
    multiply(s.team, m.head, a, s.step.sampled_rows, nullptr, s.step.logits, [] {});
    find_tops(s);
    if (s.step.draw_count > 0) draw_tokens(s.team, s.step.logits, m.vocab, s.step.draws, s.step.draw_count, s.step.tops);
  }
}

static void run_step(const Model& m, const Pool& p, const Batch& batch, const Step& step) {
  if (batch.rows == 0) return;
  static StepRoom common;
  static thread_local StepRoom own;
  const bool waits = step.sums != nullptr;
  Turn turn(waits);
  StepRoom& room = waits ? own : common;
  Team& team = turn.team();
  Tiles tiles(batch, m.kv_heads, m.heads / m.kv_heads);
  ready(room.attention, team, tiles, m.head_dim);
  make_room(room, m, batch.rows, step.sampled_rows, waits);
  room.tops.resize(static_cast<size_t>(step.sampled_rows) * ((m.vocab + TOP_PART - 1) / TOP_PART));
  Running s{team, m, p, batch, step, room, tiles, batch.rows};
  team.run([&](int thread) {
    HR_BEGIN(thread);
    begin(s);
    HR_END(thread, PART_REST);
    for (int i = 0; i < m.layers; ++i) run_layer(s, thread, i);
    end(s);
    HR_END(thread, PART_HEAD);
  });
}
