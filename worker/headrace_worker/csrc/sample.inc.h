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
  uint64_t inverses[NUMBERS];   // of the widths, times 2^INVERSE_BITS, rounded up
};

// id / width, for ids and widths below 2^20.
constexpr int INVERSE_BITS = 40;
HR_INLINE int divided(const Row& row, int id, int level) {
  return static_cast<int>(static_cast<uint64_t>(id) * row.inverses[level] >> INVERSE_BITS);
}

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
    const int width = (row.widths[row.levels - 1] + FAN - 1) / FAN;
    row.widths[row.levels] = width;
    row.inverses[row.levels] = ((1ull << INVERSE_BITS) + width - 1) / width;
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

// The tokens whose logit is finite and reaches `limit`, by rising id: into `kept` those whose exponent
// is above `sure`, whose weights are added up, and into `open` the others.
static double collect(const Row& row, float limit, float sure, SampleRoom& room) {
  room.open.clear();
  room.kept.clear();
  const float* x = row.logits;
  const vf least = set1(std::max(limit, -std::numeric_limits<float>::max()));
  constexpr int LOT = 4 * W;
  alignas(64) float exponents[W], weights[W];
  double sum = 0;
  for (int i = 0; i < row.count; i += LOT) {
    const int stop = std::min(i + LOT, row.count);
    if (stop - i == LOT) {
      const vf a = max(load(x + i), load(x + i + W)), b = max(load(x + i + 2 * W), load(x + i + 3 * W));
      if (reaching(max(a, b), least) == 0) continue;
    }
    for (int j = i; j < stop; j += W) {
      uint32_t bits = reaching(load_some(x + j, stop - j), least);
      if (bits == 0) continue;
      const vf y = exponents_of(row, x + j, stop - j);
      store(exponents, y);
      store(weights, weights_of(y));
      for (; bits != 0; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        const Candidate found{x[j + lane], weights[lane], j + lane};
        if (exponents[lane] > sure) {
          room.kept.push_back(found);
          sum += found.weight;
        } else {
          room.open.push_back(found);
        }
      }
    }
  }
  return sum;
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

static double total(const std::vector<Candidate>& some) {
  double sum = 0;
  for (const Candidate& c : some) sum += c.weight;
  return sum;
}

HR_INLINE bool before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// Leaves the fewest of the highest that together reach `target`, by their weights or by their number;
// all where those do not. `room.kept` has some that are among them and have `reached` so much, and
// `room.open` the others by rising id; it gets back all in no order.
//
// Counted by distance from the highest in BINS, the bin in which the target is reached is looked into
// again, until it is small or holds one value only.
template <bool BY_WEIGHT>
static void keep_first(SampleRoom& room, double target, double reached) {
  constexpr int BINS = 256;
  constexpr size_t SORTED_MAX = 64;
  std::vector<Candidate>& open = room.open;
  std::vector<Candidate>& kept = room.kept;
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
  kept.clear();
}

// What is known of a row's weights after one pass: what all add up to, an exponent that everything
// reaches that top_p leaves, and one above which it leaves everything.
struct Survey {
  double all;
  float lowest, sure;
};

static Survey survey(const Row& row, double top_p) {
  constexpr int STEPS = 7;
  const auto exponent_at = [](int step) { return -2.0f - 2.0f * static_cast<float>(step); };
  Wide weights = wide_zero();
  vf rough[STEPS];
  for (int s = 0; s < STEPS; ++s) rough[s] = zero();
  for (int i = 0; i < row.count; i += W) {
    const vf y = exponents_of(row, row.logits + i, row.count - i), weight = weights_of(y);
    add_to(weights, weight);
#pragma GCC unroll 8
    for (int s = 0; s < STEPS; ++s) rough[s] = add(rough[s], keep_above(y, set1(exponent_at(s)), weight));
  }
  const double all = sum(weights), target = top_p * all;
  // what is left out below that weighs less than top_p leaves out
  const double little = std::log2((1 - top_p) * all / (2.0 * row.count));
  Survey found{all, std::max(EXPONENT_OF_NOTHING, static_cast<float>(little - 0.001)), INFINITY};
  const double margin = 1 + (row.count / W + 16) * 0x1p-23;  // the rough sums are true but for that
  for (int s = STEPS - 1; s >= 0; --s) {
    const double above = sum(rough[s]);
    if (above > target * margin) found.lowest = std::max(found.lowest, exponent_at(s));
    if (above * margin < target && found.sure == INFINITY) found.sure = exponent_at(s);
  }
  return found;
}

// Draws one of the candidates; goes down the tree with those that are in the group drawn.
static int draw_one(const Row& row, std::vector<Candidate>& some, const double* numbers) {
  int index = 0, step = 1;
  for (int level = row.levels - 1; level >= 0; --level) {
    double sums[FAN] = {};
    size_t left = 0;
    for (const Candidate& c : some) {
      int group = c.id, its = 0;
      for (int l = 1; l <= level; ++l) group -= divided(row, group, l) * row.widths[l];
      if (step > 1) {
        its = divided(row, group, level + 1);
        if (group - its * step != index) continue;
      } else {
        its = group;
      }
      sums[its] += c.weight;
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
  if (d.top_k <= 0 && d.min_p <= 0) {
    const Survey known = survey(row, d.top_p);
    const double sure = collect(row, limit_of(row, known.lowest), known.sure, room);
    keep_first<true>(room, d.top_p * known.all, sure);
    return draw_one(row, open, row.numbers);
  }
  if (d.top_k > 0) {
    collect(row, limit_of_first(row, d.top_k, room), INFINITY, room);
    keep_first<false>(room, d.top_k, 0);
  } else {
    collect(row, limit_of(row, std::max<double>(EXPONENT_OF_NOTHING, std::log2(d.min_p))), INFINITY, room);
  }
  const auto weak = [&](const Candidate& c) { return c.weight < d.min_p; };
  if (d.min_p > 0) open.erase(std::remove_if(open.begin(), open.end(), weak), open.end());
  if (d.top_p < 1) keep_first<true>(room, d.top_p * total(open), 0);
  return draw_one(row, open, row.numbers);
}

static void weigh_all(const float* logits, int count, float best, float scale, float* out) {
  const Row row{logits, count, best, scale, {}, {}, 0, {}};
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
  Row row{logits, vocab, logits[first], d.scale, {}, {}, 0, {}};
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
