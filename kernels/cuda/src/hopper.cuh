// What sm_90a has beyond mma.sync: barriers in shared memory that count arrivals and bytes, bulk
// copies, and products of a warpgroup (four warps, the first a multiple of four) that reads both
// operands from shared memory. One of the three files with PTX; every function has a twin.
//
// An operand tile lies as rows of 128 bytes, chunk c (16 bytes) of row r at c ^ (r % 8), in an area
// that begins at a multiple of 1,024: PTX calls it K-major with the 128-byte swizzle.
#pragma once

#include "copy.cuh"

typedef unsigned long long u64;

#ifndef SAMP_EMULATED

DEVICE void init_barrier(u64* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
DEVICE void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrive, and let the phase end only after so many bytes of bulk copies.
DEVICE void arrive_expecting(u64* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity is over; the first phase has parity 0.
DEVICE void wait_barrier(u64* barrier, unsigned parity) {
  unsigned over;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.b32 %0, 1, 0, p; }"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!over);
}
// Addresses and `bytes` are multiples of 16; the barrier hears of the bytes as they arrive.
DEVICE void bulk_copy(void* to, const void* from, unsigned bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// What this thread wrote into shared memory becomes visible to bulk copies and products.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all groups of products but the last `LEFT` are done.
template <int LEFT>
DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#define SAMP_SUMS(c, d, i)                                                         \
  "+" c(d[i]), "+" c(d[i + 1]), "+" c(d[i + 2]), "+" c(d[i + 3]), "+" c(d[i + 4]), \
      "+" c(d[i + 5]), "+" c(d[i + 6]), "+" c(d[i + 7])
#define SAMP_SUMS32(c, d, i) \
  SAMP_SUMS(c, d, i), SAMP_SUMS(c, d, i + 8), SAMP_SUMS(c, d, i + 16), SAMP_SUMS(c, d, i + 24)
#define SAMP_NAMES32                                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31"
#define SAMP_NAMES64                                                                              \
  SAMP_NAMES32                                                                                    \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54," \
  "%55,%56,%57,%58,%59,%60,%61,%62,%63"
// d += A B^T of 64 x 32 and 128 (or 64) x 32 bytes; d is read only after wait_products.
#define SAMP_WGMMA(element, sum, c, kind, tail)                                                    \
  DEVICE void multiply(element, sum(&d)[64], u64 a, u64 b) {                                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128" kind " {" SAMP_NAMES64                     \
                 "}, %64, %65, " tail ";"                                                          \
                 : SAMP_SUMS32(c, d, 0), SAMP_SUMS32(c, d, 32)                                     \
                 : "l"(a), "l"(b));                                                                \
  }                                                                                                \
  DEVICE void multiply(element, sum(&d)[32], u64 a, u64 b) {                                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64" kind " {" SAMP_NAMES32 "}, %32, %33, " tail \
                 ";"                                                                               \
                 : SAMP_SUMS32(c, d, 0)                                                            \
                 : "l"(a), "l"(b));                                                                \
  }
SAMP_WGMMA(signed char, int, "r", "k32.s32.s8.s8", "1")
SAMP_WGMMA(e4m3, float, "f", "k32.f32.e4m3.e4m3", "1, 1, 1")
SAMP_WGMMA(f16, float, "f", "k16.f32.f16.f16", "1, 1, 1, 0, 0")
SAMP_WGMMA(bf16, float, "f", "k16.f32.bf16.bf16", "1, 1, 1, 0, 0")
#undef SAMP_WGMMA
#undef SAMP_NAMES64
#undef SAMP_NAMES32
#undef SAMP_SUMS32
#undef SAMP_SUMS

DEVICE void settle(int& x) { asm volatile("" : "+r"(x)::"memory"); }
DEVICE void settle(float& x) { asm volatile("" : "+f"(x)::"memory"); }

#else  // on a CPU

#include <deque>
#include <map>

namespace emulated {

// A phase ends when nobody is missing and no bytes are due.
struct Barrier {
  unsigned arrivals, missing, phase;
  long long due;
};
struct Bulk {
  unsigned char* to;
  const unsigned char* from;
  unsigned bytes;
  Barrier* barrier;
};
struct Product {
  u64 a, b;
  void* sums[128];
  void (*run)(const Product&);
};
struct Warpgroup {
  Meeting meeting;
  std::deque<std::vector<Product> > groups;  // Products that have not happened; the last is open.
};

static std::map<unsigned, Barrier> barriers;  // By address.
static std::deque<Bulk> bulks;                // Copies that have not happened.
static std::vector<Warpgroup> warpgroups;

static void end_phase(Barrier& barrier) {
  if (barrier.missing || barrier.due) return;
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
}

// A bulk copy happens when nobody can go on without it, the oldest or the newest first.
static bool land() {
  if (bulks.empty()) return false;
  const Bulk one = order % 2 ? bulks.back() : bulks.front();
  order % 2 ? bulks.pop_back() : bulks.pop_front();
  std::memcpy(one.to, one.from, one.bytes);
  one.barrier->due -= one.bytes;
  end_phase(*one.barrier);
  return true;
}

static void clear_barriers() {
  if (!bulks.empty()) fail("a block ended before its bulk copies");
  barriers.clear();
  warpgroups.assign(fibers.size() / 128, {});
  for (auto& group : warpgroups) group.meeting.expected = 128, group.groups.emplace_back();
}

static const bool installed = [] {
  when_stuck = land;
  at_start = clear_barriers;
  return true;
}();

inline Barrier& barrier_at(u64* at) {
  const auto found = barriers.find(shared_offset(at));
  if (found == barriers.end()) fail("a barrier that was not made");
  return found->second;
}

// Byte `byte` of row `row` of the operand that a descriptor names, as PTX has it.
inline unsigned char operand(u64 descriptor, int row, int byte) {
  const unsigned start = (descriptor & 0x3FFF) << 4, group = (descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) fail("wgmma: not the 128-byte swizzle");
  unsigned at = start + row / 8 * group + row % 8 * 128 + byte;
  at ^= (at >> 7 & 7) << 4;
  if (at < SHARED_BASE || at >= SHARED_BASE + shared_bytes) fail("wgmma: not in shared memory");
  at -= SHARED_BASE;
  if (unfenced[at / 16] >= 0) fail("wgmma reads what its writer did not fence");
  return shared[at];
}

template <class Element>
static auto element_at(u64 descriptor, int row, int k) {
  if constexpr (std::is_same_v<Element, signed char>)
    return static_cast<int>(static_cast<signed char>(operand(descriptor, row, k)));
  else if constexpr (sizeof(Element) == 1)
    return to_float(Element{operand(descriptor, row, k)});
  else
    return to_float(Element{static_cast<unsigned short>(operand(descriptor, row, 2 * k) |
                                                        operand(descriptor, row, 2 * k + 1) << 8)});
}

template <class Element, class Sum, int SUMS>
static void run_product(const Product& one) {
  constexpr int DEPTH = 32 / sizeof(Element), COLUMNS = 2 * SUMS;
  static Sum left[64][DEPTH], right[COLUMNS][DEPTH];
  for (int k = 0; k < DEPTH; ++k) {
    for (int row = 0; row < 64; ++row) left[row][k] = element_at<Element>(one.a, row, k);
    for (int row = 0; row < COLUMNS; ++row) right[row][k] = element_at<Element>(one.b, row, k);
  }
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < SUMS; ++i) {
      const int row = thread / 32 * 16 + i / 2 % 2 * 8 + thread % 32 / 4;
      const Sum *x = left[row], *y = right[i / 4 * 8 + thread % 4 * 2 + i % 2];
      Sum& sum = static_cast<Sum*>(one.sums[thread])[i];
      for (int k = 0; k < DEPTH; ++k) sum += x[k] * y[k];
    }
  ++counters.mma;
}

inline Warpgroup& warpgroup() {
  if (current / 128 >= warpgroups.size()) fail("wgmma outside of four whole warps");
  return warpgroups[current / 128];
}

template <class Element, class Sum, int SUMS>
static void multiply(Sum (&sums)[SUMS], u64 a, u64 b) {
  Product mine{a, b, {sums}, run_product<Element, Sum, SUMS>};
  Warpgroup& group = warpgroup();
  group.meeting.slots[current % 128] = &mine;
  meet(group.meeting, [&] {
    Product whole = mine;
    for (int t = 0; t < 128; ++t) {
      const auto* one = static_cast<Product*>(group.meeting.slots[t]);
      if (one->a != a || one->b != b) fail("wgmma: threads with different descriptors");
      whole.sums[t] = one->sums[0];
    }
    group.groups.back().push_back(whole);
  });
}

}  // namespace emulated

