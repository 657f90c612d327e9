// Words and moves: fp16 as bits, 16-byte asynchronous copies into shared memory, exp2.
// One of the two files with PTX; every function here has a twin for cuda_on_cpu.h.
#pragma once

#ifdef SAMP_EMULATED
#include "cuda_on_cpu.h"
#else
#define SAMP_KERNEL(name)
#define SAMP_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

#define DEVICE __device__ __forceinline__

struct f16 {
  unsigned short bits;
};

enum Kind { F32 = 0, F16 = 1, S8 = 2 };

// SAMP_SM is the architecture that the unit is compiled for, without its letter: 75, 80, 90.
constexpr bool ASYNC_COPIES = SAMP_SM >= 80;

#ifndef SAMP_EMULATED

DEVICE unsigned shared_address(const void* p) {
  unsigned at;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(at) : "l"(p));
  return at;
}
DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
DEVICE f16 to_half(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float infinity() { return __int_as_float(0x7f800000); }

// 16 bytes to shared memory, of which `bytes` (0 to 16) come from global memory and the rest are 0.
// Before sm_80 at once; the global row must then be readable up to the next multiple of 4 bytes.
DEVICE void copy16(void* to, const void* from, int bytes) {
#if SAMP_SM >= 80
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
#else
  uint4 v = make_uint4(0, 0, 0, 0);
  if (bytes == 16) {
    v = *static_cast<const uint4*>(from);
  } else if (bytes > 0) {
    unsigned w[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (bytes > 4 * i) {
        w[i] = static_cast<const unsigned*>(from)[i];
        if (bytes < 4 * i + 4) w[i] &= (1u << (8 * (bytes - 4 * i))) - 1;
      }
    v = make_uint4(w[0], w[1], w[2], w[3]);
  }
  *static_cast<uint4*>(to) = v;
#endif
}
// Closes the group of the copies so far.
DEVICE void commit_copies() {
#if SAMP_SM >= 80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until all groups but the last `LEFT` have arrived, for this thread's own copies.
template <int LEFT>
DEVICE void wait_copies() {
#if SAMP_SM >= 80
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

#else  // on a CPU

inline float to_float(f16 x) { return emulated::half_values()[x.bits]; }
inline f16 to_half(float x) {
  const auto half = static_cast<_Float16>(x);
  f16 y;
  std::memcpy(&y.bits, &half, 2);
  return y;
}
inline float fast_exp2(float x) { return std::exp2(x); }
inline float infinity() { return INFINITY; }

inline void copy16(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (bytes && reinterpret_cast<uintptr_t>(from) % 16))
    emulated::fail("copy16: an address that is no multiple of 16");
  if (bytes < 0 || bytes > 16) emulated::fail("copy16: bytes");
  emulated::Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from),
                      bytes};
  ++emulated::counters.copies;
  if (ASYNC_COPIES) {
    emulated::fibers[emulated::current].groups.back().push_back(copy);
    std::memset(to, 0xFF, 16);  // Neither old nor new until the wait.
  } else {
    std::memset(to, 0, 16);
    std::memcpy(to, from, bytes);
  }
}
inline void commit_copies() { emulated::fibers[emulated::current].groups.emplace_back(); }
template <int LEFT>
inline void wait_copies() {
  auto& groups = emulated::fibers[emulated::current].groups;
  while (groups.size() > LEFT + 1) {
    for (const auto& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

#endif

DEVICE unsigned pack_halves(float low, float high) {
  return to_half(low).bits | static_cast<unsigned>(to_half(high).bits) << 16;
}

// round half to even, within 127 on both sides
DEVICE int quantized(float x, float inverse_scale) {
  return max(-127, min(127, __float2int_rn(x * inverse_scale)));
}

DEVICE unsigned pack_bytes(int a, int b, int c, int d) {
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | static_cast<unsigned>(d & 255) << 24;
}

DEVICE unsigned quantized4(float4 v, float inverse_scale) {
  return pack_bytes(quantized(v.x, inverse_scale), quantized(v.y, inverse_scale),
                    quantized(v.z, inverse_scale), quantized(v.w, inverse_scale));
}

// Four neighbours of an fp32 or fp16 array; `at` is a multiple of 4.
DEVICE float4 load4(const void* x, int kind, size_t at) {
  if (kind == F32) return *reinterpret_cast<const float4*>(static_cast<const float*>(x) + at);
  const int2 pairs = *reinterpret_cast<const int2*>(static_cast<const f16*>(x) + at);
  float4 y;
  y.x = to_float(f16{static_cast<unsigned short>(pairs.x)});
  y.y = to_float(f16{static_cast<unsigned short>(pairs.x >> 16)});
  y.z = to_float(f16{static_cast<unsigned short>(pairs.y)});
  y.w = to_float(f16{static_cast<unsigned short>(pairs.y >> 16)});
  return y;
}
DEVICE void store4(void* to, int kind, size_t at, float4 v) {
  if (kind == F32) {
    *reinterpret_cast<float4*>(static_cast<float*>(to) + at) = v;
  } else {
    int2 pairs;
    pairs.x = pack_halves(v.x, v.y), pairs.y = pack_halves(v.z, v.w);
    *reinterpret_cast<int2*>(static_cast<f16*>(to) + at) = pairs;
  }
}
