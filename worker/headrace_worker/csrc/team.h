// A team of threads that goes through phases together: each has a run of a phase's items to itself,
// takes from the others' runs when it is done with its own, and nobody starts the next phase before
// all who are there are done with this one. Runs, because memory is read faster from one end to the
// other. Threads join a call when they are awake and have a core: the caller begins alone, since a
// wake-up takes as long as several phases, and longer where others use the cores.
//
// Invariant: which thread takes an item never changes its result, so a phase's items write to
// places of their own, and how many threads are there changes no result either. Waiting threads
// spin, since phases last microseconds; they give the core away when they have spun long, and sleep
// between calls.
//
// Rejected: OpenMP. torch brings a runtime of its own, and two of them in one process make two pools
// that spin against each other.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace headrace {

class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Runs `work` on the caller's thread and on every other that comes in time; returns when all who came
  // are done.
  void run(const std::function<void(int thread)>& work);

  // Within `run`: calls f(first, last) for parts of 0..count of at most `grain` items, then waits for
  // the others. Every thread has to make the same calls, and who comes late makes those that are over for
  // nothing: between two calls `work` may only look at what phases made, not change it. `finish()` is
  // called once, by the last who is done with the items, before anybody goes on.
  template <typename F, typename G>
  void phase(int count, int grain, const F& f, const G& finish) {
    const uint32_t number = number_;
    if (!joined_ && !join(number)) return;
    Counter* next = next_.data() + (number & 1) * size_;
    for (int turn = 0; turn < size_; ++turn) {
      const int whose = (thread_ + turn) % size_;
      const int begin = share(count, whose), end = share(count, whose + 1);
      for (;;) {
        if (next[whose].value.load(std::memory_order_relaxed) >= end - begin) break;
        const int first = begin + next[whose].value.fetch_add(grain, std::memory_order_relaxed);
        if (first >= end) break;
        f(first, first + grain < end ? first + grain : end);
      }
    }
    if (arrive(number)) {
      finish();
      release(number);
    } else {
      wait(number);
    }
  }

  template <typename F>
  void phase(int count, int grain, const F& f) {
    phase(count, grain, f, [] {});
  }

  // The first item of a thread's own run.
  int share(int count, int thread) const { return static_cast<int>(static_cast<int64_t>(count) * thread / size_); }

  // A grain that gives each thread a few turns.
  int grain(int count) const {
    int g = count / (size_ * 8);
    return g < 1 ? 1 : g;
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };

  // Where the team is: a phase's number, how many are there, and how many of them are done with it.
  static constexpr uint64_t ONE_HERE = uint64_t{1} << 16, COUNT_MASK = 0xffff;
  static uint32_t number_of(uint64_t state) { return static_cast<uint32_t>(state >> 32); }
  static uint64_t here(uint64_t state) { return state >> 16 & COUNT_MASK; }
  static uint64_t done(uint64_t state) { return state & COUNT_MASK; }
  static uint64_t state_of(uint32_t number, uint64_t here) { return static_cast<uint64_t>(number) << 32 | here << 16; }

  bool join(uint32_t number);
  bool arrive(uint32_t number);
  void release(uint32_t number);
  void wait(uint32_t number);
  void serve(int thread);

  const int size_;
  std::vector<Counter> next_;  // of this phase and of the next: what was taken of each thread's run
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<uint32_t> passed_{0};
  alignas(64) std::atomic<uint32_t> calls_{0};
  std::atomic<int> busy_{0};  // who came to this call, beside the caller
  std::atomic<bool> stopping_{false};
  std::mutex lock_;
  std::condition_variable news_;
  const std::function<void(int)>* work_ = nullptr;  // null between calls, and then nobody comes
  uint32_t first_ = 0;                              // the number of the call's first phase
  std::vector<std::thread> threads_;
  static thread_local uint32_t number_;
  static thread_local int thread_;
  static thread_local bool joined_;
};

// The team of this process, of as many threads as were asked for last; calls take turns. Or a team of
// the calling thread's own, for calls that wait for each other: ranks that are threads of one process.
class Turn {
 public:
  explicit Turn(bool own = false);
  Team& team();

 private:
  std::unique_lock<std::mutex> held_;
  Team* team_;
};

void set_threads(int count);

}  // namespace headrace
