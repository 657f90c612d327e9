// Attention of one sequence, head by head. Included by level.cc after rowwise.h, inside the
// namespace of a level.
//
// Both products are tiles of the same shape: up to kTileRows queries against up to kTileVectors
// vectors. For the scores the vectors are keys (K is transposed into panels of kTileVectors
// vectors), for the context they are the dims of a head. Whatever the tiling, a score sums its dims
// in order and a context value its keys in order, in one accumulator each: a query's result does
// not depend on which other queries are computed.

constexpr int kTileVectors = W == 16 ? 4 : 2;
constexpr int kMaxRows = 12;
// The tallest tile of 1, 2, ... vectors: 24 accumulators of 32 registers, or 12 of 16.
constexpr int kTileRows[4] = {12, W == 16 ? 12 : 6, 8, 6};
constexpr long kStripe = 16;     // rows of an AMX tile
constexpr long kBlockRows = 36;  // queries whose scores are held at once: K stays in L1 for them

struct Tile {
  const void* a = nullptr;  // float or u8 rows
  long lda = 0;
  const void* b = nullptr;  // [k][ldb] floats, or [k / 4][ldb] groups of 4 int8
  long ldb = 0;
  long k = 0;                      // floats, or groups of 4
  const int32_t* start = nullptr;  // int8: what each column's sum starts from, or null
  const float* scale = nullptr;    // of each row, `scale_step` apart
  long scale_step = 0;
  float* c = nullptr;
  long ldc = 0;
};