inline void init_barrier(u64* barrier, unsigned arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) emulated::fail("a barrier's address");
  emulated::barriers[emulated::shared_offset(barrier)] = {arrivals, arrivals, 0, 0};
}
inline void arrive_expecting(u64* barrier, unsigned bytes) {
  auto& one = emulated::barrier_at(barrier);
  if (!one.missing) emulated::fail("more arrivals than a barrier expects");
  --one.missing;
  one.due += bytes;
  emulated::end_phase(one);
}
inline void arrive(u64* barrier) { arrive_expecting(barrier, 0); }
inline void wait_barrier(u64* barrier, unsigned parity) {
  auto& one = emulated::barrier_at(barrier);
  while ((one.phase & 1) == parity) emulated::wait_for(&one.phase);
}
inline void bulk_copy(void* to, const void* from, unsigned bytes, u64* barrier) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
    emulated::fail("bulk_copy: addresses and bytes that are no multiples of 16");
  std::memset(to, 0xFF, bytes);  // Neither old nor new until it lands.
  ++emulated::counters.copies;
  emulated::bulks.push_back({static_cast<unsigned char*>(to),
                             static_cast<const unsigned char*>(from), bytes,
                             &emulated::barrier_at(barrier)});
}
inline void fence_async() {
  for (auto& writer : emulated::unfenced)
    if (writer == static_cast<int>(emulated::current)) writer = -1;
}
inline void begin_products() {}
inline void commit_products() {
  auto& group = emulated::warpgroup();
  emulated::meet(group.meeting, [&] { group.groups.emplace_back(); });
}
template <int LEFT>
inline void wait_products() {
  auto& group = emulated::warpgroup();
  emulated::meet(group.meeting, [&] {
    while (group.groups.size() > LEFT + 1) {
      for (const auto& one : group.groups.front()) one.run(one);
      group.groups.pop_front();
    }
  });
}
template <class Element, class Sum, int SUMS>
inline void multiply(Element, Sum (&d)[SUMS], u64 a, u64 b) {
  emulated::multiply<Element>(d, a, b);
}
template <class Sum>
inline void settle(Sum&) {}

#endif

// An operand's descriptor: its address, 1,024 bytes from eight rows to the next, the swizzle. A
// step of 32 bytes along the rows adds 2; what PTX calls the leading offset means nothing here.
DEVICE u64 describe(const void* rows) {
  return 1ull << 62 | 64ull << 32 | 1ull << 16 | (shared_address(rows) >> 4 & 0x3FFF);
}
