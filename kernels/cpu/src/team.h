// A team of threads that walks a list of phases together. A phase is a number of tasks that any
// thread may take; it is over when all its tasks are done. Nothing waits for a thread that took no
// task: a worker that is asleep or off its core costs its help, never the pass. Workers spin for a
// few microseconds for the next pass and then sleep, so that other processes have the core.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace samp {

class Team {
 public:
  // What a pass does: task `task` of phase `phase` on thread `thread` (0 is the caller's).
  using Work = void (*)(void* context, int phase, int task, int thread);

  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  void run(const std::vector<int>& tasks, Work work, void* context);

 private:
  struct alignas(64) Slot {
    std::atomic<int> next{0};
    std::atomic<int> done{0};
    std::atomic<int> waiting{0};
  };

  // Of one worker that sleeps, under mutex_: where it ran last, and the cores it may go back to
  // if it was told to wake elsewhere.
  struct Sleeper {
    int cpu = -1;
    bool parted = false;
#if defined(__linux__)
    cpu_set_t allowed;
#endif
  };

  static void wait(Slot& slot, int total);
  static void rejoin(Sleeper& sleeper);

  void walk(int thread);
  void part(int cpu);
  void serve(int thread);

  std::vector<std::thread> workers_;
  std::vector<Sleeper> sleepers_;
  std::unique_ptr<Slot[]> slots_;
  size_t capacity_ = 0;
  const std::vector<int>* tasks_ = nullptr;
  Work work_ = nullptr;
  void* context_ = nullptr;

  alignas(64) std::atomic<unsigned> epoch_{0};
  std::atomic<bool> open_{false};
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<int> inside_{0};
  std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace samp