template <int Q, int V>
static void tile_f32(const Tile& t) {
  const float* a = (const float*)t.a;
  const float* b = (const float*)t.b;
  vf acc[Q][V] = {};
  for (long k = 0; k < t.k; ++k, b += t.ldb) {
    vf y[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) y[v] = load(b + v * W);
#pragma GCC unroll 12
    for (int q = 0; q < Q; ++q) {
      const vf x = set1(a[q * t.lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[q][v] = fma(x, y[v], acc[q][v]);
    }
  }
  const Tile at = t;  // a copy: the stores could change t
#pragma GCC unroll 12
  for (int q = 0; q < Q; ++q) {
    const vf s = set1(at.scale[q * at.scale_step]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(at.c + q * at.ldc + v * W, acc[q][v] * s);
  }
}

template <int Q, int V>
static void tile_i8(const Tile& t) {
  const uint8_t* a = (const uint8_t*)t.a;
  const int8_t* b = (const int8_t*)t.b;
  vi acc[Q][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const vi x = t.start ? loadi(t.start + v * W) : vi{};
#pragma GCC unroll 12
    for (int q = 0; q < Q; ++q) acc[q][v] = x;
  }
  for (long k = 0; k < t.k; ++k, b += 4 * t.ldb) {
    vi y[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) y[v] = loadi(b + v * 4 * W);
#pragma GCC unroll 12
    for (int q = 0; q < Q; ++q) {
      int32_t four;
      __builtin_memcpy(&four, a + q * t.lda + 4 * k, 4);
      const vi x = set1i(four);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[q][v] = dot4(acc[q][v], x, y[v]);
    }
  }
  const Tile at = t;  // a copy: the stores could change t
#pragma GCC unroll 12
  for (int q = 0; q < Q; ++q) {
    const vf s = set1(at.scale[q * at.scale_step]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(at.c + q * at.ldc + v * W, to_float(acc[q][v]) * s);
  }
}

typedef void (*TileFunction)(const Tile&);
#define SAMP_SIX(f, v) f<1, v>, f<2, v>, f<3, v>, f<4, v>, f<5, v>, f<6, v>
#define SAMP_TWELVE(f, v) SAMP_SIX(f, v), f<7, v>, f<8, v>, f<9, v>, f<10, v>, f<11, v>, f<12, v>
#if SAMP_LEVEL >= 3
#define SAMP_TILES(f)                                                               \
  {                                                                                 \
    {SAMP_TWELVE(f, 1)}, {SAMP_TWELVE(f, 2)}, {SAMP_SIX(f, 3), f<7, 3>, f<8, 3>}, { \
      SAMP_SIX(f, 4)                                                                \
    }                                                                               \
  }
#else
#define SAMP_TILES(f)                       \
  {                                         \
    {SAMP_TWELVE(f, 1)}, { SAMP_SIX(f, 2) } \
  }
#endif
static const TileFunction kTilesF32[kTileVectors][kMaxRows] = SAMP_TILES(tile_f32);
static const TileFunction kTilesI8[kTileVectors][kMaxRows] = SAMP_TILES(tile_i8);

// c = a b for `rows` rows, in panels of `panel` vectors that lie `panel_bytes` apart in b.
SAMP_INLINE void multiply(bool int8, const Tile& t, long rows, long vectors, long panel,
                          long panel_bytes) {
  const TileFunction(*tiles)[kMaxRows] = int8 ? kTilesI8 : kTilesF32;
  for (long v = 0; v < vectors; v += panel) {
    const long wide = vectors - v < panel ? vectors - v : panel;
    // Tiles of nearly the same height: 27 rows by 6 are 6, 6, 5, 5, 5 rather than 6, 6, 6, 6, 3.
    long left = (rows + kTileRows[wide - 1] - 1) / kTileRows[wide - 1];
    Tile part = t;
    part.b = (const char*)t.b + v / panel * panel_bytes;
    part.c = t.c + v * W;
    if (t.start) part.start = t.start + v * W;
    for (long q = 0, high; q < rows; q += high, --left) {
      high = (rows - q + left - 1) / left;
      tiles[wide - 1][high - 1](part);
      part.a = (const char*)part.a + high * t.lda * (int8 ? 1 : 4);
      part.scale += high * t.scale_step;
      part.c += high * t.ldc;
    }
  }
}

#if SAMP_LEVEL >= 4
#include "attention_amx.h"
#endif

// ---- packing of K and V ----

SAMP_INLINE long round_up(long x, long to) { return (x + to - 1) / to * to; }

// 16 bytes (4 columns of 4 bytes) of each of W rows -> 4 vectors, one a column.
SAMP_INLINE void transpose_rows(const char* x, const long* offset, vf* column) {
  vf z[4];  // lane j of z[i] is row 4 j + i
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if SAMP_LEVEL >= 3
    // Masked loads: an insert would be a shuffle.
    __m512 y = _mm512_castps128_ps512(_mm_loadu_ps((const float*)(x + offset[i])));
    y = _mm512_mask_broadcast_f32x4(y, 0x00f0, _mm_loadu_ps((const float*)(x + offset[i + 4])));
    y = _mm512_mask_broadcast_f32x4(y, 0x0f00, _mm_loadu_ps((const float*)(x + offset[i + 8])));
    y = _mm512_mask_broadcast_f32x4(y, 0xf000, _mm_loadu_ps((const float*)(x + offset[i + 12])));
    z[i] = (vf)y;
#elif SAMP_LEVEL >= 1
    const __m256 y = _mm256_castps128_ps256(_mm_loadu_ps((const float*)(x + offset[i])));
    z[i] = (vf)_mm256_insertf128_ps(y, _mm_loadu_ps((const float*)(x + offset[i + 4])), 1);
#else
    z[i] = load((const float*)(x + offset[i]));
#endif
  }
  transpose_lanes(z, column);
}

// K [n, columns of 4 bytes] -> panels [column][panel keys]. The rows beyond n repeat the last one:
// their scores are masked. u8 becomes s8, and sums[key] = -128 times the key's sum, which takes the
// queries' zero point out of a score.
template <bool int8>
SAMP_INLINE void pack_keys(const char* x, long ld_bytes, long n, long columns, long panel,
                           void* packed, int32_t* sums) {
  const vi sign = set1i((int32_t)0x80808080);
  long offset[W];
  for (int i = 0; i < W; ++i) offset[i] = i * ld_bytes;
  for (long key = 0; key < n; key += W, x += W * ld_bytes) {
    float* to = (float*)packed + key / panel * panel * columns + key % panel;
    for (int i = (int)(n - key); i < W; ++i) offset[i] = (n - key - 1) * ld_bytes;
    vi sum{};
    long c = 0;
    for (; c + 4 <= columns; c += 4) {
      vf y[4];
      transpose_rows(x + 4 * c, offset, y);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (int8) {
          const vi s8 = (vi)y[i] ^ sign;
          sum = dot4(sum, set1i(0x01010101), s8);
          y[i] = (vf)s8;
        }
        store(to + (c + i) * panel, y[i]);
      }
    }
    for (; c < columns; ++c) {
      vi y;
      for (int i = 0; i < W; ++i) {
        int32_t four;
        __builtin_memcpy(&four, x + offset[i] + 4 * c, 4);
        y[i] = four;
      }
      if (int8) {
        y ^= sign;
        sum = dot4(sum, set1i(0x01010101), y);
      }
      storei(to + c * panel, y);
    }
    if (int8) storei(sums + key, sum * set1i(-128));
  }
}

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint16_t pairs8 __attribute__((vector_size(16)));

// 16 dims of 4 keys -> [16][4] bytes; u8 becomes s8.
SAMP_INLINE void interleave_keys(const bytes16* key, int8_t* to) {
#if SAMP_LEVEL >= 3
  // One key a lane; then groups of 4 dims are gathered into lanes and transposed there.
  const __m512i across = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i within =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i y = _mm512_castsi128_si512((__m128i)key[0]);
  y = _mm512_mask_broadcast_i32x4(y, 0x00f0, (__m128i)key[1]);
  y = _mm512_mask_broadcast_i32x4(y, 0x0f00, (__m128i)key[2]);
  y = _mm512_mask_broadcast_i32x4(y, 0xf000, (__m128i)key[3]);
  y = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(across, y), within);
  _mm512_storeu_si512(to, y ^ _mm512_set1_epi8((char)0x80));
#else
#define SAMP_LOW8(a, b) \
  SAMP_SHUFFLE(bytes16, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define SAMP_HIGH8(a, b) \
  SAMP_SHUFFLE(bytes16, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define SAMP_LOW16(a, b) SAMP_SHUFFLE(pairs8, a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define SAMP_HIGH16(a, b) SAMP_SHUFFLE(pairs8, a, b, 4, 12, 5, 13, 6, 14, 7, 15)
  const bytes16 sign = bytes16{} + (uint8_t)0x80;
  const pairs8 a = (pairs8)(SAMP_LOW8(key[0], key[1]) ^ sign);
  const pairs8 b = (pairs8)(SAMP_LOW8(key[2], key[3]) ^ sign);
  const pairs8 c = (pairs8)(SAMP_HIGH8(key[0], key[1]) ^ sign);
  const pairs8 d = (pairs8)(SAMP_HIGH8(key[2], key[3]) ^ sign);
  const pairs8 y[4] = {SAMP_LOW16(a, b), SAMP_HIGH16(a, b), SAMP_LOW16(c, d), SAMP_HIGH16(c, d)};
  __builtin_memcpy(to, y, sizeof y);
#endif
}

// V u8 [n, d] -> s8 [n / 4][ld dims][4 keys]. Keys beyond n repeat the last one: their p is 0.
SAMP_INLINE void pack_values(const uint8_t* x, long ld_x, long n, long d, int8_t* packed, long ld) {
  const long whole = d / 16 * 16;
  for (long key = 0; key < n; key += 4, packed += 4 * ld) {
    bytes16 row[4] = {};
    const uint8_t* from[4];
    for (long i = 0; i < 4; ++i) from[i] = x + (key + i < n ? key + i : n - 1) * ld_x;
    for (long c = 0; c < whole; c += 16) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) __builtin_memcpy(&row[i], from[i] + c, 16);
      interleave_keys(row, packed + 4 * c);
    }
    if (whole == d) continue;
    for (int i = 0; i < 4; ++i) __builtin_memcpy(&row[i], from[i] + whole, (size_t)(d - whole));
    interleave_keys(row, packed + 4 * whole);
  }
}

// ---- softmax ----

// R (1 to 4) rows of scores -> exp(s - max) in place, 0 beyond n; inverse[0..3] = 1 / their sums.
// The biases of a row begin one place before those of the row above it.
template <int R>
SAMP_INLINE void softmax_rows(float* s, long ld, long n, const float* bias, float* inverse) {
  const long last = (n - 1) / W * W;
  if (bias) {
    for (long i = 0; i < last; i += W)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) store(s + r * ld + i, load(s + r * ld + i) + load(bias - r + i));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      store(s + r * ld + last, load(s + r * ld + last) + load_n(bias - r + last, (int)(n - last)));
  }
  const vi keep = (vi)(lane_index() < set1i((int32_t)(n - last)));
  const vi lowest = (vi)set1(-3.0e38f) & ~keep;
  vf top[4], sum[4] = {};
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    float* p = s + r * ld + last;
    top[r] = (vf)(((vi)load(p) & keep) | lowest);
    store(p, top[r]);
  }
  for (long i = 0; i < last; i += W)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) top[r] = vmax(top[r], load(s + r * ld + i));
