// What this machine can do at most: int8 and fp32 arithmetic in registers, reading memory.
//
// Benchmarks divide by these figures, so they must be true limits: independent chains of the very
// instruction that a kernel's inner loop is made of, with no load in between, on `threads` threads
// at once; the best of many short windows, since anything else that runs only takes away.
// Figures are 0 where the CPU lacks the instruction.
//
// For module.cc: declare `void bind_limits(nanobind::module_&);` and call it once. It adds
//   int8_gops, vnni_gops (int8 without AMX tiles), f32_gflops, read_gbps: each (threads, seconds),
// which release the GIL. This file needs no instruction-set flags: the functions that use one carry
// it as an attribute and run only where the CPU has it. Built alone, without Python, by
//   g++ -O2 -std=c++17 -shared -fPIC -pthread -DSAMP_LIMITS_ALONE limits.cc -o limits.so

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#ifndef SAMP_LIMITS_ALONE
#include <nanobind/nanobind.h>

#include "dispatch.h"
#endif

namespace {

using Clock = std::chrono::steady_clock;

double now() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

template <typename Ready>
void spin_until(const Ready& ready) {
  for (int turns = 0; !ready(); ++turns)
    if (turns > 2000) std::this_thread::yield();
}

// Runs `work(thread)` on all threads at once, again and again for `seconds`, and returns the least
// time from the common start to the last thread's end. The threads spin between windows, so that
// waking up is not part of the figure, and yield after a while: on a busy machine the one that is
// waited for may need this very core.
template <typename Work>
double best_window(int threads, double seconds, const Work& work) {
  if (threads < 1) threads = 1;
  std::atomic<int> round{0}, done{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> others;
  for (int id = 1; id < threads; ++id)
    others.emplace_back([&, id] {
      for (int seen = 0;;) {
        spin_until([&] { return stop.load() || round.load() != seen; });
        if (stop.load()) return;
        ++seen;
        work(id);
        done.fetch_add(1);
      }
    });
  double best = std::numeric_limits<double>::infinity();
  const double deadline = now() + seconds;
  do {
    done.store(0);
    const double begun = now();
    round.fetch_add(1);
    work(0);
    spin_until([&] { return done.load() == threads - 1; });
    best = std::min(best, now() - begun);
  } while (now() < deadline);
  stop.store(true);
  for (auto& other : others) other.join();
  return best;
}

#if defined(__x86_64__)

// 24 chains hide a latency of up to 12 cycles at two instructions a cycle. They start from
// the thread's own registers; what they add up to does not matter, and int32 wraps.
#define SAMP_12(op, a)                                                                      \
  op(a, 0) op(a, 1) op(a, 2) op(a, 3) op(a, 4) op(a, 5) op(a, 6) op(a, 7) op(a, 8) op(a, 9) \
      op(a, 10) op(a, 11)
#define SAMP_24(op, a)                                                                      \
  SAMP_12(op, a)                                                                            \
  op(a, 12) op(a, 13) op(a, 14) op(a, 15) op(a, 16) op(a, 17) op(a, 18) op(a, 19) op(a, 20) \
      op(a, 21) op(a, 22) op(a, 23)

#define SAMP_ZMM_INT8(_, i) "vpdpbusd %%zmm31, %%zmm30, %%zmm" #i "\n\t"
#define SAMP_ZMM_F32(_, i) "vfmadd231ps %%zmm31, %%zmm30, %%zmm" #i "\n\t"
// %{ and %}: a bare brace would be read as a choice between dialects.
#define SAMP_YMM_VNNI(_, i) "%{vex%} vpdpbusd %%ymm15, %%ymm14, %%ymm" #i "\n\t"
#define SAMP_YMM_F32(_, i) "vfmadd231ps %%ymm15, %%ymm14, %%ymm" #i "\n\t"
// Without VNNI: 16-bit sums, widened to 32 bits, added up.
#define SAMP_YMM_MADD(_, i)                  \
  "vpmaddubsw %%ymm15, %%ymm14, %%ymm13\n\t" \
  "vpmaddwd %%ymm12, %%ymm13, %%ymm13\n\t"   \
  "vpaddd %%ymm13, %%ymm" #i ", %%ymm" #i "\n\t"

#define SAMP_LOOP(zero, body, clobbers) \
  asm volatile(zero "1:\n\t" body "sub $1, %0\n\tjnz 1b\n\t" : "+r"(rounds) : : clobbers "cc")

#define SAMP_CLEAR_Z(_, i) "vpxord %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n\t"
#define SAMP_CLEAR_Y(_, i) "vpxor %%ymm" #i ", %%ymm" #i ", %%ymm" #i "\n\t"
#define SAMP_REG_LOW(p) \
  p "0", p "1", p "2", p "3", p "4", p "5", p "6", p "7", p "8", p "9", p "10", p "11",
#define SAMP_REG_MID(p) p "12", p "13", p "14", p "15",
#define SAMP_REG_HIGH(p)                                                                          \
  p "16", p "17", p "18", p "19", p "20", p "21", p "22", p "23", p "24", p "25", p "26", p "27", \
      p "28", p "29", p "30", p "31",

__attribute__((target("avx512f"))) void int8_zmm(long rounds) {
  SAMP_LOOP(SAMP_24(SAMP_CLEAR_Z, 0) SAMP_CLEAR_Z(0, 30) SAMP_CLEAR_Z(0, 31),
            SAMP_24(SAMP_ZMM_INT8, 0),
            SAMP_REG_LOW("xmm") SAMP_REG_MID("xmm") SAMP_REG_HIGH("xmm"));
}

__attribute__((target("avx512f"))) void f32_zmm(long rounds) {
  SAMP_LOOP(SAMP_24(SAMP_CLEAR_Z, 0) SAMP_CLEAR_Z(0, 30) SAMP_CLEAR_Z(0, 31),
            SAMP_24(SAMP_ZMM_F32, 0), SAMP_REG_LOW("xmm") SAMP_REG_MID("xmm") SAMP_REG_HIGH("xmm"));
}

__attribute__((target("avx2"))) void int8_ymm_vnni(long rounds) {
  SAMP_LOOP(SAMP_12(SAMP_CLEAR_Y, 0) SAMP_CLEAR_Y(0, 14) SAMP_CLEAR_Y(0, 15),
            SAMP_12(SAMP_YMM_VNNI, 0), SAMP_REG_LOW("xmm") SAMP_REG_MID("xmm"));
}

__attribute__((target("avx2"))) void int8_ymm(long rounds) {
  SAMP_LOOP(SAMP_12(SAMP_CLEAR_Y, 0) SAMP_CLEAR_Y(0, 12) SAMP_CLEAR_Y(0, 14) SAMP_CLEAR_Y(0, 15),
            SAMP_12(SAMP_YMM_MADD, 0), SAMP_REG_LOW("xmm") SAMP_REG_MID("xmm"));
}

__attribute__((target("avx2,fma"))) void f32_ymm(long rounds) {
  SAMP_LOOP(SAMP_12(SAMP_CLEAR_Y, 0) SAMP_CLEAR_Y(0, 14) SAMP_CLEAR_Y(0, 15),
            SAMP_12(SAMP_YMM_F32, 0), SAMP_REG_LOW("xmm") SAMP_REG_MID("xmm"));
}

#if defined(SAMP_HAVE_LEVEL_4) && !defined(SAMP_LIMITS_ALONE)
#define SAMP_TILES_LIMIT

// Four tiles of sums, each product 16 x 64 by 64 x 16; no tile is loaded.
void int8_tiles(long rounds) {
  alignas(64) uint8_t shape[64] = {1};  // palette 1
  for (int i = 0; i < 8; ++i) shape[16 + 2 * i] = 64, shape[48 + i] = 16;
#define SAMP_ZERO_TILE(i) "tilezero %%tmm" #i "\n\t"
#define SAMP_DOT_TILE(i, x, w) "tdpbusd %%tmm" #w ", %%tmm" #x ", %%tmm" #i "\n\t"
  asm volatile("ldtilecfg %1\n\t" SAMP_ZERO_TILE(0) SAMP_ZERO_TILE(1) SAMP_ZERO_TILE(2)
                   SAMP_ZERO_TILE(3) SAMP_ZERO_TILE(4) SAMP_ZERO_TILE(5) SAMP_ZERO_TILE(6)
                       SAMP_ZERO_TILE(7) "1:\n\t" SAMP_DOT_TILE(0, 4, 6) SAMP_DOT_TILE(1, 4, 7)
                           SAMP_DOT_TILE(2, 5, 6)
                               SAMP_DOT_TILE(3, 5, 7) "sub $1, %0\n\tjnz 1b\n\ttilerelease"
               : "+r"(rounds)
               : "m"(shape)
               : "cc");
}
#endif

#endif  // __x86_64__

struct Chains {
  void (*run)(long rounds) = nullptr;
  double operations = 0;  // of one round; a multiply-add is two
};

Chains int8_chains(bool tiles) {
#if defined(SAMP_TILES_LIMIT)
  if (tiles && samp::runnable_level(0) != nullptr) return {int8_tiles, 4 * 32768.0};
#endif
  (void)tiles;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vnni")) return {int8_zmm, 24 * 128.0};
  if (__builtin_cpu_supports("avxvnni")) return {int8_ymm_vnni, 12 * 64.0};
  if (__builtin_cpu_supports("avx2")) return {int8_ymm, 12 * 64.0};
#endif
  return {};
}

Chains f32_chains() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {f32_zmm, 24 * 32.0};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {f32_ymm, 12 * 16.0};
#endif
  return {};
}

double giga_operations(const Chains& chains, int threads, double seconds) {
  if (!chains.run) return 0;
  const long rounds = 200000;  // two to five milliseconds
  const double window = best_window(threads, seconds, [&](int) { chains.run(rounds); });
  return chains.operations * static_cast<double>(rounds) * std::max(threads, 1) / window / 1e9;
}

uint64_t read_plain(const uint64_t* p, size_t bytes) {
  uint64_t a = 0, b = 0, c = 0, d = 0;
  for (const uint64_t* end = p + bytes / 8; p != end; p += 8) {
    a ^= p[0] ^ p[4];
    b ^= p[1] ^ p[5];
    c ^= p[2] ^ p[6];
    d ^= p[3] ^ p[7];
  }
  return a ^ b ^ c ^ d;
}

#if defined(__x86_64__)
// Four streams at once: one hardware prefetcher stream alone does not fill the memory's queue.
__attribute__((target("avx2"))) uint64_t read_ymm(const uint64_t* p, size_t bytes) {
  const size_t quarter = bytes / 4;
  const char* base = reinterpret_cast<const char*>(p);
  __m256i sums[4] = {};
  for (size_t at = 0; at < quarter; at += 64)
    for (int stream = 0; stream < 4; ++stream) {
      const auto* line = reinterpret_cast<const __m256i*>(base + stream * quarter + at);
      const __m256i both = _mm256_xor_si256(_mm256_load_si256(line), _mm256_load_si256(line + 1));
      sums[stream] = _mm256_xor_si256(sums[stream], both);
    }
  const __m256i all =
      _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
  return static_cast<uint64_t>(_mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 1) ^
                               _mm256_extract_epi64(all, 2) ^ _mm256_extract_epi64(all, 3));
}
#endif

