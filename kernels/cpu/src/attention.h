// Attention of one sequence, head by head. Included by level.cc after rowwise.h, inside the
// namespace of a level.
//
// Both products are tiles of the same shape: up to kTileRows queries against up to kTileVectors
// vectors. For the scores the vectors are keys (K is transposed into panels of kTileVectors
// vectors), for the context they are the dims of a head. Whatever the tiling, a score sums its dims
// in order and a context value its keys in order, in one accumulator each: a query's result does
// not depend on which other queries are computed.

constexpr int kTileRows = 6;
constexpr int kTileVectors = W == 16 ? 4 : 2;  // 24 accumulators of 32 registers, 12 of 16
constexpr int kPanel = kTileVectors * W;
constexpr int kBlockTiles = 4;  // tiles whose scores are held at once: K stays in L1 for them all
constexpr int kBlockRows = kTileRows * kBlockTiles;
constexpr long kInPlace = 12;  // up to so many queries read V where it lies

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
#pragma GCC unroll 6
    for (int q = 0; q < Q; ++q) {
      const vf x = set1(a[q * t.lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[q][v] = fma(x, y[v], acc[q][v]);
    }
  }
#pragma GCC unroll 6
  for (int q = 0; q < Q; ++q) {
    const vf s = set1(t.scale[q * t.scale_step]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(t.c + q * t.ldc + v * W, acc[q][v] * s);
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
#pragma GCC unroll 6
    for (int q = 0; q < Q; ++q) acc[q][v] = x;
  }
  for (long k = 0; k < t.k; ++k, b += 4 * t.ldb) {
    vi y[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) y[v] = loadi(b + v * 4 * W);
#pragma GCC unroll 6
    for (int q = 0; q < Q; ++q) {
      int32_t four;
      __builtin_memcpy(&four, a + q * t.lda + 4 * k, 4);
      const vi x = set1i(four);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[q][v] = dot4(acc[q][v], x, y[v]);
    }
  }
#pragma GCC unroll 6
  for (int q = 0; q < Q; ++q) {
    const vf s = set1(t.scale[q * t.scale_step]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(t.c + q * t.ldc + v * W, to_float(acc[q][v]) * s);
  }
}

typedef void (*TileFunction)(const Tile&);
#if SAMP_LEVEL == 3
#define SAMP_TILES(f, q) {f<q, 1>, f<q, 2>, f<q, 3>, f<q, 4>}
#else
#define SAMP_TILES(f, q) {f<q, 1>, f<q, 2>}
#endif
#define SAMP_ALL_TILES(f)                                                                      \
  {SAMP_TILES(f, 1), SAMP_TILES(f, 2), SAMP_TILES(f, 3), SAMP_TILES(f, 4), SAMP_TILES(f, 5),   \
   SAMP_TILES(f, 6)}
static const TileFunction kTilesF32[kTileRows][kTileVectors] = SAMP_ALL_TILES(tile_f32);
static const TileFunction kTilesI8[kTileRows][kTileVectors] = SAMP_ALL_TILES(tile_i8);

// ---- packing of K and V ----

SAMP_INLINE long round_up(long x, long to) { return (x + to - 1) / to * to; }

// 16 bytes (4 columns of 4 bytes) of each of W rows -> 4 vectors, one a column.
SAMP_INLINE void transpose4(const char* x, const long* offset, vf* column) {
#if SAMP_LEVEL == 3
  __m512 z[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // lane j of z[i] is row 4 j + i; a masked load, not a shuffle
    z[i] = _mm512_castps128_ps512(_mm_loadu_ps((const float*)(x + offset[i])));
    z[i] = _mm512_mask_broadcast_f32x4(z[i], 0x00f0,
                                       _mm_loadu_ps((const float*)(x + offset[i + 4])));
    z[i] = _mm512_mask_broadcast_f32x4(z[i], 0x0f00,
                                       _mm_loadu_ps((const float*)(x + offset[i + 8])));
    z[i] = _mm512_mask_broadcast_f32x4(z[i], 0xf000,
                                       _mm_loadu_ps((const float*)(x + offset[i + 12])));
  }
  const __m512d a = (__m512d)_mm512_unpacklo_ps(z[0], z[1]);
  const __m512d b = (__m512d)_mm512_unpacklo_ps(z[2], z[3]);
  const __m512d c = (__m512d)_mm512_unpackhi_ps(z[0], z[1]);
  const __m512d d = (__m512d)_mm512_unpackhi_ps(z[2], z[3]);
  column[0] = (vf)_mm512_unpacklo_pd(a, b), column[1] = (vf)_mm512_unpackhi_pd(a, b);
  column[2] = (vf)_mm512_unpacklo_pd(c, d), column[3] = (vf)_mm512_unpackhi_pd(c, d);
#elif SAMP_LEVEL >= 1
  __m256 z[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    z[i] = _mm256_insertf128_ps(
        _mm256_castps128_ps256(_mm_loadu_ps((const float*)(x + offset[i]))),
        _mm_loadu_ps((const float*)(x + offset[i + 4])), 1);
  const __m256d a = (__m256d)_mm256_unpacklo_ps(z[0], z[1]);
  const __m256d b = (__m256d)_mm256_unpacklo_ps(z[2], z[3]);
  const __m256d c = (__m256d)_mm256_unpackhi_ps(z[0], z[1]);
  const __m256d d = (__m256d)_mm256_unpackhi_ps(z[2], z[3]);
  column[0] = (vf)_mm256_unpacklo_pd(a, b), column[1] = (vf)_mm256_unpackhi_pd(a, b);
  column[2] = (vf)_mm256_unpacklo_pd(c, d), column[3] = (vf)_mm256_unpackhi_pd(c, d);
#else
  vf z[4];
  for (int i = 0; i < 4; ++i) z[i] = load((const float*)(x + offset[i]));
  const vf a = __builtin_shuffle(z[0], z[1], vi{0, 4, 1, 5});
  const vf b = __builtin_shuffle(z[2], z[3], vi{0, 4, 1, 5});
  const vf c = __builtin_shuffle(z[0], z[1], vi{2, 6, 3, 7});
  const vf d = __builtin_shuffle(z[2], z[3], vi{2, 6, 3, 7});
  column[0] = __builtin_shuffle(a, b, vi{0, 1, 4, 5});
  column[1] = __builtin_shuffle(a, b, vi{2, 3, 6, 7});
  column[2] = __builtin_shuffle(c, d, vi{0, 1, 4, 5});
  column[3] = __builtin_shuffle(c, d, vi{2, 3, 6, 7});
#endif
}

// K [n, columns of 4 bytes] -> panels [column][kPanel keys]. The rows beyond n repeat the last one:
// their scores are masked. u8 becomes s8, and sums[key] = -128 times the key's sum, which takes the
// queries' zero point out of a score.
template <bool int8>
SAMP_INLINE void pack_keys(const char* x, long ld_bytes, long n, long columns, void* packed,
                           int32_t* sums) {
  const vi sign = set1i((int32_t)0x80808080);
  for (long key = 0; key < n; key += W) {
    float* to = (float*)packed + key / kPanel * kPanel * columns + key % kPanel;
    long offset[W];
    for (int i = 0; i < W; ++i) offset[i] = (key + i < n ? key + i : n - 1) * ld_bytes;
    vi sum{};
    long c = 0;
    for (; c + 4 <= columns; c += 4) {
      vf y[4];
      transpose4(x + 4 * c, offset, y);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (int8) {
          const vi s8 = (vi)y[i] ^ sign;
          sum = dot4(sum, set1i(0x01010101), s8);
          y[i] = (vf)s8;
        }
        store(to + (c + i) * kPanel, y[i]);
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
      storei(to + c * kPanel, y);
    }
    if (int8) storei(sums + key, sum * set1i(-128));
  }
}

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint16_t pairs8 __attribute__((vector_size(16)));

// V u8 [n, d] -> s8 [n / 4][ld dims][4 keys]; keys beyond n and dims beyond d are 0.
SAMP_INLINE void pack_values(const uint8_t* x, long ld_x, long n, long d, int8_t* packed, long ld) {
  const bytes16 sign = bytes16{} + (uint8_t)0x80;
  for (long key = 0; key < n; key += 4, packed += 4 * ld) {
    for (long c = 0; c < d; c += 16) {
      bytes16 row[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        row[i] = sign;
        if (key + i < n) {
          const uint8_t* from = x + (key + i) * ld_x + c;
          if (c + 16 <= d)
            __builtin_memcpy(&row[i], from, 16);
          else
            __builtin_memcpy(&row[i], from, (size_t)(d - c));
        }
        row[i] ^= sign;
      }
#define SAMP_LOW(a, b) \
  __builtin_shuffle(a, b, bytes16{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define SAMP_HIGH(a, b) \
  __builtin_shuffle(a, b, bytes16{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
      const pairs8 a = (pairs8)SAMP_LOW(row[0], row[1]), b = (pairs8)SAMP_LOW(row[2], row[3]);
      const pairs8 e = (pairs8)SAMP_HIGH(row[0], row[1]), f = (pairs8)SAMP_HIGH(row[2], row[3]);
      const pairs8 low{0, 8, 1, 9, 2, 10, 3, 11}, high{4, 12, 5, 13, 6, 14, 7, 15};
      const pairs8 y[4] = {__builtin_shuffle(a, b, low), __builtin_shuffle(a, b, high),
                           __builtin_shuffle(e, f, low), __builtin_shuffle(e, f, high)};
      __builtin_memcpy(packed + 4 * c, y, sizeof y);
    }
  }
}

// ---- softmax ----

// R rows of scores -> exp(s - max) in place, 0 beyond n; inverse[r] = 1 / their sum.
template <int R>
SAMP_INLINE void softmax_rows(float* s, long ld, long n, const float* bias, long ld_bias,
                              float* inverse) {
  if (bias)
    for (int r = 0; r < R; ++r)
      for (long i = 0; i < n; i += W) {
        const int m = n - i < W ? (int)(n - i) : W;
        store(s + r * ld + i, load(s + r * ld + i) + load_n(bias + r * ld_bias + i, m));
      }
  const long last = (n - 1) / W * W;
  const vi lane = lane_index();
  const vi keep = (vi)(lane < set1i((int32_t)(n - last)));
  const vf lowest = set1(-3.0e38f);
  vf top[R], sum[R] = {};
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    float* p = s + r * ld + last;
    top[r] = (vf)(((vi)load(p) & keep) | ((vi)lowest & ~keep));
    store(p, top[r]);
  }
  for (long i = 0; i < last; i += W)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) top[r] = vmax(top[r], load(s + r * ld + i));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) top[r] = set1(reduce_max(top[r]));
  for (long i = 0; i <= last; i += W)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf e = exp_neg(load(s + r * ld + i) - top[r]);
      store(s + r * ld + i, e);
      sum[r] += e;
    }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) inverse[r] = 1.0f / reduce_add(sum[r]);
}

// ---- one head ----

// Where the pieces of one head lie in the scratch; without a base only their size is counted.
struct HeadScratch {
  char* base;
  long used = 0;
  long columns;     // of values and context: d rounded up to whole vectors
  float* keys;      // panels [d][kPanel], or [d / 4][kPanel] groups of 4
  int32_t* sums;    // [n]
  float* values;    // [n][columns], or [n / 4][columns] groups of 4
  float* scores;    // [kBlockRows][n]
  uint8_t* p8;      // [kBlockRows][n]
  float* context;   // [kBlockRows][columns]
  uint8_t* rows[3]; // Q, K, V [n][d] quantized here

  HeadScratch(void* at, long d, long n) : base((char*)at), columns(round_up(d, 16)) {
    const long padded = round_up(n, kPanel);
    keys = (float*)take(padded * d * 4);
    sums = (int32_t*)take(padded * 4);
    values = (float*)take(round_up(n, 4) * columns * 4);
    scores = (float*)take(kBlockRows * padded * 4);
    p8 = (uint8_t*)take(kBlockRows * padded);
    context = (float*)take(kBlockRows * columns * 4);
    for (int i = 0; i < 3; ++i) rows[i] = (uint8_t*)take(n * d);
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

// c = a b for all rows of a block, panel by panel.
SAMP_INLINE void multiply(bool int8, const Tile& t, long rows, long tile_rows, long vectors,
                          long panel_bytes) {
  for (long v = 0; v < vectors; v += kTileVectors) {
    Tile part = t;
    part.b = (const char*)t.b + v / kTileVectors * panel_bytes;
    part.c = t.c + v * W;
    if (t.start) part.start = t.start + v * W;
    const long wide = vectors - v < kTileVectors ? vectors - v : kTileVectors;
    for (long q = 0; q < rows; q += tile_rows) {
      const long high = rows - q < tile_rows ? rows - q : tile_rows;
      (int8 ? kTilesI8 : kTilesF32)[high - 1][wide - 1](part);
      part.a = (const char*)part.a + tile_rows * t.lda * (int8 ? 1 : 4);
      part.scale += tile_rows * t.scale_step;
      part.c += tile_rows * t.ldc;
    }
  }
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
  if (op.qkv_q) {
    for (int i = 0; i < 3; ++i) u[i] = op.qkv_q + begin * op.ld + i * hidden + head * d;
  } else {
    const bool wanted[3] = {op.int8_scores, op.int8_scores, op.int8_context};
    const float scale[3] = {op.q_scale, op.k_scale, op.v_scale};
    ld_u = d;
    for (int i = 0; i < 3; ++i) {
      f[i] = op.qkv_f + begin * op.ld + i * hidden + head * d;
      u[i] = m.rows[i];
      if (!wanted[i]) continue;
      for (long row = 0; row < (i ? n : queries); ++row)
        quantize_row(f[i] + row * op.ld, d, 1.0f / scale[i], m.rows[i] + row * d);
    }
  }

  const float root = 1.0f / __builtin_sqrtf((float)d);
  const float score_scale = op.int8_scores ? op.q_scale * op.k_scale * root : root;
  Tile score;
  score.b = m.keys, score.ldb = kPanel, score.k = op.int8_scores ? d / 4 : d;
  score.scale = &score_scale;
  score.ldc = round_up(n, W), score.c = m.scores;
  if (op.int8_scores) {
    pack_keys<true>((const char*)u[1], ld_u, n, d / 4, m.keys, m.sums);
    score.lda = ld_u, score.start = m.sums;
  } else {
    pack_keys<false>((const char*)f[1], op.ld * 4, n, d, m.keys, nullptr);
    score.lda = op.ld;
  }

  const float context_scale = op.p_scale * op.v_scale;
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
    if (d % W == 0 && queries <= kInPlace) {  // too few reads of V to pay for a copy
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

  // Tiles of nearly the same height: 27 queries are 6, 6, 5, 5, 5 rather than 6, 6, 6, 6, 3.
  const long tiles = (queries + kTileRows - 1) / kTileRows;
  const long tile_rows = (queries + tiles - 1) / tiles;
  const long block = tile_rows * kBlockTiles;
  for (long q0 = 0; q0 < queries; q0 += block) {
    const long rows = queries - q0 < block ? queries - q0 : block;
    score.a = op.int8_scores ? (const void*)(u[0] + q0 * ld_u) : (const void*)(f[0] + q0 * op.ld);
    multiply(op.int8_scores, score, rows, tile_rows, score.ldc / W, kPanel * score.k * 4);

    const float* bias =
        op.position_bias ? op.position_bias + (head * op.ld_bias + q0) * op.ld_bias : nullptr;
    long r = 0;
    for (; r < rows; r += rows - r >= 4 ? 4 : 1) {
      float* s = m.scores + r * score.ldc;
      const float* b = bias ? bias + r * op.ld_bias : nullptr;
      if (rows - r >= 4)
        softmax_rows<4>(s, score.ldc, n, b, op.ld_bias, inverse + r);
      else
        softmax_rows<1>(s, score.ldc, n, b, op.ld_bias, inverse + r);
    }
    if (op.int8_context)
      for (r = 0; r < rows; ++r) {
        const vf s = set1(inverse[r] / op.p_scale);
        for (long i = 0; i < score.ldc; i += W)
          store_bytes(m.p8 + r * score.ldc + i,
                      round_even(vmin(load(m.scores + r * score.ldc + i) * s, set1(127.0f))), W);
      }

    const long row0 = op.first_only ? first_row : begin + q0;
    const bool direct = op.out.out_f && d % W == 0;
    context.c = direct ? op.out.out_f + row0 * op.out.ld_f + head * d : m.context;
    context.ldc = direct ? op.out.ld_f : m.columns;
    multiply(op.int8_context, context, rows, tile_rows, (d + W - 1) / W, kPanel * 4);
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
}