#pragma GCC unroll 4
  for (int r = R; r < 4; ++r) top[r] = top[0];
  const vf4 tops = reduce4<true>(top);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) top[r] = set1(tops[r]);
  for (long i = 0; i <= last; i += W)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf e = exp_neg(load(s + r * ld + i) - top[r]);
      store(s + r * ld + i, e);
      sum[r] += e;
    }
  const vf4 inverses = (vf4{} + 1.0f) / reduce4<false>(sum);
  __builtin_memcpy(inverse, &inverses, sizeof inverses);
}

// ---- one head ----

// Where the pieces of one head lie in the scratch; without a base only their size is counted.
struct HeadScratch {
  char* base;
  long used = 0;
  long columns;      // of values and context: d rounded up to whole vectors
  float* keys;       // panels [d][keys], or [d / 4][keys] groups of 4
  int32_t* sums;     // [n]
  float* values;     // [n][columns], or [n / 4][columns] groups of 4
  float* scores;     // [kBlockRows][n]
  uint8_t* p8;       // [kBlockRows][n]
  float* context;    // [kBlockRows][columns]
  uint8_t* rows[3];  // Q, K, V [n][d rounded up to 4] quantized here

  HeadScratch(void* at, long d, long n) : base((char*)at), columns(round_up(d, 16)) {
    const long padded = round_up(n, kTileVectors * W);
    keys = (float*)take(padded * round_up(d, 4) * 4);
    sums = (int32_t*)take(padded * 4);
    values = (float*)take(round_up(n, W == 16 ? 16 : 4) * columns * 4);  // whole tiles of keys
    scores = (float*)take(kBlockRows * padded * 4);
    p8 = (uint8_t*)take(kBlockRows * padded);
    context = (float*)take(kBlockRows * columns * 4);
    for (int i = 0; i < 3; ++i) rows[i] = (uint8_t*)take(n * round_up(d, 4));
  }
  char* take(long bytes) {
    char* at = base ? base + used : nullptr;
    used += round_up(bytes, 64);
    return at;
  }
};

