// Words and moves: fp16, bf16 and e4m3 as bits, 16-byte asynchronous copies into shared memory,
// exp2. One of the three files with PTX; every function here has a twin for cuda_on_cpu.h.
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

struct bf16 {
  unsigned short bits;
};
struct e4m3 {
  unsigned char bits;
};

enum Kind { F32 = 0, F16 = 1, S8 = 2, BF16 = 3, E4M3 = 4 };

// What a kind's tensor-core operands are, and the sums of their products.
template <int KIND>
struct Of;
template <>
struct Of<S8> {
  typedef signed char Element;
  typedef int Sum;
};
template <>
struct Of<F16> {
  typedef f16 Element;
  typedef float Sum;
};
template <>
struct Of<BF16> {
  typedef bf16 Element;
  typedef float Sum;
};
template <>
struct Of<E4M3> {
  typedef e4m3 Element;
  typedef float Sum;
};

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
// Two neighbours to half the bits, the first in the lower half; e4m3 saturates. An architecture
// that has no such numbers is never asked for them (formats.py), and stops where it is.
DEVICE unsigned packed(bf16, float low, float high) {
#if SAMP_SM >= 80
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  __trap();
  return 0;
#endif
}
DEVICE unsigned packed(e4m3, float low, float high) {
#if SAMP_SM >= 89
  unsigned short y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(high), "f"(low));
  return y;
#else
  __trap();
  return 0;
#endif
}
DEVICE float float_of_bits(unsigned bits) { return __uint_as_float(bits); }
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

inline unsigned shared_address(const void* p) {
  return emulated::SHARED_BASE + emulated::shared_offset(p);
}
inline float to_float(f16 x) { return emulated::half_values()[x.bits]; }
inline f16 to_half(float x) {
  const auto half = static_cast<_Float16>(x);
  f16 y;
  std::memcpy(&y.bits, &half, 2);
  return y;
}
inline float float_of_bits(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned bits_of_bf16(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return std::isnan(x) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
// Half to even in steps of an eighth of the power of two, of 2^-6 below it.
inline unsigned bits_of_e4m3(float x) {
  if (std::isnan(x)) return 0x7F;
  const float size = std::fmin(std::fabs(x), 448.0f);
  const int exponent = size < 0.015625f ? -6 : std::ilogb(size);
  const int steps = static_cast<int>(std::lrintf(std::ldexp(size, 3 - exponent)));
  return (exponent + 7) * 8 + steps - 8 | (std::signbit(x) ? 0x80 : 0);
}
inline float to_float(e4m3 x) {
  static const std::vector<float> table = [] {
    std::vector<float> made(256, NAN);
    for (int bits = 0; bits < 127; ++bits) {
      const int exponent = bits >> 3, mantissa = bits & 7;
      made[bits] = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : mantissa / 512.0f;
      made[bits | 128] = -made[bits];
    }
    return made;
  }();
  return table[x.bits];
}
inline unsigned packed(bf16, float low, float high) {
  if (SAMP_SM < 80) emulated::fail("bf16 before sm_80");
  return bits_of_bf16(low) | bits_of_bf16(high) << 16;
}
inline unsigned packed(e4m3, float low, float high) {
  if (SAMP_SM < 89) emulated::fail("e4m3 before sm_89");
  return bits_of_e4m3(low) | bits_of_e4m3(high) << 8;
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
      emulated::unfenced[emulated::shared_offset(copy.to) / 16] = emulated::current;
    }
    groups.erase(groups.begin());
  }
}

#endif

DEVICE unsigned packed(f16, float low, float high) {
  return to_half(low).bits | static_cast<unsigned>(to_half(high).bits) << 16;
}
DEVICE float to_float(bf16 x) { return float_of_bits(static_cast<unsigned>(x.bits) << 16); }

// round half to even, within 127 on both sides
DEVICE int quantized(float x, float inverse_scale) {
  return max(-127, min(127, __float2int_rn(x * inverse_scale)));
}

DEVICE unsigned pack_bytes(int a, int b, int c, int d) {
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | static_cast<unsigned>(d & 255) << 24;
}

// Two neighbours over their scale, to int8 or e4m3.
DEVICE unsigned short quantized2(int kind, float x, float y, float inverse_scale) {
  if (kind == E4M3)
    return static_cast<unsigned short>(packed(e4m3(), x * inverse_scale, y * inverse_scale));
  return static_cast<unsigned short>(
      pack_bytes(quantized(x, inverse_scale), quantized(y, inverse_scale), 0, 0));
}
DEVICE unsigned quantized4(int kind, float4 v, float inverse_scale) {
  return quantized2(kind, v.x, v.y, inverse_scale) |
         static_cast<unsigned>(quantized2(kind, v.z, v.w, inverse_scale)) << 16;
}

DEVICE bool is_quantized(int kind) { return kind == S8 || kind == E4M3; }

DEVICE float float_of_half(int kind, int bits) {
  const auto half = static_cast<unsigned short>(bits);
  return kind == BF16 ? to_float(bf16{half}) : to_float(f16{half});
}
DEVICE unsigned packed_as(int kind, float low, float high) {
  return kind == BF16 ? packed(bf16(), low, high) : packed(f16(), low, high);
}

// Four neighbours of an fp32, fp16 or bf16 array; `at` is a multiple of 4.
DEVICE float4 load4(const void* x, int kind, size_t at) {
  if (kind == F32) return *reinterpret_cast<const float4*>(static_cast<const float*>(x) + at);
  const int2 pairs = *reinterpret_cast<const int2*>(static_cast<const f16*>(x) + at);
  float4 y;
  y.x = float_of_half(kind, pairs.x), y.y = float_of_half(kind, pairs.x >> 16);
  y.z = float_of_half(kind, pairs.y), y.w = float_of_half(kind, pairs.y >> 16);
  return y;
}
DEVICE void store4(void* to, int kind, size_t at, float4 v) {
  if (kind == F32) {
    *reinterpret_cast<float4*>(static_cast<float*>(to) + at) = v;
  } else {
    int2 pairs;
    pairs.x = packed_as(kind, v.x, v.y), pairs.y = packed_as(kind, v.z, v.w);
    *reinterpret_cast<int2*>(static_cast<f16*>(to) + at) = pairs;
  }
}
