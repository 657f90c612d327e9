#include "team.h"

#include <chrono>

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace samp {
namespace {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kTurns = 1024;  // of pause: some ten microseconds

// Until `value` is no longer `seen`, or a millisecond. Others have the core meanwhile: offering it
// with sched_yield does not help, the scheduler gives it back at once.
void sleep_on(std::atomic<int>& value, int seen) {
#if defined(__linux__)
  static_assert(sizeof value == sizeof(int), "a futex is an int");
  const timespec limit{0, 1000000};
  syscall(SYS_futex, reinterpret_cast<int*>(&value), FUTEX_WAIT_PRIVATE, seen, &limit, nullptr, 0);
#else
  if (value.load() == seen) std::this_thread::yield();
#endif
}

void wake_all(std::atomic<int>& value) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<int*>(&value), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr,
          0);
#else
  (void)value;
#endif
}

int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

constexpr auto kSpin = std::chrono::microseconds(50);

}  // namespace

Team::Team(int threads) : sleepers_(threads > 1 ? static_cast<size_t>(threads - 1) : 0) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back(&Team::serve, this, i);
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
    epoch_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Team::run(const std::vector<int>& tasks, Work work, void* context) {
  if (tasks.size() > capacity_) {
    capacity_ = tasks.size() * 2;
    slots_.reset(new Slot[capacity_]);
  }
  for (size_t i = 0; i < tasks.size(); ++i) {
    slots_[i].next.store(0, std::memory_order_relaxed);
    slots_[i].done.store(0, std::memory_order_relaxed);
    slots_[i].waiting.store(0, std::memory_order_relaxed);
  }
  tasks_ = &tasks;
  work_ = work;
  context_ = context;
  if (workers_.empty()) {
    walk(0);
    return;
  }
  open_.store(true);
  epoch_.fetch_add(1);
  if (asleep_.load() > 0) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      part(current_cpu());
    }
    wake_.notify_all();
  }
  walk(0);
  // A worker that comes late finds the pass closed; one that is inside is waited for.
  open_.store(false);
  for (int turns = 0, inside; (inside = inside_.load()) > 0; ++turns)
    if (turns < kTurns)
      pause();
    else
      sleep_on(inside_, inside);
}

// A sleeper that last ran on the caller's core would be woken there and, where no idle core shares
// its cache, wait behind the whole pass: it wakes on any other allowed core instead. Once it runs
// it takes back what it may use (rejoin), so that the scheduler can move it when the caller moves.
void Team::part(int cpu) {
#if defined(__linux__)
  if (cpu < 0) return;
  for (size_t i = 0; i < workers_.size(); ++i) {
    Sleeper& sleeper = sleepers_[i];
    if (sleeper.cpu != cpu) continue;
    if (sched_getaffinity(0, sizeof sleeper.allowed, &sleeper.allowed) != 0) return;
    if (CPU_COUNT(&sleeper.allowed) < 2) return;
    cpu_set_t others = sleeper.allowed;
    CPU_CLR(cpu, &others);
    sleeper.parted =
        pthread_setaffinity_np(workers_[i].native_handle(), sizeof others, &others) == 0;
  }
#else
  (void)cpu;
#endif
}

void Team::rejoin(Sleeper& sleeper) {
#if defined(__linux__)
  sleeper.cpu = -1;
  if (!sleeper.parted) return;
  sleeper.parted = false;
  sched_setaffinity(0, sizeof sleeper.allowed, &sleeper.allowed);
#else
  (void)sleeper;
#endif
}

// For the tasks that other threads took: briefly awake, then asleep.
void Team::wait(Slot& slot, int total) {
  for (int turns = 0; turns < kTurns; ++turns) {
    if (slot.done.load(std::memory_order_acquire) >= total) return;
    pause();
  }
  slot.waiting.fetch_add(1);
  for (int done; (done = slot.done.load()) < total;) sleep_on(slot.done, done);
}

void Team::walk(int thread) {
  const std::vector<int>& tasks = *tasks_;
  for (size_t phase = 0; phase < tasks.size(); ++phase) {
    Slot& slot = slots_[phase];
    const int total = tasks[phase];
    int finished = 0;
    while (slot.next.load(std::memory_order_relaxed) < total) {
      const int task = slot.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= total) break;
      work_(context_, static_cast<int>(phase), task, thread);
      ++finished;
    }
    if (finished && slot.done.fetch_add(finished) + finished == total && slot.waiting.load() > 0)
      wake_all(slot.done);
    wait(slot, total);
  }
}

void Team::serve(int thread) {
  unsigned seen = 0;
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    bool fresh = false;
    do {
      for (int i = 0; i < 64 && !fresh; ++i) {
        fresh = epoch_.load(std::memory_order_acquire) != seen;
        if (!fresh) pause();
      }
    } while (!fresh && std::chrono::steady_clock::now() < until);
    if (!fresh) {
      std::unique_lock<std::mutex> lock(mutex_);
      Sleeper& self = sleepers_[static_cast<size_t>(thread - 1)];
      self.cpu = current_cpu();
      asleep_.fetch_add(1);
      wake_.wait(lock, [&] { return epoch_.load() != seen; });
      asleep_.fetch_sub(1);
      rejoin(self);
    }
    seen = epoch_.load();
    if (stop_.load()) return;
    inside_.fetch_add(1);
    if (open_.load()) walk(thread);
    if (inside_.fetch_sub(1) == 1 && !open_.load()) wake_all(inside_);
  }
}

}  // namespace samp