static size_t attention_scratch(long head_dim, long max_seqlen) {
  return (size_t)HeadScratch(nullptr, head_dim, max_seqlen).used;
}

static void attention_head(const Attention& op, long begin, long n, long first_row, long head,
                           void* at) {
  const long d = op.head_dim, hidden = op.heads * d;
  const HeadScratch m(at, d, n);
  const long queries = op.first_only ? 1 : n;

  // Q, K, V as each product wants them: floats as they lie, or u8.
  const float* f[3] = {};
  const uint8_t* u[3] = {};
  long ld_u = op.ld;
  const long d4 = round_up(d, 4);  // dims are multiplied by fours: those beyond d are zeros
  if (op.qkv_q && d4 == d) {
    for (int i = 0; i < 3; ++i) u[i] = op.qkv_q + begin * op.ld + i * hidden + head * d;
  } else {
    const bool wanted[3] = {op.int8_scores, op.int8_scores, op.int8_context};
    const float scale[3] = {op.q_scale, op.k_scale, op.v_scale};
    ld_u = d4;
    for (int i = 0; i < 3; ++i) {
      const long from = begin * op.ld + i * hidden + head * d;
      if (op.qkv_f) f[i] = op.qkv_f + from;
      u[i] = m.rows[i];
      if (!wanted[i]) continue;
      for (long row = 0; row < (i ? n : queries); ++row) {
        uint8_t* to = m.rows[i] + row * d4;
        if (op.qkv_q)
          __builtin_memcpy(to, op.qkv_q + from + row * op.ld, (size_t)d);
        else
          quantize_row(f[i] + row * op.ld, d, 1.0f / scale[i], to);
        for (long c = d; c < d4; ++c) to[c] = 128;
      }
    }
  }

  const float root = 1.0f / __builtin_sqrtf((float)d);
  const float score_scale = op.int8_scores ? op.q_scale * op.k_scale * root : root;
  const long vectors = (n + W - 1) / W, panels = (vectors + kTileVectors - 1) / kTileVectors;
  const long panel = (vectors + panels - 1) / panels;
  Tile score;
  score.b = m.keys, score.ldb = panel * W, score.k = op.int8_scores ? d4 / 4 : d;
  score.scale = &score_scale;
  score.ldc = vectors * W, score.c = m.scores;
  bool tiles = false;
#if SAMP_LEVEL >= 4
  tiles = op.int8_scores && op.int8_context && queries > 1 && d4 <= 64;
  if (tiles) score.ldc = round_up(score.ldc, 64);
#endif
  if (op.int8_scores) {
    pack_keys<true>((const char*)u[1], ld_u, n, d4 / 4, panel * W, m.keys, m.sums);
    score.lda = ld_u, score.start = m.sums;
  } else {
    pack_keys<false>((const char*)f[1], op.ld * 4, n, d, panel * W, m.keys, nullptr);
    score.lda = op.ld;
  }

  const float inv_p = 1.0f / op.p_scale, context_scale = op.p_scale * op.v_scale;
  const vf magic = set1(12582912.0f);  // rounds; the integer is in the low byte
  float inverse[kBlockRows];
  Tile context;
  context.ldb = m.columns;
  if (op.int8_context) {
    pack_values(u[2], ld_u, n, d, (int8_t*)m.values, m.columns);
    context.a = m.p8, context.lda = score.ldc, context.b = m.values, context.k = (n + 3) / 4;
    context.scale = &context_scale;
  } else {
    context.a = m.scores, context.lda = score.ldc, context.k = n;
    context.scale = inverse, context.scale_step = 1;
    if (d % W == 0 && queries <= kBlockRows) {  // V is read too few times to pay for a copy
      context.b = f[2], context.ldb = op.ld;
    } else {
      for (long row = 0; row < n; ++row)
        for (long i = 0; i < d; i += W) {
          const int w = d - i < W ? (int)(d - i) : W;
          store(m.values + row * m.columns + i, load_n(f[2] + row * op.ld + i, w));
        }
      context.b = m.values;
    }
  }

  const long most = tiles ? kStripe : kBlockRows;
  const long blocks = (queries + most - 1) / most;
  long block = (queries + blocks - 1) / blocks;
  if (!tiles) block = round_up(block, 6);  // whole tiles
#if SAMP_LEVEL >= 4
  if (tiles) shape_attention((int)block, (int)d4);
#endif
  for (long next = 0; next < queries; next += block) {
    // Stripes are of one height: the last begins early, and its first rows are computed again.
    const long q0 = tiles && next + block > queries ? queries - block : next;
    const long rows = queries - q0 < block ? queries - q0 : block;
    score.a = op.int8_scores ? (const void*)(u[0] + q0 * ld_u) : (const void*)(f[0] + q0 * op.ld);
    const long panel_bytes = panel * W * score.k * 4;
#if SAMP_LEVEL >= 4
    if (tiles) stripe_scores(score, rows, vectors, panel, panel_bytes);
#endif
    if (!tiles) multiply(op.int8_scores, score, rows, vectors, panel, panel_bytes);

    const float* bias = nullptr;  // of query q0 and key 0
    if (op.position_bias) bias = op.position_bias + head * (2 * op.reach - 1) + op.reach - 1 - q0;
    long r = 0;
    for (; r < rows; r += 4) {
      float* p = m.scores + r * score.ldc;
      const float* b = bias ? bias - r : nullptr;
      switch (rows - r) {
        case 1: softmax_rows<1>(p, score.ldc, n, b, inverse + r); break;
        case 2: softmax_rows<2>(p, score.ldc, n, b, inverse + r); break;
        case 3: softmax_rows<3>(p, score.ldc, n, b, inverse + r); break;
        default: softmax_rows<4>(p, score.ldc, n, b, inverse + r);
      }
    }
    if (op.int8_context)
      for (r = 0; r < rows; ++r) {
        const vf s = set1(inverse[r] * inv_p);
        for (long i = 0; i < vectors * W; i += W)
          store_bytes(m.p8 + r * score.ldc + i,
                      (vi)(vmin(load(m.scores + r * score.ldc + i) * s, set1(127.0f)) + magic), W);
        for (long i = vectors * W; i < score.ldc; i += W)
          store_bytes(m.p8 + r * score.ldc + i, vi{}, W);
      }

    const long row0 = op.first_only ? first_row : begin + q0;
    const bool direct = op.out.out_f && d % W == 0;
    context.c = direct ? op.out.out_f + row0 * op.out.ld_f + head * d : m.context;
    context.ldc = direct ? op.out.ld_f : m.columns;
#if SAMP_LEVEL >= 4
    if (tiles) stripe_context(context, rows, (d + W - 1) / W, score.ldc);
#endif
    if (!tiles)
      multiply(op.int8_context, context, rows, (d + W - 1) / W, kTileVectors, kTileVectors * W * 4);
    for (r = 0; r < rows; ++r) {
      const float* c = context.c + r * context.ldc;
      const long to = row0 + r;
      if (op.out.out_f && !direct)
        for (long i = 0; i < d; i += W)
          store_n(op.out.out_f + to * op.out.ld_f + head * d + i, load(c + i),
                  d - i < W ? (int)(d - i) : W);
      if (op.out.out_q)
        quantize_row(c, d, op.out.inv_scale, op.out.out_q + to * op.out.ld_q + head * d);
    }
  }
}

static void attention(const Attention& op, long begin, long end, long first_row, long head0,
                      long head1, void* scratch) {
  for (long head = head0; head < head1; ++head)
    attention_head(op, begin, end - begin, first_row, head, scratch);
#if SAMP_LEVEL >= 4
  release_tiles();
#endif
}
