// The two products of int8 attention on AMX tiles, for a stripe of up to 16 queries. Included by
// attention.h.
//
// `high` is the queries of a stripe, all rows of a tile. Tiles 4 and 6 are queries and keys (`deep`
// bytes of dims), 5 and 7 probabilities and values.

SAMP_INLINE void shape_attention(int high, int deep) {
  shape_tiles({high, high, high, high, high, high, deep / 4, 16}, {deep, 64, 64, 64});
}

SAMP_INLINE void scale_tile(const int32_t* sums, long ld, long rows, vf scale, float* to,
                            long ld_to) {
  for (long r = 0; r < rows; ++r) store(to + r * ld_to, to_float(loadi(sums + r * ld)) * scale);
}

// Scores of a stripe, dims in one tile: to every whole vector of keys.
static void stripe_scores(const Tile& t, long rows, long vectors, long panel, long panel_bytes) {
  const vf scale = set1(*t.scale);
  tile_fence();
  SAMP_TILE_LOAD(4, t.a, t.lda);
  for (long v = 0; v < vectors; ++v) {
    float* to = t.c + v * W;
    SAMP_TILE_LOAD(0, t.start + v * W, 0);
    SAMP_TILE_LOAD(6, (const char*)t.b + v / panel * panel_bytes + v % panel * W * 4, t.ldb * 4);
    SAMP_TILE_DOT(0, 4, 6);
    SAMP_TILE_STORE(0, to, t.ldc * 4);
    if (v) scale_tile((const int32_t*)(to - W), t.ldc, rows, scale, to - W, t.ldc);
  }
  float* last = t.c + (vectors - 1) * W;
  scale_tile((const int32_t*)last, t.ldc, rows, scale, last, t.ldc);
}

// Context of a stripe, up to 4 vectors of dims at a time; keys in whole tiles (p is 0 beyond them).
static void stripe_context(const Tile& t, long rows, long vectors, long keys) {
  alignas(64) int32_t sums[kStripe * W];
  const vf scale = set1(*t.scale);
  const long ld = t.ldb * 4;
  tile_fence();
  for (long v0 = 0; v0 < vectors; v0 += 4) {
    const long wide = vectors - v0 < 4 ? vectors - v0 : 4;
    SAMP_TILE_ZERO(0);
    SAMP_TILE_ZERO(1);
    SAMP_TILE_ZERO(2);
    SAMP_TILE_ZERO(3);
    for (long k = 0; k < keys; k += 64) {
      const char* b = (const char*)t.b + k / 4 * ld + v0 * W * 4;
      SAMP_TILE_LOAD(5, (const char*)t.a + k, t.lda);
      SAMP_TILE_LOAD(7, b, ld);
      SAMP_TILE_DOT(0, 5, 7);
#define SAMP_MORE(i)                      \
  if (wide > i) {                         \
    SAMP_TILE_LOAD(7, b + i * W * 4, ld); \
    SAMP_TILE_DOT(i, 5, 7);               \
  }
      SAMP_MORE(1)
      SAMP_MORE(2)
      SAMP_MORE(3)
#undef SAMP_MORE
    }
#define SAMP_TAKE(i)                                             \
  if (wide > i) {                                                \
    SAMP_TILE_STORE(i, sums, W * 4);                             \
    scale_tile(sums, W, rows, scale, t.c + (v0 + i) * W, t.ldc); \
  }
    SAMP_TAKE(0)
    SAMP_TAKE(1)
    SAMP_TAKE(2)
    SAMP_TAKE(3)
#undef SAMP_TAKE
  }
}
