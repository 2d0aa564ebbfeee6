#include "team.h"

#include <sched.h>

#include <memory>

namespace headrace {

namespace {

// About 50 microseconds; a wait within a step that lasts longer has lost its core to somebody.
constexpr int SPINS_BEFORE_SLEEP = 1000;
constexpr int SPINS_BEFORE_YIELD = 2000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

std::mutex turns;
Team* the_team = nullptr;  // never destroyed at exit, when an engine's thread may still be in a call
std::atomic<int> wanted{1};

}  // namespace

thread_local uint32_t Team::number_ = 0;
thread_local int Team::thread_ = 0;

Team::Team(int size) : size_(size), next_(2 * size) {
  for (int i = 1; i < size; ++i) threads_.emplace_back([this, i] { serve(i); });
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> guard(lock_);
    stopping_ = true;
    calls_.fetch_add(1);
  }
  news_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::run(const std::function<void(int)>& work) {
  number_ = passed_.load();
  thread_ = 0;
  if (size_ > 1) {
    std::lock_guard<std::mutex> guard(lock_);
    work_ = &work;
    busy_ = size_ - 1;
    calls_.fetch_add(1);
  }
  if (size_ > 1) news_.notify_all();
  work(0);
  for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < SPINS_BEFORE_YIELD) {
      relax();
    } else {
      sched_yield();
    }
  }
}

void Team::serve(int thread) {
  uint32_t seen = 0;
  thread_ = thread;
  for (;;) {
    for (int spins = 0; calls_.load(std::memory_order_acquire) == seen; ++spins) {
      if (spins < SPINS_BEFORE_SLEEP) {
        relax();
        continue;
      }
      std::unique_lock<std::mutex> guard(lock_);
      news_.wait(guard, [&] { return calls_.load() != seen; });
    }
    {
      // the lock makes `work_` the one that belongs to this call
      std::lock_guard<std::mutex> guard(lock_);
      seen = calls_.load();
      if (stopping_) return;
    }
    number_ = passed_.load();
    (*work_)(thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

// Whether this thread is the last.
bool Team::arrive(uint32_t number) {
  number_ = number + 1;
  return arrived_.value.fetch_add(1, std::memory_order_acq_rel) == size_ - 1;
}

void Team::release(uint32_t number) {
  arrived_.value.store(0, std::memory_order_relaxed);
  for (int i = 0; i < size_; ++i) next_[(number & 1) * size_ + i].value.store(0, std::memory_order_relaxed);
  passed_.store(number + 1, std::memory_order_release);
}

void Team::wait(uint32_t number) {
  for (int spins = 0; passed_.load(std::memory_order_acquire) == number; ++spins) {
    if (spins < SPINS_BEFORE_YIELD) {
      relax();
    } else {
      sched_yield();
    }
  }
}

Turn::Turn(bool own) : held_(turns, std::defer_lock) {
  const int count = wanted.load();
  if (own) {
    static thread_local std::unique_ptr<Team> mine;
    if (mine == nullptr || mine->size() != count) mine = std::make_unique<Team>(count);
    team_ = mine.get();
    return;
  }
  held_.lock();
  if (the_team == nullptr || the_team->size() != count) {
    delete the_team;
    the_team = new Team(count);
  }
  team_ = the_team;
}

Team& Turn::team() { return *team_; }

void set_threads(int count) { wanted.store(count < 1 ? 1 : count); }

}  // namespace headrace
