// Tokens drawn from rows of logits, without sorting the vocabulary. Included once per instruction set.
//
// What is drawn is what sampling/filters.py and sampling/draw.py say, token for token. Their weights
// (sampling/weights.py) are made of the same roundings here, so nothing below may be contracted into a
// fused product. Sums of weights are exact in float64, so who adds what up first cannot show.
//
// A row without filters takes one pass, which adds its weights up group by group. One that filters
// looks for a limit that everything left reaches (for top_k among the peaks of columns, for top_p among
// a few fixed ones), collects the tokens above it, most often some hundreds, and does the rest on those.

constexpr int FAN = 32, NUMBERS = 4;  // see sampling/draw.py, sampling/uniform.py
constexpr int FIRST_TO_FIND = -2, NO_TOKEN = -1;
constexpr float WEIGHT_ROUNDER = 0x1p-11f, EXPONENT_LOWEST = -64.0f, EXPONENT_OF_NOTHING = -36.0f;

// The first of the highest numbers among some, and where it stands; NaN where one of them is.
struct Top {
  float peak;
  int at;
};

constexpr int TOP_BLOCK = 256;

// Of x [first, last), which is not empty.
static Top top_of(const float* x, int first, int last) {
  Top best{-INFINITY, first};
  for (int start = first, stop; start < last; start = stop) {
    stop = start + TOP_BLOCK < last ? start + TOP_BLOCK : last;
    vf highest = set1(-INFINITY);
    Nans nans = no_nans();
    int i = start;
    for (; i + W <= stop; i += W) {
      highest = max(load(x + i), highest);
      look(nans, load(x + i));
    }
    float peak = largest(highest);
    bool broken = any(nans);
    for (; i < stop; ++i) {
      peak = x[i] > peak ? x[i] : peak;
      broken = broken || x[i] != x[i];
    }
    if (broken)
      for (i = start; i < stop; ++i)
        if (x[i] != x[i]) return {x[i], i};
    if (peak <= best.peak) continue;
    for (i = start; x[i] != peak; ++i) {
    }
    best = {peak, i};
  }
  return best;
}

struct Candidate {
  float value, weight;
  int id;
};

struct SampleRoom {
  std::vector<Candidate> open, kept;
  std::vector<double> sums;
  std::vector<float> peaks;
};

// A row of logits, and what its draw takes.
struct Row {
  const float* logits;
  int count;
  float best, scale;
  double numbers[NUMBERS];
  int widths[NUMBERS], levels;  // of the tree by which it is drawn, tokens first
};

// The first `count` floats from p, and -infinity behind them.
HR_INLINE vf load_some(const float* p, int count) {
  if (count >= W) return load(p);
  alignas(64) float some[W];
  for (int i = 0; i < W; ++i) some[i] = i < count ? p[i] : -INFINITY;
  return load(some);
}

// The powers of two that the first `count` logits from p weigh.
HR_INLINE vf exponents_of(const Row& row, const float* p, int count) {
  const vf y = mul(sub(load_some(p, count), set1(row.best)), set1(row.scale));
  return max(y, set1(EXPONENT_LOWEST));
}

HR_INLINE vf weights_of(vf y) {
  const vf n = round(y), f = sub(y, n);
  vf p = mul(f, set1(0.001326472731307149f));
  p = mul(add(p, set1(0.009671512991189957f)), f);
  p = mul(add(p, set1(0.05550733581185341f)), f);
  p = mul(add(p, set1(0.24022242426872253f)), f);
  p = mul(add(p, set1(0.6931470036506653f)), f);
  p = mul(add(p, set1(1.0f)), exponent(to_int(n)));
  return sub(add(p, set1(WEIGHT_ROUNDER)), set1(WEIGHT_ROUNDER));
}

HR_INLINE uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

static void make_numbers(const Draw& d, double* numbers) {
  constexpr uint64_t gamma = 0x9E3779B97F4A7C15ull;
  const uint64_t mixed = mix(mix(d.seed + gamma) + (static_cast<uint64_t>(d.position) + 1) * gamma);
  for (int i = 0; i < NUMBERS; ++i)
    numbers[i] = static_cast<double>(mix(mixed + (i + 1) * gamma) >> 11) * 0x1p-53;
}

