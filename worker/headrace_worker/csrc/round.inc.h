// Weights on their way into panels: rounding groups of 32 columns to 8 or 4 bits, and laying them out.
// Included once per instruction set.
//
// Invariant: bit for bit what torch makes of the same numbers in tests/worker/rounding_reference.py
// (8 bits; why so: native/linear.py) and quantization/int4.py (4 bits). Scales of 8 bits are rounded up
// to bfloat16, so that no weight is cut off. Sums of squares are added in halves.

constexpr int LEVELS_Q8 = 127, LEVELS_Q4 = 15, MIDDLE_Q4 = 8;
constexpr int SPAN_MIN = 5;                  // the least steps that are tried between a group's extremes
constexpr float GRID_ERROR_SHARE = 1.0f / 16;
constexpr int GROUPS_AT_A_TIME = 512;        // of a thread, before it asks for more
constexpr int GROUP_VECTORS = GROUP / W;

HR_INLINE float as_bf16(float x) { return from_bf16(to_bf16(x)); }

struct Group {
  vf v[GROUP_VECTORS];
  float low, high;
};
struct Line {  // a weight is q * scale + zero, q from -8 to 7
  float scale, zero;
};

HR_INLINE Group group_of(const float* x) {
  Group group;
  vf low = load(x), high = low;
  for (int i = 0; i < GROUP_VECTORS; ++i) {
    group.v[i] = load(x + i * W);
    low = min(low, group.v[i]);
    high = max(high, group.v[i]);
  }
  group.low = -largest(sub(zero(), low));
  group.high = largest(high);
  return group;
}

// The line of a group whose extremes are `steps` apart.
HR_INLINE Line line_of(const Group& group, int steps) {
  const float scale = as_bf16(std::max((group.high - group.low) / static_cast<float>(steps), SMALLEST));
  return {scale, as_bf16(group.low + MIDDLE_Q4 * scale)};
}

HR_INLINE vf nearest(vf x, const Line& line) {
  const vf q = round(div(sub(x, set1(line.zero)), set1(line.scale)));
  return min(max(q, set1(-MIDDLE_Q4)), set1(LEVELS_Q4 - MIDDLE_Q4));
}

HR_INLINE float in_halves(vf (&squares)[GROUP_VECTORS]) {
  for (int half = GROUP_VECTORS / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) squares[i] = add(squares[i], squares[i + half]);
  return sum(squares[0]);
}

HR_INLINE float error_of(const Group& group, const Line& line) {
  vf squares[GROUP_VECTORS];
  for (int i = 0; i < GROUP_VECTORS; ++i) {
    const vf off = sub(add(mul(nearest(group.v[i], line), set1(line.scale)), set1(line.zero)), group.v[i]);
    squares[i] = mul(off, off);
  }
  return in_halves(squares);
}

// The line of the steps that fit best, where others than LEVELS_Q4 bring the error to nearly nothing.
HR_INLINE Line best_line(const Group& group, float& plain, float& best) {
  Line found = line_of(group, LEVELS_Q4);
  plain = best = error_of(group, found);
  for (int steps = LEVELS_Q4 - 1; steps >= SPAN_MIN && best > 0; --steps) {
    const Line line = line_of(group, steps);
    const float error = error_of(group, line);
    if (error < best * GRID_ERROR_SHARE) best = error, found = line;
  }
  return found;
}

// f(first, last, sums) for parts of 0..count by the team; the parts' two sums, added up in order.
template <typename F>
static void in_parts(int64_t count, double* sums, const F& f) {
  const int parts = static_cast<int>((count + GROUPS_AT_A_TIME - 1) / GROUPS_AT_A_TIME);
  std::vector<double> found(2 * static_cast<size_t>(parts), 0.0);
  Turn turn;
  Team& team = turn.team();
  team.run([&](int) {
    team.phase(parts, 1, [&](int first, int last) {
      for (int part = first; part < last; ++part) {
        const int64_t begin = static_cast<int64_t>(part) * GROUPS_AT_A_TIME;
        f(begin, std::min(count, begin + GROUPS_AT_A_TIME), found.data() + 2 * part);
      }
    });
  });
  sums[0] = sums[1] = 0;
  for (int part = 0; part < parts; ++part) sums[0] += found[2 * part], sums[1] += found[2 * part + 1];
}

