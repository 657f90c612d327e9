// Packed-panel GEMMs, int8 (gemm_int8.h; gemm_amx.h at level 4) and fp32 (here), on one plan: a
// panel of 2W columns of the weight is packed k-major at load; a micro-kernel holds up to ROWS x 2
// vectors of accumulators in registers and runs over the whole of K; the tile then goes through the
// epilogue (epilogue.h). K is never split, so every sum has one order whatever the number of rows,
// and a row alone equals a row in a batch. fp32 panels are [K][2][W].

#if SAMP_LEVEL >= 3
constexpr int ROWS = 12;  // 24 accumulators, 2 weights, a few broadcasts of 32 registers
#elif SAMP_LEVEL == 2
constexpr int ROWS = 6;
#else
constexpr int ROWS = 4;
#endif

SAMP_INLINE long up(long x, long to) { return (x + to - 1) / to * to; }

SAMP_INLINE size_t panel_f32(long k) { return (size_t)k * PANEL * 4; }

static size_t packed_f32(long n, long k) { return (size_t)(up(n, PANEL) / PANEL) * panel_f32(k); }

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

#if SAMP_LEVEL >= 3
#define SAMP_GEMM_TILES(f) \
  {f<1>, f<2>, f<3>, f<4>, f<5>, f<6>, f<7>, f<8>, f<9>, f<10>, f<11>, f<12>}
#elif SAMP_LEVEL == 2
#define SAMP_GEMM_TILES(f) {f<1>, f<2>, f<3>, f<4>, f<5>, f<6>}
#else
#define SAMP_GEMM_TILES(f) {f<1>, f<2>, f<3>, f<4>}
#endif

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

static void gemm_f32(const Gemm& g, long row0, long row1, long panel0, long panel1) {
  sweep<float, float>(row0, row1, panel0, panel1, (const float*)g.x, g.ld_x, (const char*)g.packed,
                      panel_f32(g.k), g.k, kGemmF32,
                      [&](const float* tile, long row, int rows, long col) {
                        finish(g.ep, tile, PANEL, row, rows, col, g.n);
                      });
}
