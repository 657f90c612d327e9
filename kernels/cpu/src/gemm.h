// Packed-panel GEMMs, int8 and fp32, on one plan: a panel of 2W columns of the weight is packed
// k-major at load; a micro-kernel holds up to ROWS x 2 vectors of accumulators in registers and
// runs over the whole of K; the tile then goes through the epilogue (epilogue.h). K is never split,
// so every sum has one order whatever the number of rows, and a row alone equals a row in a batch.
//
// int8: u8 activations (zero point 128) times s8 weights. A packed panel is [2W int32: -128 times
// the column's sum][K/4][2][W][4 s8]: the accumulators start at the correction, so that they end as
// the exact signed sums. fp32: [K][2][W].

#if SAMP_LEVEL == 3
constexpr int ROWS = 12;  // 24 accumulators, 2 weights, a few broadcasts of 32 registers
#elif SAMP_LEVEL == 2
constexpr int ROWS = 6;
#else
constexpr int ROWS = 4;
#endif

SAMP_INLINE long up(long x, long to) { return (x + to - 1) / to * to; }

SAMP_INLINE size_t panel_int8(long k) { return (size_t)PANEL * 4 + (size_t)k * PANEL; }
SAMP_INLINE size_t panel_f32(long k) { return (size_t)k * PANEL * 4; }

static size_t packed_int8(long n, long k) { return (size_t)(up(n, PANEL) / PANEL) * panel_int8(k); }
static size_t packed_f32(long n, long k) { return (size_t)(up(n, PANEL) / PANEL) * panel_f32(k); }

static void pack_int8(const int8_t* w, long n, long k, void* packed) {
  uint8_t* out = (uint8_t*)packed;
  for (long c0 = 0; c0 < n; c0 += PANEL, out += panel_int8(k)) {
    int32_t* correction = (int32_t*)out;
    int8_t* body = (int8_t*)(out + PANEL * 4);
    for (int j = 0; j < PANEL; ++j) {
      int32_t sum = 0;
      for (long i = 0; i < k; ++i) {
        const int8_t q = c0 + j < n ? w[(c0 + j) * k + i] : 0;
        sum += q;
        body[(i / 4) * PANEL * 4 + j * 4 + i % 4] = q;
      }
      correction[j] = -128 * sum;
    }
  }
}

static void pack_f32(const float* w, long n, long k, void* packed) {
  float* out = (float*)packed;
  for (long c0 = 0; c0 < n; c0 += PANEL, out += k * PANEL)
    for (long i = 0; i < k; ++i)
      for (int j = 0; j < PANEL; ++j) out[i * PANEL + j] = c0 + j < n ? w[(c0 + j) * k + i] : 0.0f;
}

// Weights come from L2, L3 or memory: while one panel is multiplied, the next is fetched. With t
// tiles a panel each tile fetches 1/t of it.
struct Fetch {
  const char* at;
  long step;  // bytes for each 4 (int8) or 1 (fp32) of K; 0: nothing to fetch
};

template <int MR>
static void tile_int8(const uint8_t* x, long ld, const uint8_t* panel, long k4, Fetch f,
                      int32_t* tile) {
  vi acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[r][v] = loadi(panel + v * W * 4);
  const uint8_t* w = panel + PANEL * 4;
  for (long i = 0; i < k4; ++i) {
    const vi w0 = loadi(w), w1 = loadi(w + W * 4);
    __builtin_prefetch(f.at, 0, 2);
    f.at += f.step;
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      int32_t a;
      __builtin_memcpy(&a, x + r * ld, 4);
      const vi b = set1i(a);
      acc[r][0] = dot4(acc[r][0], b, w0);
      acc[r][1] = dot4(acc[r][1], b, w1);
    }
    w += PANEL * 4;
    x += 4;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) storei(tile + r * PANEL + v * W, acc[r][v]);
}

