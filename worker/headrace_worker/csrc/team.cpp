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
thread_local bool Team::joined_ = false;

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
  number_ = number_of(state_.load());
  thread_ = 0;
  joined_ = true;
  state_.store(state_of(number_, 1));
  if (size_ == 1) {
    work(0);
    return;
  }
  {
    std::lock_guard<std::mutex> guard(lock_);
    work_ = &work;
    first_ = number_;
    calls_.fetch_add(1);
  }
  news_.notify_all();
  work(0);
  {
    std::lock_guard<std::mutex> guard(lock_);
    work_ = nullptr;
  }
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
    const std::function<void(int)>* work;
    {
      // the lock makes `work_` the one that belongs to this call
      std::lock_guard<std::mutex> guard(lock_);
      seen = calls_.load();
      if (stopping_) return;
      work = work_;
      if (work == nullptr) continue;  // too late
      number_ = first_;
      busy_.fetch_add(1, std::memory_order_relaxed);
    }
    joined_ = false;
    (*work)(thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

// Whether this thread takes part in a phase from now on; false where the phase is over.
bool Team::join(uint32_t number) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while (number_of(state) == number) {
    if (done(state) == here(state)) {  // all but the end of it is over
      wait(number);
    } else if (state_.compare_exchange_weak(state, state + ONE_HERE, std::memory_order_acq_rel)) {
      joined_ = true;
      return true;
    } else {
      continue;  // `state` is what it is now
    }
    state = state_.load(std::memory_order_acquire);
  }
  number_ = number + 1;
  return false;
}

// Whether this thread is the last.
bool Team::arrive(uint32_t number) {
  number_ = number + 1;
  const uint64_t state = state_.fetch_add(1, std::memory_order_acq_rel) + 1;
  return done(state) == here(state);
}

void Team::release(uint32_t number) {
  for (int i = 0; i < size_; ++i) next_[(number & 1) * size_ + i].value.store(0, std::memory_order_relaxed);
  state_.store(state_of(number + 1, here(state_.load(std::memory_order_relaxed))), std::memory_order_release);
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