static void make_tree(Row& row) {
  row.levels = 1;
  row.widths[0] = row.count;
  while (row.widths[row.levels - 1] > FAN && row.levels < NUMBERS) {
    row.widths[row.levels] = (row.widths[row.levels - 1] + FAN - 1) / FAN;
    row.levels += 1;
  }
}

// Which of `count` weights, one every `step`, by inverse CDF.
static int place(const double* weights, int count, int step, double number) {
  double all = 0;
  for (int i = 0; i < count; ++i) all += weights[static_cast<int64_t>(i) * step];
  const double inside = std::min(number * all, std::nextafter(all, 0.0));
  double sum = 0;
  for (int i = 0;; ++i) {
    sum += weights[static_cast<int64_t>(i) * step];
    if (sum > inside) return i;
  }
}

HR_INLINE int places(int width, int index, int step) { return (width - index + step - 1) / step; }

// --- without filters

// Sums of the weights whose ids are the same modulo `width`, which is rounded up to whole panels.
static void add_groups(const Row& row, int width, double* sums) {
  for (int j = 0; j < width; j += PANEL) {
    Wide sum[NV];
    for (int v = 0; v < NV; ++v) sum[v] = wide_zero();
    for (int64_t at = j; at < row.count; at += width)
      for (int v = 0; v < NV; ++v) {
        const int64_t left = std::min<int64_t>(width - j, row.count - at) - v * W;
        if (left > 0) add_to(sum[v], weights_of(exponents_of(row, row.logits + at + v * W, left)));
      }
    for (int v = 0; v < NV; ++v) store(sums + j + v * W, sum[v]);
  }
}

static int draw_any(const Row& row, SampleRoom& room) {
  double* sums[NUMBERS] = {};
  size_t size = 0;
  for (int level = 1; level < row.levels; ++level) size += row.widths[level] + PANEL;
  if (room.sums.size() < size) room.sums.resize(size);
  double* next = room.sums.data();
  for (int level = 1; level < row.levels; next += row.widths[level++] + PANEL) {
    sums[level] = next;
    if (level == 1) {
      add_groups(row, row.widths[1], next);
      continue;
    }
    const int width = row.widths[level], below = row.widths[level - 1];
    for (int i = 0; i < width; ++i) next[i] = 0;
    for (int start = 0; start < below; start += width)
      for (int i = 0; i < width && start + i < below; ++i) next[i] += sums[level - 1][start + i];
  }
  int index = 0, step = 1;
  for (int level = row.levels - 1; level > 0; --level) {
    const int number = row.levels - 1 - level;
    index += step * place(sums[level] + index, places(row.widths[level], index, step), step, row.numbers[number]);
    step = row.widths[level];
  }
  alignas(64) float group[FAN + W], weights[FAN + W];
  double last[FAN];
  const int count = places(row.count, index, step);
  for (int i = 0; i < count; ++i) group[i] = row.logits[index + static_cast<int64_t>(i) * step];
  for (int i = 0; i < count; i += W) store(weights + i, weights_of(exponents_of(row, group + i, count - i)));
  for (int i = 0; i < count; ++i) last[i] = weights[i];
  return index + step * place(last, count, 1, row.numbers[row.levels - 1]);
}

// --- filters

// The tokens whose logit is finite and reaches `limit`, by rising id.
static void collect(const Row& row, float limit, std::vector<Candidate>& found) {
  found.clear();
  const float* x = row.logits;
  limit = std::max(limit, -std::numeric_limits<float>::max());
  const vf least = set1(limit);
  constexpr int LOT = 4 * W;
  int i = 0;
  for (; i + LOT <= row.count; i += LOT) {
    const vf a = max(load(x + i), load(x + i + W)), b = max(load(x + i + 2 * W), load(x + i + 3 * W));
    if (reaching(max(a, b), least) == 0) continue;
    for (int j = i; j < i + LOT; j += W)
      for (uint32_t bits = reaching(load(x + j), least); bits != 0; bits &= bits - 1) {
        const int id = j + __builtin_ctz(bits);
        found.push_back({x[id], 0, id});
      }
  }
  for (; i < row.count; ++i)
    if (x[i] >= limit) found.push_back({x[i], 0, i});
}

// A logit below which nothing has an exponent of `y` or more.
static float limit_of(const Row& row, double y) {
  const double limit = row.best + (1.00001 * y - 0.00001) / row.scale;
  if (limit <= -std::numeric_limits<float>::max()) return -INFINITY;
  return std::nextafter(static_cast<float>(limit), -INFINITY);
}