// Pages of 2 MiB where the system has them: the walk of page tables is not what is measured.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    data_ = static_cast<char*>(std::aligned_alloc(kHuge, bytes));
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    for (size_t i = 0; i < bytes; i += 4096) data_[i] = static_cast<char>(i >> 12);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  const uint64_t* at(size_t offset) const {
    return reinterpret_cast<const uint64_t*>(data_ + offset);
  }

  static constexpr size_t kHuge = size_t{2} << 20;

 private:
  char* data_ = nullptr;
  size_t bytes_;
};

}  // namespace

extern "C" {

// 10^9 operations a second of u8 x s8 -> int32 (a multiply-add is two) on `threads` threads.
double samp_int8_gops(int threads, double seconds) {
  return giga_operations(int8_chains(true), threads, seconds);
}

// The same of vector instructions alone, without AMX tiles.
double samp_vnni_gops(int threads, double seconds) {
  return giga_operations(int8_chains(false), threads, seconds);
}

// 10^9 operations a second of fp32 fused multiply-adds (two each).
double samp_f32_gflops(int threads, double seconds) {
  return giga_operations(f32_chains(), threads, seconds);
}

// 10^9 bytes a second read from memory: 512 MB in one pass, each thread its own part.
double samp_read_gbps(int threads, double seconds) {
  if (threads < 1) threads = 1;
  const size_t total = size_t{512} << 20;
  const size_t part = total / static_cast<size_t>(threads) / Buffer::kHuge * Buffer::kHuge;
  if (part == 0) return 0;
  const Buffer buffer(part * static_cast<size_t>(threads));
  auto* read = read_plain;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) read = read_ymm;
#endif
  std::atomic<uint64_t> sink{0};
  const double window = best_window(threads, seconds, [&](int id) {
    sink.fetch_xor(read(buffer.at(static_cast<size_t>(id) * part), part));
  });
  return static_cast<double>(part) * threads / window / 1e9;
}

}  // extern "C"

#ifndef SAMP_LIMITS_ALONE
void bind_limits(nanobind::module_& m) {
  namespace nb = nanobind;
  m.def("int8_gops", &samp_int8_gops, nb::arg("threads"), nb::arg("seconds"),
        nb::call_guard<nb::gil_scoped_release>(), "Peak of u8 x s8 -> int32, 10^9 operations/s.");
  m.def("vnni_gops", &samp_vnni_gops, nb::arg("threads"), nb::arg("seconds"),
        nb::call_guard<nb::gil_scoped_release>(), "int8_gops without AMX tiles.");
  m.def("f32_gflops", &samp_f32_gflops, nb::arg("threads"), nb::arg("seconds"),
        nb::call_guard<nb::gil_scoped_release>(), "Peak of fp32 multiply-adds, 10^9 operations/s.");
  m.def("read_gbps", &samp_read_gbps, nb::arg("threads"), nb::arg("seconds"),
        nb::call_guard<nb::gil_scoped_release>(), "Reading memory, 10^9 bytes/s.");
}
#endif
