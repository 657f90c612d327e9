// CUDA's words for g++: a kernel's source runs here unchanged, block after block, each CUDA thread
// a fiber. __syncthreads, shuffles, ldmatrix and mma are meetings of the fibers concerned.
//
// It is stricter than a GPU where it can be: shared memory starts as NaN, an asynchronous copy
// happens as late as its wait allows, 16-byte accesses must be aligned, threads run in an order
// that the caller chooses (a missing barrier gives another result in another order), and bank
// conflicts of ldmatrix are counted. It says nothing of speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__ inline
#define __forceinline__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) int2 {
  int x, y;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::vector<char> stack;
  bool done = false;
  const unsigned* waits_for = nullptr;  // A generation, and the one at which it began to wait.
  unsigned since = 0;
  std::vector<std::vector<Copy>> groups;  // Copies that have not happened; the last is open.
};

struct Meeting {
  unsigned generation = 0, arrived = 0, expected = 0;
  void* slots[128];  // A warp uses 32.
};

struct Counters {
  long long mma, ldmatrix, conflicts, copies, blocks;
};

static Counters counters;
static std::vector<Fiber> fibers;
static std::vector<Meeting> warps;
static Meeting block;
static unsigned current;
static void* scheduler_stack;
static void (*body)(void*);
static void* body_arguments;
static unsigned char* shared;
static size_t shared_bytes;
static unsigned order;
// Who wrote each 16 bytes of shared memory and has not fenced them for hopper.cuh; -1: nobody.
static std::vector<int> unfenced;
static void (*at_start)();              // of a block, where hopper.cuh has state of its own
static bool (*when_stuck)();            // does something that was put off; false: there is nothing
constexpr unsigned SHARED_BASE = 1024;  // Of a block's shared memory, as on sm_90.

inline unsigned shared_offset(const void* p) {
  return static_cast<const unsigned char*>(p) - shared;
}

[[noreturn]] static void fail(const char* why) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u %u %u, thread %u)\n", why, blockIdx.x, blockIdx.y,
               blockIdx.z, current);
  std::abort();
}

#if defined(__x86_64__)
extern "C" void samp_switch_fiber(void** save, void* load);
asm(R"(
.text
.local samp_switch_fiber
samp_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "cuda_on_cpu.h switches stacks on x86-64 only"
#endif

static void yield() { samp_switch_fiber(&fibers[current].stack_pointer, scheduler_stack); }

static void wait_for(const unsigned* generation) {
  fibers[current].waits_for = generation;
  fibers[current].since = *generation;
  yield();
}

// Wait until all of the meeting's fibers are here; the last of them calls `act` for everybody.
template <class Act>
static void meet(Meeting& meeting, Act act) {
  if (++meeting.arrived == meeting.expected) {
    act();
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    wait_for(&meeting.generation);
  }
}

inline Meeting& warp() { return warps[current / 32]; }
inline unsigned lane() { return current % 32; }

// Every lane lends its `mine` to the one that acts on all 32 of them.
template <class T, class Act>
static void together(T& mine, Act act) {
  Meeting& meeting = warp();
  if (meeting.expected != 32) fail("a warp operation without all 32 lanes");
  meeting.slots[lane()] = &mine;
  meet(meeting, [&] { act(reinterpret_cast<T**>(meeting.slots)); });
}

static void leave(Meeting& meeting) {
  --meeting.expected;
  if (meeting.expected && meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
}

static void fiber_main() {
  body(body_arguments);
  Fiber& fiber = fibers[current];
  for (auto& group : fiber.groups)
    if (!group.empty()) fail("a thread ended before its asynchronous copies");
  fiber.done = true;
  leave(warp());
  leave(block);
  yield();
  fail("a fiber ran on");
}

static bool can_run(const Fiber& fiber) {
  return !fiber.done && (!fiber.waits_for || *fiber.waits_for != fiber.since);
}

static void run_block(unsigned threads) {
  constexpr size_t STACK = 64 * 1024;
  fibers.resize(threads);
  warps.assign((threads + 31) / 32, Meeting());
  block = Meeting();
  block.expected = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(STACK);
    fiber.groups.assign(1, {});
    fiber.done = false;
    fiber.waits_for = nullptr;
    auto top = reinterpret_cast<uintptr_t>(fiber.stack.data() + STACK) & ~uintptr_t(15);
    void** frame = reinterpret_cast<void**>(top) - 8;
    for (int r = 0; r < 6; ++r) frame[r] = nullptr;
    frame[6] = reinterpret_cast<void*>(&fiber_main);
    fiber.stack_pointer = frame;
    ++warps[i / 32].expected;
  }
  std::memset(shared, 0xFF, shared_bytes);  // NaN in any float type, -1 in any integer.
  unfenced.assign(shared_bytes / 16 + 1, -1);
  if (at_start) at_start();
  unsigned alive = threads;
  const unsigned count = warps.size();
  while (alive) {
    bool moved = false;
    for (unsigned w = 0; w < count; ++w) {
      // 0: forwards, 1: backwards, else an order of its own for the warps and for the lanes.
      const unsigned which = order == 1 ? count - 1 - w : (w + order / 2) % count;
      for (bool again = true; again;) {
        again = false;
        for (unsigned l = 0; l < 32; ++l) {
          const unsigned i = which * 32 + (order == 1 ? 31 - l : l ^ (order / 2 % 32));
          if (i >= threads || !can_run(fibers[i])) continue;
          current = i;
          fibers[i].waits_for = nullptr;
          threadIdx.x = i;
          samp_switch_fiber(&scheduler_stack, fibers[i].stack_pointer);
          again = moved = true;
          alive -= fibers[i].done;
        }
      }
    }
    if (!moved && alive && !(when_stuck && when_stuck()))
      fail("deadlock: threads wait for each other");
  }
  ++counters.blocks;
}

template <class... Parameters, size_t... I>
static void call(void (*kernel)(Parameters...), void** values, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<Parameters>*>(values[I])...);
}

