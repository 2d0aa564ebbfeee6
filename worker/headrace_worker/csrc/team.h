// A team of threads that goes through phases together: items of a phase are taken one after the
// other by whoever is free, and nobody starts the next phase before all are done with this one.
//
// Invariant: which thread takes an item never changes its result, so a phase's items write to
// places of their own. Waiting threads spin, since phases last microseconds; they give the core away
// when they have spun long, and sleep between calls.
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

  // Runs `work` on every thread, the caller's included; returns when all are done.
  void run(const std::function<void(int thread)>& work);

  // Within `run`: calls f(first, last) for parts of 0..count of at most `grain` items, then waits for
  // the others. Every thread has to make the same calls.
  template <typename F>
  void phase(int count, int grain, const F& f) {
    uint32_t number = number_;
    std::atomic<int>& next = next_[number & 1].value;
    if (count > 0) {
      for (;;) {
        int first = next.fetch_add(grain, std::memory_order_relaxed);
        if (first >= count) break;
        f(first, first + grain < count ? first + grain : count);
      }
    }
    wait(number);
  }

  // A grain that gives each thread a few turns.
  int grain(int count) const {
    int g = count / (size_ * 8);
    return g < 1 ? 1 : g;
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };

  void wait(uint32_t number);
  void serve(int thread);

  const int size_;
  Counter next_[2];
  Counter arrived_;
  alignas(64) std::atomic<uint32_t> passed_{0};
  alignas(64) std::atomic<uint32_t> calls_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> stopping_{false};
  std::mutex lock_;
  std::condition_variable news_;
  const std::function<void(int)>* work_ = nullptr;
  std::vector<std::thread> threads_;
  static thread_local uint32_t number_;
};

// The team of this process, of as many threads as were asked for last; calls take turns.
class Turn {
 public:
  Turn();
  Team& team();

 private:
  std::unique_lock<std::mutex> held_;
};

void set_threads(int count);

}  // namespace headrace