// What at least `count` logits reach: as many columns have peaks that do. With 8 times as many columns
// hardly any holds two of the highest.
static float limit_of_first(const Row& row, int count, SampleRoom& room) {
  constexpr int COLUMNS_FOR_EACH = 8;
  const int64_t wanted = (static_cast<int64_t>(count) * COLUMNS_FOR_EACH + PANEL - 1) / PANEL * PANEL;
  if (2 * wanted > row.count) return -INFINITY;
  const int width = static_cast<int>(wanted);
  room.peaks.assign(width, -INFINITY);
  float* peaks = room.peaks.data();
  for (int start = 0; start < row.count; start += width) {
    const int stop = std::min(width, row.count - start);
    for (int i = 0; i < stop; i += W) store(peaks + i, max(load_some(row.logits + start + i, stop - i), load(peaks + i)));
  }
  std::nth_element(peaks, peaks + count - 1, peaks + width, [](float a, float b) { return a > b; });
  return peaks[count - 1];
}

static void weigh(const Row& row, std::vector<Candidate>& some) {
  const int count = static_cast<int>(some.size());
  for (int i = 0; i < count; i += W) {
    const int left = std::min(W, count - i);
    alignas(64) float values[W];
    for (int j = 0; j < left; ++j) values[j] = some[i + j].value;
    store(values, weights_of(exponents_of(row, values, left)));
    for (int j = 0; j < left; ++j) some[i + j].weight = values[j];
  }
}

static double total(const std::vector<Candidate>& some) {
  double sum = 0;
  for (const Candidate& c : some) sum += c.weight;
  return sum;
}

HR_INLINE bool before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// Leaves the fewest of the highest that together reach `target`, by their weights or by their number;
// all where those do not. `room.open` has them by rising id, and gets them back in no order.
//
// Counted by distance from the highest in BINS, the bin in which the target is reached is looked into
// again, until it is small or holds one value only.
template <bool BY_WEIGHT>
static void keep_first(SampleRoom& room, double target) {
  constexpr int BINS = 256;
  constexpr size_t SORTED_MAX = 64;
  std::vector<Candidate>& open = room.open;
  std::vector<Candidate>& kept = room.kept;
  kept.clear();
  double reached = 0;
  const auto amount = [](const Candidate& c) { return BY_WEIGHT ? static_cast<double>(c.weight) : 1.0; };
  for (;;) {
    double most = -INFINITY, least = INFINITY;
    for (const Candidate& c : open) {
      most = std::max<double>(most, c.value);
      least = std::min<double>(least, c.value);
    }
    if (open.size() <= SORTED_MAX || most == least) break;
    const double scale = BINS / (most - least);
    const auto bin_of = [&](const Candidate& c) {
      return std::min(BINS - 1, static_cast<int>((most - c.value) * scale));
    };
    double sums[BINS] = {};
    for (const Candidate& c : open) sums[bin_of(c)] += amount(c);
    int bin = 0;
    while (bin < BINS && reached + sums[bin] < target) reached += sums[bin++];
    size_t left = 0;
    for (const Candidate& c : open) {
      const int its = bin_of(c);
      if (its < bin) kept.push_back(c);
      if (its == bin) open[left++] = c;
    }
    open.resize(left);
  }
  if (open.size() <= SORTED_MAX) std::sort(open.begin(), open.end(), before);
  for (const Candidate& c : open) {
    kept.push_back(c);
    reached += amount(c);
    if (reached >= target) break;
  }
  open.swap(kept);
}

// What all weights add up to; and an exponent that everything reaches that top_p leaves.
static double survey(const Row& row, double top_p, double& lowest) {
  constexpr int STEPS = 3;
  static const float steps[STEPS] = {-5.0f, -9.0f, -14.0f};
  Wide weights = wide_zero();
  vf rough[STEPS];
  for (int s = 0; s < STEPS; ++s) rough[s] = zero();
  for (int i = 0; i < row.count; i += W) {
    const vf y = exponents_of(row, row.logits + i, row.count - i), weight = weights_of(y);
    add_to(weights, weight);
    for (int s = 0; s < STEPS; ++s) rough[s] = add(rough[s], keep_above(y, set1(steps[s]), weight));
  }
  const double all = sum(weights), target = top_p * all;
  // what is left out weighs less than top_p leaves out
  lowest = std::max<double>(EXPONENT_OF_NOTHING, std::log2((1 - top_p) * all / (2.0 * row.count)));
  const double margin = 1 + (row.count / W + 16) * 0x1p-23;  // the rough sums may be too large by that
  for (int s = STEPS - 1; s >= 0; --s)
    if (steps[s] > lowest && sum(rough[s]) > target * margin) lowest = steps[s];
  return all;
}