template <class... Parameters>
static int launch(void (*kernel)(Parameters...), const unsigned* grid, unsigned threads,
                  unsigned bytes, void** values, int count, unsigned how) {
  if (count != int(sizeof...(Parameters))) return 1;
  struct Call {
    void (*kernel)(Parameters...);
    void** values;
  } pair{kernel, values};
  body = [](void* data) {
    auto* it = static_cast<Call*>(data);
    call(it->kernel, it->values, std::index_sequence_for<Parameters...>());
  };
  body_arguments = &pair;
  gridDim = dim3{grid[0], grid[1], grid[2]};
  blockDim = dim3{threads, 1, 1};
  threadIdx = dim3{0, 0, 0};
  shared_bytes = bytes;
  order = how;
  shared = static_cast<unsigned char*>(std::aligned_alloc(1024, (bytes / 1024 + 1) * 1024));
  const unsigned blocks = grid[0] * grid[1] * grid[2];
  for (unsigned b = 0; b < blocks; ++b) {
    const unsigned i = order == 1 ? blocks - 1 - b : b;
    blockIdx = dim3{i % grid[0], i / grid[0] % grid[1], i / (grid[0] * grid[1])};
    run_block(threads);
  }
  std::free(shared);
  return 0;
}

inline const float* half_values() {
  static float* table = [] {
    auto* made = static_cast<float*>(std::malloc(65536 * sizeof(float)));
    for (unsigned bits = 0; bits < 65536; ++bits) {
      const auto narrow = static_cast<unsigned short>(bits);
      _Float16 half;
      std::memcpy(&half, &narrow, 2);
      made[bits] = static_cast<float>(half);
    }
    return made;
  }();
  return table;
}

}  // namespace emulated

static inline void __syncthreads() {
  emulated::meet(emulated::block, [] {});
}
static inline void __syncwarp() {
  emulated::meet(emulated::warp(), [] {});
}
static inline void __threadfence() {}
[[noreturn]] static inline void __trap() { emulated::fail("trap"); }

template <class T>
static inline T __shfl_xor_sync(unsigned, T value, int mask) {
  struct {
    T given, got;
  } mine{value, value};
  emulated::together(mine, [mask](auto** all) {
    for (int l = 0; l < 32; ++l) all[l]->got = all[l ^ mask]->given;
  });
  return mine.got;
}

static inline unsigned atomicAdd(unsigned* to, unsigned more) {
  const unsigned old = *to;
  *to += more;
  return old;
}

static inline int __float2int_rn(float x) {
  return static_cast<int>(std::lrintf(std::fmin(std::fmax(x, -1e9f), 1e9f)));
}
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// The entry that emulator.py calls; arguments are pointers to the kernel's parameters.
#define SAMP_KERNEL(name)                                                               \
  extern "C" int emulate_##name(const unsigned* grid, unsigned threads, unsigned bytes, \
                                void** values, int count, unsigned order) {             \
    return emulated::launch(name, grid, threads, bytes, values, count, order);          \
  }                                                                                     \
  extern "C" void count_##name(long long* to) {                                         \
    std::memcpy(to, &emulated::counters, sizeof(emulated::counters));                   \
  }
#define SAMP_SHARED(name) unsigned char* name = emulated::shared
