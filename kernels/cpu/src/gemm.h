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

// Weights come from L2, L3 or memory: while one panel is multiplied, the next is fetched, each line
// once, since a fetch costs a load's slot. With t tiles a panel each tile fetches 1/t of it.
constexpr long STRIDE = 4;  // steps of K that are unrolled, and between which lines are fetched

struct Fetch {
  const char* at = nullptr;
  long lines = 0;
  long at_once = 0;

  SAMP_MEMBER void operator()() {
    for (long i = 0; i < at_once && lines > 0; ++i, --lines, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Part t of `count` of a panel, for a tile that takes `steps` steps.
SAMP_INLINE Fetch fetch_part(const char* panel, size_t bytes, long t, long count, long steps) {
  if (!panel) return {};
  const long lines = up((long)bytes, 64 * count) / (64 * count), strides = steps / STRIDE + 1;
  return {panel + t * lines * 64, lines, (lines + strides - 1) / strides};
}

// Where rows of x are read: a base for every third row, since two more are one addressing mode
// away; a base for each row does not fit the registers.
template <typename X, int MR>
struct RowsOf {
  const X* base[(MR + 2) / 3];
  long ld;

  SAMP_MEMBER RowsOf(const X* x, long ld_x) : ld(ld_x) {
#pragma GCC unroll 4
    for (int g = 0; g < (MR + 2) / 3; ++g) {
      base[g] = x + 3 * g * ld;
      hide(base[g]);
    }
  }
  SAMP_MEMBER const X* at(int r) const { return base[r / 3] + r % 3 * ld; }
  SAMP_MEMBER void step(int by) {
#pragma GCC unroll 4
    for (int g = 0; g < (MR + 2) / 3; ++g) {
      base[g] += by;
      hide(base[g]);
    }
  }
  // The compiler would make one pointer and many offsets of them again.
  static SAMP_MEMBER void hide(const X*& p) { asm("" : "+r"(p)); }
};

template <int MR>
static void tile_f32(const float* x, long ld, const float* panel, long k, Fetch fetch,
                     float* tile) {
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[r][v] = vf{};
  RowsOf<float, MR> rows(x, ld);
  const auto step = [&]() __attribute__((always_inline)) {
    const vf w0 = load(panel), w1 = load(panel + W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const vf b = set1(*rows.at(r));
      acc[r][0] = fma(b, w0, acc[r][0]);
      acc[r][1] = fma(b, w1, acc[r][1]);
    }
    panel += PANEL;
    rows.step(1);
  };
  long i = 0;
  for (; i + STRIDE <= k; i += STRIDE) {
#pragma GCC unroll 4
    for (int j = 0; j < STRIDE; ++j) step();
    fetch();
  }
  for (; i < k; ++i) step();
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

// The lines that a tile's end writes (and reads, where it adds a residual in place) come while its
// products are summed: weights have driven them out of L2 since they were last used.
SAMP_INLINE void fetch_end(const Epilogue& e, long row, int rows, long col) {
  for (int r = 0; r < rows; ++r) {
    if (e.out_f) {
      const float* f = e.out_f + (row + r) * e.ld_f + col;
      __builtin_prefetch(f, 1, 3);
      if (PANEL * 4 > 64) __builtin_prefetch(f + 16, 1, 3);
    }
    if (e.out_q) __builtin_prefetch(e.out_q + (row + r) * e.ld_q + col, 1, 3);
  }
}

// Rows are cut into tiles of nearly equal height: 13 rows are 7 + 6, not 12 + 1.
template <typename X, typename S, typename Tile>
SAMP_INLINE void sweep(const Gemm& g, long row0, long row1, long panel0, long panel1,
                       size_t panel_bytes, long steps, const TileFn<X, X, S>* tiles, Tile&& done) {
  alignas(64) S tile[ROWS * PANEL];
  const long rows = row1 - row0, count = (rows + ROWS - 1) / ROWS;
  const X* x = (const X*)g.x;
  for (long p = panel0; p < panel1; ++p) {
    const char* panel = (const char*)g.packed + p * panel_bytes;
    const char* next = p + 1 < panel1 ? panel + panel_bytes : (const char*)g.next;
    for (long t = 0, row = row0; t < count; ++t) {
      const int height = (int)(rows / count + (t < rows % count));
      fetch_end(g.ep, row, height, p * PANEL);
      tiles[height - 1](x + row * g.ld_x, g.ld_x, (const X*)panel, steps,
                        fetch_part(next, panel_bytes, t, count, steps), tile);
      done(tile, row, height, p * PANEL);
      row += height;
    }
  }
}

static void gemm_f32(const Gemm& g, long row0, long row1, long panel0, long panel1) {
  sweep<float, float>(g, row0, row1, panel0, panel1, panel_f32(g.k), g.k, kGemmF32,
                      [&](const float* tile, long row, int rows, long col) {
                        finish(g.ep, tile, PANEL, row, rows, col, g.n);
                      });
}