// sums: the squared errors of plain rounding, and of each group's best line.
static void grid_errors(const float* x, int64_t count, double* sums) {
  in_parts(count, sums, [&](int64_t first, int64_t last, double* found) {
    for (int64_t g = first; g < last; ++g) {
      float plain, best;
      best_line(group_of(x + g * GROUP), plain, best);
      found[0] += plain;
      found[1] += best;
    }
  });
}

// values [count, 32] from 0 to 15, scales, zeros [count]; sums: the squared errors, and the squares.
static void round_q4(const float* x, int64_t count, bool grid, uint8_t* values, float* scales, float* zeros,
                     double* sums) {
  in_parts(count, sums, [&](int64_t first, int64_t last, double* found) {
    for (int64_t g = first; g < last; ++g) {
      const Group group = group_of(x + g * GROUP);
      float plain, best;
      const Line line = grid ? best_line(group, plain, best) : line_of(group, LEVELS_Q4);
      scales[g] = line.scale;
      zeros[g] = line.zero;
      vf squares[GROUP_VECTORS];
      alignas(64) float q[GROUP];
      for (int i = 0; i < GROUP_VECTORS; ++i) {
        store(q + i * W, add(nearest(group.v[i], line), set1(MIDDLE_Q4)));
        squares[i] = mul(group.v[i], group.v[i]);
      }
      for (int i = 0; i < GROUP; ++i) values[g * GROUP + i] = static_cast<uint8_t>(q[i]);
      found[0] += error_of(group, line);
      found[1] += in_halves(squares);
    }
  });
}

// values [count, 32] of the turned groups, scales [count], rounded up to bfloat16.
static void round_q8(const float* x, int64_t count, int8_t* values, float* scales) {
  double nothing[2];
  in_parts(count, nothing, [&](int64_t first, int64_t last, double*) {
    for (int64_t g = first; g < last; ++g) {
      alignas(64) float group[GROUP];
      std::memcpy(group, x + g * GROUP, sizeof group);
      turn_group(group);
      vf most = zero();
      for (int i = 0; i < GROUP; i += W) {
        const vf v = mul(load(group + i), set1(1.0f / GROUP));
        store(group + i, v);
        most = max(most, max(v, sub(zero(), v)));
      }
      const float exact = std::max(largest(most) / LEVELS_Q8, SMALLEST);
      uint16_t above = to_bf16(exact);
      if (from_bf16(above) < exact) ++above;
      const float scale = from_bf16(above);
      scales[g] = scale;
      for (int i = 0; i < GROUP; i += W) store(group + i, round(div(load(group + i), set1(scale))));
      for (int i = 0; i < GROUP; ++i) values[g * GROUP + i] = static_cast<int8_t>(group[i]);
    }
  });
}

// values [outs, groups, 32] as they are rounded, scales and zeros [outs, groups] → panels of a format.
static void pack(int format, int outs, int groups, const uint8_t* values, const float* scales, const float* zeros,
                 uint8_t* panels) {
  const int bytes = format == FORMAT_Q8 ? Q8_BYTES : Q4_BYTES;
  const int quads = format == FORMAT_Q8 ? GROUP / 4 : GROUP / 8;
  Turn turn;
  Team& team = turn.team();
  team.run([&](int) {
    team.phase(panels_of(outs), 1, [&](int first, int last) {
      for (int64_t at = static_cast<int64_t>(first) * groups; at < static_cast<int64_t>(last) * groups; ++at) {
        const int row = static_cast<int>(at / groups) * PANEL, g = static_cast<int>(at % groups);
        uint8_t* to = panels + at * bytes;
        std::memset(to, 0, bytes);
        for (int r = 0; r < PANEL && row + r < outs; ++r) {
          const int64_t from = static_cast<int64_t>(row + r) * groups + g;
          const uint8_t* v = values + from * GROUP;
          for (int k = 0; k < quads; ++k)
            for (int b = 0; b < 4; ++b) {
              const int c = k * 4 + b;
              to[(k * PANEL + r) * 4 + b] = format == FORMAT_Q8 ? static_cast<uint8_t>(v[c] + 128)
                                                               : static_cast<uint8_t>(v[c] | v[c + 16] << 4);
            }
          uint8_t* factors = to + quads * PANEL * 4 + r * 2;
          const uint16_t scale = to_bf16(scales[from]);
          std::memcpy(factors, &scale, 2);
          if (format == FORMAT_Q8) continue;
          const uint16_t middle = to_bf16(zeros[from]);
          std::memcpy(factors + 2 * PANEL, &middle, 2);
        }
      }
    });
  });
}
