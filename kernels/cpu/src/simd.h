// Vectors of one dispatch level: W floats or int32. The only file, with dot4.h, that knows the
// instruction set; everything above it is written once. Included by level.cc only, inside the
// namespace of the level, and free of std:: templates: a weak symbol compiled for AVX-512 must
// never be the one that the linker keeps for everybody.
//
// SAMP_LEVEL: 4 AMX (and all of 3), 3 AVX-512 VNNI, 2 AVX2 with AVX-VNNI, 1 AVX2, 0 portable (GCC
// vector extensions).

#if SAMP_LEVEL >= 3
constexpr int W = 16;
#elif SAMP_LEVEL >= 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

#define SAMP_INLINE static inline __attribute__((always_inline))
#define SAMP_MEMBER inline __attribute__((always_inline))

// Elements of two vectors by constant indices: clang has one spelling, gcc before 12 the other.
#if defined(__clang__)
#define SAMP_SHUFFLE(indices, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SAMP_SHUFFLE(indices, a, b, ...) __builtin_shuffle(a, b, indices{__VA_ARGS__})
#endif

SAMP_INLINE vf set1(float x) { return x - vf{}; }
SAMP_INLINE vi set1i(int32_t x) { return x - vi{}; }

SAMP_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SAMP_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
SAMP_INLINE vi loadi(const void* p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SAMP_INLINE void storei(void* p, vi v) { __builtin_memcpy(p, &v, sizeof v); }

// The first n (1..W) elements; the rest of a load is 0. Never touches memory beyond them.
SAMP_INLINE vf load_n(const float* p, int n) {
#if SAMP_LEVEL >= 3
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  vf v{};
  __builtin_memcpy(&v, p, (size_t)n * 4);
  return v;
#endif
}
SAMP_INLINE void store_n(float* p, vf v, int n) {
#if SAMP_LEVEL >= 3
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  __builtin_memcpy(p, &v, (size_t)n * 4);
#endif
}

SAMP_INLINE vf fma(vf a, vf b, vf c) {
#if SAMP_LEVEL >= 3
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SAMP_LEVEL >= 1
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
SAMP_INLINE vf vmin(vf a, vf b) {
#if SAMP_LEVEL >= 3
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif SAMP_LEVEL >= 1
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
SAMP_INLINE vf vmax(vf a, vf b) {
#if SAMP_LEVEL >= 3
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif SAMP_LEVEL >= 1
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
SAMP_INLINE vf vabs(vf a) { return (vf)((vi)a & set1i(0x7fffffff)); }
SAMP_INLINE vf vsqrt(vf a) {
#if SAMP_LEVEL >= 3
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif SAMP_LEVEL >= 1
  return (vf)_mm256_sqrt_ps((__m256)a);
#else
  for (int i = 0; i < W; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}
SAMP_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }

// Round half to even, for |a| < 2^22: the float adder itself rounds.
SAMP_INLINE vi round_even(vf a) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23
  return (vi)(a + magic) - set1i(0x4B400000);
}

// In a fixed order, halves onto halves, so that a row's sum is the same wherever the row stands.
SAMP_INLINE float reduce_add(vf a) {
#if SAMP_LEVEL >= 3
  const __m512 z = (__m512)a;
  const __m256 y = _mm512_castps512_ps256(z) + _mm512_extractf32x8_ps(z, 1);
#elif SAMP_LEVEL >= 1
  const __m256 y = (__m256)a;
#endif
#if SAMP_LEVEL >= 1
  __m128 x = _mm256_castps256_ps128(y) + _mm256_extractf128_ps(y, 1);
  x = x + _mm_movehl_ps(x, x);
  return x[0] + x[1];
#else
  return (a[0] + a[2]) + (a[1] + a[3]);
#endif
}
SAMP_INLINE float reduce_max(vf a) {
#if SAMP_LEVEL >= 3
  const __m512 z = (__m512)a;
  const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps(z, 1));
#elif SAMP_LEVEL >= 1
  const __m256 y = (__m256)a;
#endif
#if SAMP_LEVEL >= 1
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return x[0] > x[1] ? x[0] : x[1];
#else
  const float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
  return x > y ? x : y;
#endif
}

// The low byte of each of n lanes.
SAMP_INLINE void store_bytes(uint8_t* p, vi q, int n) {
#if SAMP_LEVEL >= 3
  __m128i b = _mm512_cvtepi32_epi8((__m512i)q);
  if (n == W)
    _mm_storeu_si128((__m128i*)p, b);
  else
    _mm_mask_storeu_epi8(p, (__mmask16)((1u << n) - 1), b);
#elif SAMP_LEVEL >= 1
  const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                       0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i y = _mm256_shuffle_epi8((__m256i)q, low);
  __m128i b = _mm_unpacklo_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  if (n == W)
    _mm_storel_epi64((__m128i*)p, b);
  else
    __builtin_memcpy(p, &b, (size_t)n);
#else
  typedef uint8_t bytes __attribute__((vector_size(W)));
  bytes b = __builtin_convertvector(q, bytes);
  if (n == W)
    __builtin_memcpy(p, &b, W);
  else
    __builtin_memcpy(p, &b, (size_t)n);
#endif
}

// clip(rint(y), -127, 127) + 128 of W floats that are already divided by the scale -> n bytes.
// NaN becomes 1 (-127) or 255 by the compare order; callers check for finite results elsewhere.
SAMP_INLINE void store_u8(uint8_t* p, vf y, int n) {
  vf c = vmin(vmax(y, set1(-127.0f)), set1(127.0f));
  store_bytes(p, (vi)(c + set1(12582912.0f + 128.0f)), n);  // rounded, in the sum's low byte
}

// acc + sum over 4 of u8 a[4i + j] * s8 b[4i + j], exact in int32 at every level.
SAMP_INLINE vi dot4(vi acc, vi a, vi b) {
#if SAMP_LEVEL >= 3
  // gcc 12 spills every accumulator of the intrinsic; the asm form keeps them in registers.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
#elif SAMP_LEVEL == 2
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
  return acc;
#elif SAMP_LEVEL == 1
  // vpmaddubsw would saturate its 16-bit sums; widened to 16 bits first nothing can.
  const __m256i low = _mm256_set1_epi16(0x00ff);
  __m256i a0 = _mm256_and_si256((__m256i)a, low), a1 = _mm256_srli_epi16((__m256i)a, 8);
  __m256i b0 = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)b, 8), 8);
  __m256i b1 = _mm256_srai_epi16((__m256i)b, 8);
  return acc + (vi)_mm256_madd_epi16(a0, b0) + (vi)_mm256_madd_epi16(a1, b1);
#elif defined(__SSE2__)
  const __m128i low = _mm_set1_epi16(0x00ff);
  __m128i a0 = _mm_and_si128((__m128i)a, low), a1 = _mm_srli_epi16((__m128i)a, 8);
  __m128i b0 = _mm_srai_epi16(_mm_slli_epi16((__m128i)b, 8), 8);
  __m128i b1 = _mm_srai_epi16((__m128i)b, 8);
  return acc + (vi)_mm_madd_epi16(a0, b0) + (vi)_mm_madd_epi16(a1, b1);
#else
  for (int j = 0; j < 4; ++j) acc += ((a >> (8 * j)) & 255) * ((vi)((vi)b << (24 - 8 * j)) >> 24);
  return acc;
#endif
}
