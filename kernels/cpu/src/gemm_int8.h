// The int8 GEMM on vectors: u8 activations (zero point 128) times s8 weights. A packed panel is
// [2W int32: -128 times the column's sum][K/4][2][W][4 s8]: the accumulators start at the
// correction, so that they end as the exact signed sums. Included by level.cc after gemm.h.

SAMP_INLINE size_t panel_int8(long k) { return (size_t)PANEL * 4 + (size_t)k * PANEL; }

static size_t packed_int8(long n, long k) { return (size_t)(up(n, PANEL) / PANEL) * panel_int8(k); }

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

template <int MR>
static void tile_int8(const uint8_t* x, long ld, const uint8_t* panel, long k4, Fetch fetch,
                      int32_t* tile) {
  vi acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[r][v] = loadi(panel + v * W * 4);
  const uint8_t* w = panel + PANEL * 4;
  RowsOf<uint8_t, MR> rows(x, ld);
  const auto step = [&]() __attribute__((always_inline)) {
    const vi w0 = loadi(w), w1 = loadi(w + W * 4);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      int32_t a;
      __builtin_memcpy(&a, rows.at(r), 4);
      const vi b = set1i(a);
      acc[r][0] = dot4(acc[r][0], b, w0);
      acc[r][1] = dot4(acc[r][1], b, w1);
    }
    w += PANEL * 4;
    rows.step(4);
  };
  long i = 0;
  for (; i + STRIDE <= k4; i += STRIDE) {
#pragma GCC unroll 4
    for (int j = 0; j < STRIDE; ++j) step();
    fetch();
  }
  for (; i < k4; ++i) step();
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) storei(tile + r * PANEL + v * W, acc[r][v]);
}

static constexpr TileFn<uint8_t, uint8_t, int32_t> kGemmInt8[ROWS] = SAMP_GEMM_TILES(tile_int8);

static void gemm_int8(const Gemm& g, long row0, long row1, long panel0, long panel1) {
  sweep<uint8_t, int32_t>(g, row0, row1, panel0, panel1, panel_int8(g.k), g.k / 4, kGemmInt8,
                          [&](const int32_t* tile, long row, int rows, long col) {
                            finish(g.ep, tile, PANEL, row, rows, col, g.n);
                          });
}

// The int32 sums alone, for tests.
static void sums_int8(const Gemm& g, long row0, long row1, int32_t* sums, long ld) {
  sweep<uint8_t, int32_t>(g, row0, row1, 0, up(g.n, PANEL) / PANEL, panel_int8(g.k), g.k / 4,
                          kGemmInt8, [&](const int32_t* tile, long row, int rows, long col) {
                            for (int r = 0; r < rows; ++r)
                              for (long j = 0; j < PANEL && col + j < g.n; ++j)
                                sums[(row + r) * ld + col + j] = tile[r * PANEL + j];
                          });
}