template <int MR>
static void tile_f32(const float* x, long ld, const float* panel, long k, Fetch f, float* tile) {
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[r][v] = vf{};
  for (long i = 0; i < k; ++i) {
    const vf w0 = load(panel), w1 = load(panel + W);
    __builtin_prefetch(f.at, 0, 2);
    f.at += f.step;
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const vf b = set1(x[r * ld]);
      acc[r][0] = fma(b, w0, acc[r][0]);
      acc[r][1] = fma(b, w1, acc[r][1]);
    }
    panel += PANEL;
    x += 1;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(tile + r * PANEL + v * W, acc[r][v]);
}

template <typename X, typename P, typename S>
using TileFn = void (*)(const X*, long, const P*, long, Fetch, S*);

#if SAMP_LEVEL == 3
#define SAMP_GEMM_TILES(f) \
  {f<1>, f<2>, f<3>, f<4>, f<5>, f<6>, f<7>, f<8>, f<9>, f<10>, f<11>, f<12>}
#elif SAMP_LEVEL == 2
#define SAMP_GEMM_TILES(f) {f<1>, f<2>, f<3>, f<4>, f<5>, f<6>}
#else
#define SAMP_GEMM_TILES(f) {f<1>, f<2>, f<3>, f<4>}
#endif

static constexpr TileFn<uint8_t, uint8_t, int32_t> kGemmInt8[ROWS] = SAMP_GEMM_TILES(tile_int8);
static constexpr TileFn<float, float, float> kGemmF32[ROWS] = SAMP_GEMM_TILES(tile_f32);

// Rows are cut into tiles of nearly equal height: 13 rows are 7 + 6, not 12 + 1.
template <typename X, typename S, typename Tile>
SAMP_INLINE void sweep(long row0, long row1, long panel0, long panel1, const X* x, long ld,
                       const char* packed, size_t panel_bytes, long steps,
                       const TileFn<X, X, S>* tiles, Tile&& done) {
  alignas(64) S tile[ROWS * PANEL];
  const long rows = row1 - row0, count = (rows + ROWS - 1) / ROWS;
  for (long p = panel0; p < panel1; ++p) {
    const char* panel = packed + p * panel_bytes;
    const long share = steps ? (long)(panel_bytes / steps / count) : 0;
    for (long t = 0, row = row0; t < count; ++t) {
      const int height = (int)(rows / count + (t < rows % count));
      const Fetch fetch{p + 1 < panel1 ? panel + panel_bytes + t * (panel_bytes / count) : panel,
                        p + 1 < panel1 ? share : 0};
      tiles[height - 1](x + row * ld, ld, (const X*)panel, steps, fetch, tile);
      done(tile, row, height, p * PANEL);
      row += height;
    }
  }
}

static void gemm_int8(const Gemm& g, long row0, long row1, long panel0, long panel1) {
  sweep<uint8_t, int32_t>(row0, row1, panel0, panel1, (const uint8_t*)g.x, g.ld_x,
                          (const char*)g.packed, panel_int8(g.k), g.k / 4, kGemmInt8,
                          [&](const int32_t* tile, long row, int rows, long col) {
                            finish(g.ep, tile, PANEL, row, rows, col, g.n);
                          });
}

static void gemm_f32(const Gemm& g, long row0, long row1, long panel0, long panel1) {
  sweep<float, float>(row0, row1, panel0, panel1, (const float*)g.x, g.ld_x, (const char*)g.packed,
                      panel_f32(g.k), g.k, kGemmF32,
                      [&](const float* tile, long row, int rows, long col) {
                        finish(g.ep, tile, PANEL, row, rows, col, g.n);
                      });
}

// The int32 sums alone, for tests.
static void sums_int8(const Gemm& g, long row0, long row1, int32_t* sums, long ld) {
  sweep<uint8_t, int32_t>(row0, row1, 0, up(g.n, PANEL) / PANEL, (const uint8_t*)g.x, g.ld_x,
                          (const char*)g.packed, panel_int8(g.k), g.k / 4, kGemmInt8,
                          [&](const int32_t* tile, long row, int rows, long col) {
                            for (int r = 0; r < rows; ++r)
                              for (long j = 0; j < PANEL && col + j < g.n; ++j)
                                sums[(row + r) * ld + col + j] = tile[r * PANEL + j];
                          });
}