// Draws one of the candidates; goes down the tree with those that are in the group drawn.
static int draw_one(const Row& row, std::vector<Candidate>& some, const double* numbers) {
  int index = 0, step = 1;
  for (int level = row.levels - 1; level >= 0; --level) {
    double sums[FAN] = {};
    const auto group_of = [&](int id) {
      for (int l = 1; l <= level; ++l) id %= row.widths[l];
      return id;
    };
    size_t left = 0;
    for (const Candidate& c : some) {
      const int group = group_of(c.id);
      if (group % step != index) continue;
      sums[group / step] += c.weight;
      some[left++] = c;
    }
    some.resize(left);
    index += step * place(sums, FAN, 1, numbers[row.levels - 1 - level]);
    step = row.widths[level];
  }
  return index;
}

// One of the tokens that the filters leave.
static int draw_filtered(const Row& row, const Draw& d, SampleRoom& room) {
  std::vector<Candidate>& open = room.open;
  double all = 0, lowest = 0;
  if (d.top_k > 0) {
    collect(row, limit_of_first(row, d.top_k, room), open);
    keep_first<false>(room, d.top_k);
  } else if (d.min_p > 0) {
    collect(row, limit_of(row, std::max<double>(EXPONENT_OF_NOTHING, std::log2(d.min_p))), open);
  } else {
    all = survey(row, d.top_p, lowest);
    collect(row, limit_of(row, lowest), open);
  }
  weigh(row, open);
  if (d.min_p > 0) {
    const auto weak = [&](const Candidate& c) { return c.weight < d.min_p; };
    open.erase(std::remove_if(open.begin(), open.end(), weak), open.end());
  }
  if (d.top_p < 1) keep_first<true>(room, d.top_p * (all > 0 ? all : total(open)));
  return draw_one(row, open, row.numbers);
}

static void weigh_all(const float* logits, int count, float best, float scale, float* out) {
  const Row row{logits, count, best, scale, {}, {}, 0};
  int i = 0;
  for (; i + W <= count; i += W) store(out + i, weights_of(exponents_of(row, logits + i, W)));
  alignas(64) float last[W];
  if (i < count) store(last, weights_of(exponents_of(row, logits + i, count - i)));
  for (int j = 0; i + j < count; ++j) out[i + j] = last[j];
}

static int64_t sample_row(const float* logits, int vocab, const Draw& d, SampleRoom& room) {
  int64_t first = d.token;
  if (first == FIRST_TO_FIND) {
    const Top top = top_of(logits, 0, vocab);
    first = std::isfinite(top.peak) ? top.at : NO_TOKEN;
  }
  if (first < 0 || d.scale == 0) return first;
  Row row{logits, vocab, logits[first], d.scale, {}, {}, 0};
  make_numbers(d, row.numbers);
  make_tree(row);
  const bool filters = d.top_k > 0 || d.min_p > 0 || d.top_p < 1;
  return filters ? draw_filtered(row, d, room) : draw_any(row, room);
}

// `tops`: the first highest logit of each row of logits, null for what the draws say.
static void draw_some(const float* logits, int vocab, Draw* draws, int first, int last, const int64_t* tops) {
  static thread_local SampleRoom room;
  for (int i = first; i < last; ++i) {
    Draw& d = draws[i];
    if (tops != nullptr) d.token = tops[d.row];
    d.token = sample_row(logits + d.row * vocab, vocab, d, room);
  }
}

// The same by a team.
static void draw_tokens(Team& team, const float* logits, int vocab, Draw* draws, int count, const int64_t* tops) {
  team.phase(count, 1, [&](int first, int last) { draw_some(logits, vocab, draws, first, last, tops); });
}

static void sample(const float* logits, int vocab, Draw* draws, int count) {
  if (count < 2) return draw_some(logits, vocab, draws, 0, count, nullptr);  // to wake others takes as long
  Turn turn;
  Team& team = turn.team();
  team.run([&](int) { draw_tokens(team, logits, vocab, draws, count, nullptr); });
}
