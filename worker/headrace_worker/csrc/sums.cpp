#include "sums.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

namespace headrace {

namespace {

constexpr int64_t LINE_BYTES = 64;
// Some 50 microseconds; then the core is given away between looks, and at last slept.
constexpr int SPINS = 1000, YIELDS = 200;
constexpr int SLEEP_US = 50;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

std::atomic<uint64_t>& flag(const Sums& s, int rank) {
  return *reinterpret_cast<std::atomic<uint64_t>*>(s.flags + rank * LINE_BYTES);
}

float* slot(const Sums& s, int rank) {
  const int64_t half = (s.turn & 1) * s.size + rank;
  return reinterpret_cast<float*>(s.slots + half * s.slot_bytes);
}

// Until `rank` has come to this rank's turn.
void wait_for(Sums& s, int rank) {
  const std::atomic<uint64_t>& count = flag(s, rank);
  for (int i = 0; i < SPINS; ++i) {
    if (count.load(std::memory_order_acquire) >= s.turn) return;
    relax();
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(s.patience_us);
  for (int i = 0; count.load(std::memory_order_acquire) < s.turn; ++i) {
    if (std::chrono::steady_clock::now() > end) {
      s.late = rank;
      return;
    }
    if (i < YIELDS) {
      sched_yield();
    } else {
      usleep(SLEEP_US);
    }
  }
}

void wait(Sums& s) {
  for (int rank = 0; rank < s.size && s.late < 0; ++rank)
    if (rank != s.rank) wait_for(s, rank);
}

// Takes the next turn with x. Who writes a slot again has seen everybody at the turn between.
void publish(Sums& s, const float* x, int64_t count) {
  wait(s);
  ++s.turn;
  std::memcpy(slot(s, s.rank), x, count * sizeof(float));
  flag(s, s.rank).store(s.turn, std::memory_order_release);
  wait(s);
}

// out [count] = what all ranks have published from `start` on; of four ranks two by two, as the kernels
// add up four runs of columns.
void sum(Sums& s, int64_t start, int64_t count, float* out) {
  const float *first = slot(s, 0) + start, *second = slot(s, 1) + start;
  if (s.size == 4) {
    const float *third = slot(s, 2) + start, *fourth = slot(s, 3) + start;
    for (int64_t i = 0; i < count; ++i) out[i] = (first[i] + second[i]) + (third[i] + fourth[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = first[i] + second[i];
    for (int rank = 2; rank < s.size; ++rank) {
      const float* more = slot(s, rank) + start;
      for (int64_t i = 0; i < count; ++i) out[i] += more[i];
    }
  }
  s.bytes += (s.size - 1) * count * static_cast<int64_t>(sizeof(float));
  ++s.messages;
}

void add_run(Sums& s, float* x, int64_t count) {
  publish(s, x, count);
  if (s.late >= 0) return;
  if (s.size == 2 || count * static_cast<int64_t>(sizeof(float)) <= s.one_turn_bytes || count < s.size) {
    sum(s, 0, count, x);
    return;
  }
  // my share of everybody's numbers, then everybody's share
  const auto bound = [&](int rank) { return count * rank / s.size; };
  const int64_t own = bound(s.rank), mine = bound(s.rank + 1) - own;
  sum(s, own, mine, x + own);
  publish(s, x + own, mine);
  if (s.late >= 0) return;
  for (int rank = 0; rank < s.size; ++rank)
    if (rank != s.rank) std::memcpy(x + bound(rank), slot(s, rank), (bound(rank + 1) - bound(rank)) * sizeof(float));
  s.bytes += (count - mine) * static_cast<int64_t>(sizeof(float));
  ++s.messages;
}

}  // namespace

void add_up(Sums& s, float* x, int64_t count) {
  if (s.apart != nullptr) {
    if (s.late < 0 && s.apart(x, count) != 0) s.late = s.size;
    return;
  }
  const int64_t most = s.slot_bytes / static_cast<int64_t>(sizeof(float));
  for (int64_t start = 0; start < count && s.late < 0; start += most)
    add_run(s, x + start, std::min(most, count - start));
}

}  // namespace headrace
