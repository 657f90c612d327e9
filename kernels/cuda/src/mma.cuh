// Warp matrix products and the loads that feed them. One of the three files with PTX; every
// function here has a twin for cuda_on_cpu.h.
//
// Fragments are those of mma.sync m16n8k32 (s8, e4m3) and m16n8k16 (f16, bf16), in bytes the same:
// with g = lane / 4 and t = lane % 4, an A tile of 16 rows x 32 bytes lies as a[0]: row g, bytes
// 4t..4t+3; a[1]: row g + 8; a[2], a[3]: the same rows, 16 bytes on. b[0], b[1]: the same of row g
// of B (8 rows x 32 bytes). c[0], c[1]: row g, columns 2t, 2t + 1; c[2], c[3]: row g + 8.
// sm_75 has m8n8k16 and m16n8k8 only: four and two of them give the same fragments. bf16 begins
// with sm_80, e4m3 with sm_89. The first argument says what the words hold.
#pragma once

#include "copy.cuh"

#ifndef SAMP_EMULATED

#if SAMP_SM >= 80
#define SAMP_MMA(element, sum, reg, name)                                                          \
  DEVICE void mma(element, sum(&c)[4], const unsigned (&a)[4], const unsigned* b) {                \
    asm volatile("mma.sync.aligned." name " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+" reg(c[0]), "+" reg(c[1]), "+" reg(c[2]), "+" reg(c[3])                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));              \
  }
SAMP_MMA(signed char, int, "r", "m16n8k32.row.col.s32.s8.s8.s32")
SAMP_MMA(f16, float, "f", "m16n8k16.row.col.f32.f16.f16.f32")
SAMP_MMA(bf16, float, "f", "m16n8k16.row.col.f32.bf16.bf16.f32")
#if SAMP_SM >= 89
SAMP_MMA(e4m3, float, "f", "m16n8k32.row.col.f32.e4m3.e4m3.f32")
#endif
#undef SAMP_MMA
#else
DEVICE void mma_s8_m8n8k16(int* c, unsigned a, unsigned b) {
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+r"(c[0]), "+r"(c[1])
               : "r"(a), "r"(b));
}
DEVICE void mma_f16_m16n8k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}
#endif

// Four 8 x 8 tiles of 2-byte words; lane l gives the address of row l % 8 of tile l / 8.
DEVICE void load_tiles(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same tiles, each transposed.
DEVICE void load_tiles_transposed(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

#else  // on a CPU

namespace emulated {

// D (rows x 8) += A (rows x depth) B^T (8 x depth), gathered from the registers of 32 lanes.
template <class Sum, class Element, int ROWS, int DEPTH>
static void multiply(Sum** c, const unsigned** a, const unsigned** b) {
  constexpr int EACH = 4 / sizeof(Element);  // elements in one register
  constexpr int CHUNKS = DEPTH / EACH / 4;   // registers of a lane along the depth
  static Sum left[ROWS][DEPTH], right[8][DEPTH];
  auto value = [](unsigned word, int i) -> Sum {
    if constexpr (std::is_same_v<Element, signed char>)
      return static_cast<signed char>(word >> (8 * i));
    else if constexpr (sizeof(Element) == 1)
      return to_float(Element{static_cast<unsigned char>(word >> (8 * i))});
    else
      return to_float(Element{static_cast<unsigned short>(word >> (16 * i))});
  };
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
      for (int i = 0; i < EACH; ++i) {
        const int k = chunk * 4 * EACH + t * EACH + i;
        for (int half = 0; half < ROWS / 8; ++half)
          left[g + 8 * half][k] = value(a[l][chunk * (ROWS / 8) + half], i);
        right[g][k] = value(b[l][chunk], i);
      }
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < ROWS / 4; ++i) {
      const Sum* x = left[l / 4 + 8 * (i / 2)];
      const Sum* y = right[l % 4 * 2 + i % 2];
      Sum sum = c[l][i];
      for (int k = 0; k < DEPTH; ++k) sum += x[k] * y[k];
      c[l][i] = sum;
    }
  ++counters.mma;
}

template <class Sum, class Element, int ROWS, int DEPTH>
static void warp_product(Sum* c, const unsigned* a, const unsigned* b) {
  struct Mine {
    Sum* c;
    const unsigned *a, *b;
  } mine{c, a, b};
  together(mine, [](Mine** all) {
    Sum* cs[32];
    const unsigned *as[32], *bs[32];
    for (int l = 0; l < 32; ++l) cs[l] = all[l]->c, as[l] = all[l]->a, bs[l] = all[l]->b;
    multiply<Sum, Element, ROWS, DEPTH>(cs, as, bs);
  });
}

inline void load_tiles(unsigned* r, const void* row, bool transposed) {
  struct Mine {
    unsigned* r;
    const unsigned char* row;
  } mine{r, static_cast<const unsigned char*>(row)};
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: an address that is no multiple of 16");
  together(mine, [transposed](Mine** all) {
    ++counters.ldmatrix;
    for (int tile = 0; tile < 4; ++tile) {
      unsigned banks = 0;  // Eight rows of 16 bytes fill the 32 banks once, or some wait.
      for (int i = 0; i < 8; ++i)
        banks |= 1u << (reinterpret_cast<uintptr_t>(all[tile * 8 + i]->row) / 16 % 8);
      counters.conflicts += banks != 255;
      for (int l = 0; l < 32; ++l) {
        unsigned short word[2];
        for (int i = 0; i < 2; ++i) {
          const int y = transposed ? l % 4 * 2 + i : l / 4, x = transposed ? l / 4 : l % 4 * 2 + i;
          std::memcpy(&word[i], all[tile * 8 + y]->row + 2 * x, 2);
        }
        all[l]->r[tile] = word[0] | static_cast<unsigned>(word[1]) << 16;
      }
    }
  });
}

}  // namespace emulated

inline void load_tiles(unsigned (&r)[4], const void* row) { emulated::load_tiles(r, row, false); }
inline void load_tiles_transposed(unsigned (&r)[4], const void* row) {
  emulated::load_tiles(r, row, true);
}
#if SAMP_SM >= 80
inline void mma(signed char, int (&c)[4], const unsigned (&a)[4], const unsigned* b) {
  emulated::warp_product<int, signed char, 16, 32>(c, a, b);
}
inline void mma(f16, float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
  emulated::warp_product<float, f16, 16, 16>(c, a, b);
}
inline void mma(bf16, float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
  emulated::warp_product<float, bf16, 16, 16>(c, a, b);
}
#if SAMP_SM >= 89
inline void mma(e4m3, float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
  emulated::warp_product<float, e4m3, 16, 32>(c, a, b);
}
#endif
#else
inline void mma_s8_m8n8k16(int* c, unsigned a, unsigned b) {
  emulated::warp_product<int, signed char, 8, 16>(c, &a, &b);
}
inline void mma_f16_m16n8k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
  const unsigned a[2] = {a0, a1};
  emulated::warp_product<float, f16, 16, 8>(c, a, &b);
}
#endif

#endif

#if SAMP_SM < 80
DEVICE void mma(signed char, int (&c)[4], const unsigned (&a)[4], const unsigned* b) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk)
      mma_s8_m8n8k16(c + 2 * half, a[2 * chunk + half], b[chunk]);
}
DEVICE void mma(f16, float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
  mma_f16_m16n8k8(c, a[0], a[1], b[0]);
  mma_f16_m16n8k8(c, a[2], a[3], b[1]);
}
#endif
