// The int8 GEMM on AMX, in place of gemm.h's: blocks of up to 32 rows x one panel of 32 columns, as
// 2 x 2 tiles of sums over the whole of K. A packed panel is [2W int32: -128 times the column's
// sum] [K/64][2 tiles][16 groups of 4][W][4 s8], K rounded up to 64 with zeros: a tile of weights
// is 1 KB in a row.
//
// The tile unit takes 64 cycles for 64 of K; the vector units meanwhile finish rows of the block
// before (scale, bias, activation, ...): neither waits for the other.

constexpr int TILE_K = 64;
constexpr int BLOCK_ROWS = 32;

SAMP_INLINE size_t panel_int8(long k) { return (size_t)PANEL * 4 + (size_t)up(k, TILE_K) * PANEL; }
static size_t packed_int8(long n, long k) { return (size_t)(up(n, PANEL) / PANEL) * panel_int8(k); }

static void pack_int8(const int8_t* w, long n, long k, void* packed) {
  uint8_t* out = (uint8_t*)packed;
  for (long c0 = 0; c0 < n; c0 += PANEL, out += panel_int8(k)) {
    int32_t* correction = (int32_t*)out;
    int8_t* body = (int8_t*)(out + PANEL * 4);
    for (int j = 0; j < PANEL; ++j) {
      int32_t sum = 0;
      int8_t* column = body + j / W * (TILE_K * W) + j % W * 4;
      for (long i = 0; i < up(k, TILE_K); ++i) {
        const int8_t q = c0 + j < n && i < k ? w[(c0 + j) * k + i] : 0;
        sum += q;
        column[i / TILE_K * (TILE_K * PANEL) + i % TILE_K / 4 * (W * 4) + i % 4] = q;
      }
      correction[j] = -128 * sum;
    }
  }
}

// A block whose sums are stored; its rows are finished a few at a time.
template <class End>
struct Pending {
  End end;
  const int32_t* tile;  // [BLOCK_ROWS][PANEL]
  int next, rows;

  SAMP_MEMBER void finish(int count) {
    const int stop = next + count < rows ? next + count : rows;
    if (next < stop) end(tile, next, stop);
    next = stop;
  }
};

// `make(row, col)` gives what finishes rows of one block: end(tile, first, last). TWO: more than 16
// rows, and so two tiles of them.
template <bool TWO, class Make>
static void sweep_tiles(const Gemm& g, long row0, long row1, long panel0, long panel1,
                        const Make& make) {
  const long rows = row1 - row0, count = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  // One shape for all blocks: the last begins early, and leaves alone the rows that it repeats.
  const int height = (int)((rows + count - 1) / count);
  const int high = TWO ? (height + 1) / 2 : height, low = height - high;
  // Four tiles of sums; two of activations, two of weights.
  shape_tiles({high, high, low, low, high, low, 16, 16}, {TILE_K, TILE_K, 64, 64});

  alignas(64) int32_t tiles[2][BLOCK_ROWS * PANEL];
  alignas(64) uint8_t rest[BLOCK_ROWS * TILE_K];  // the end of each row, where K is no multiple
  const long steps = g.k / TILE_K, left = g.k % TILE_K, ld = g.ld_x;
  const int share = (int)((height + steps) / (steps + 1));  // rows to finish in each step
  const size_t bytes = panel_int8(g.k);
  const int lines = (int)((TILE_K * PANEL / 64 + count - 1) / count);  // to fetch in each step
  Pending<decltype(make(row0, panel0))> before{make(row0, panel0 * PANEL), tiles[0], 0, 0};
  int turn = 0;
  for (long p = panel0; p < panel1; ++p) {
    const char* panel = (const char*)g.packed + p * bytes;
    const char* fetch = p + 1 < panel1 ? panel + bytes : nullptr;
    for (long t = 0; t < count; ++t, turn ^= 1) {
      const long begin = t * height, first = begin + height <= rows ? begin : rows - height;
      const uint8_t* x = (const uint8_t*)g.x + (row0 + first) * ld;
      const char* w = panel + PANEL * 4;
      for (long r = 0; left && r < height; ++r) {
        __builtin_memset(rest + r * TILE_K, 0, TILE_K);
        __builtin_memcpy(rest + r * TILE_K, x + r * ld + steps * TILE_K, (size_t)left);
      }
      tile_fence();
      SAMP_TILE_LOAD(0, panel, 0);  // every row of sums begins with the correction
      SAMP_TILE_LOAD(1, panel + W * 4, 0);
      if (TWO) {
        SAMP_TILE_LOAD(2, panel, 0);
        SAMP_TILE_LOAD(3, panel + W * 4, 0);
      }
      const auto step = [&](const uint8_t* a, long ld_a) __attribute__((always_inline)) {
        SAMP_TILE_LOAD(6, w, W * 4);
        SAMP_TILE_LOAD(4, a, ld_a);
        SAMP_TILE_DOT(0, 4, 6);
        if (TWO) {
          SAMP_TILE_LOAD(5, a + high * ld_a, ld_a);
          SAMP_TILE_DOT(2, 5, 6);
        }
        SAMP_TILE_LOAD(7, w + TILE_K * W, W * 4);
        if (TWO) SAMP_TILE_DOT(3, 5, 7);
        SAMP_TILE_DOT(1, 4, 7);
        w += TILE_K * PANEL;
        if (fetch)
          for (int i = 0; i < lines; ++i, fetch += 64) __builtin_prefetch(fetch, 0, 2);
        before.finish(share);
      };
      for (long k = 0; k < steps; ++k) step(x + k * TILE_K, ld);
      if (left) step(rest, TILE_K);
      before.finish(BLOCK_ROWS);
      int32_t* tile = tiles[turn];
      SAMP_TILE_STORE(0, tile, PANEL * 4);
      SAMP_TILE_STORE(1, tile + W, PANEL * 4);
      if (TWO) {
        SAMP_TILE_STORE(2, tile + high * PANEL, PANEL * 4);
        SAMP_TILE_STORE(3, tile + high * PANEL + W, PANEL * 4);
      }
      before = {make(row0 + first, p * PANEL), tile, (int)(begin - first), height};
    }
  }
  release_tiles();
  before.finish(BLOCK_ROWS);
}

template <class Make>
SAMP_INLINE void sweep_blocks(const Gemm& g, long row0, long row1, long panel0, long panel1,
                              const Make& make) {
  if (row0 == row1 || panel0 == panel1) return;
  if (row1 - row0 > BLOCK_ROWS / 2)
    sweep_tiles<true>(g, row0, row1, panel0, panel1, make);
  else
    sweep_tiles<false>(g, row0, row1, panel0, panel1, make);
}

// Any epilogue, any columns.
struct AnyEnd {
  const Gemm* g;
  long row, col;
  void operator()(const int32_t* tile, int first, int last) const {
    finish(g->ep, tile + first * PANEL, PANEL, row + first, last - first, col, g->n);
  }
};

// The cases of an encoder, for whole panels; false: not one of them.
template <int ACT>
static bool sweep_whole(const Gemm& g, long row0, long row1, long panel0, long panel1) {
  switch (output_of(g.ep)) {
#define SAMP_CASE(TO)                                                                             \
  case TO:                                                                                        \
    sweep_blocks(g, row0, row1, panel0, panel1,                                                   \
                 [&](long row, long col) { return PanelEnd<ACT, TO, int32_t>(g.ep, row, col); }); \
    return true;
    SAMP_CASE(To::floats)
    SAMP_CASE(To::sum)
    SAMP_CASE(To::bytes)
#undef SAMP_CASE
    case To::other: break;
  }
  return false;
}

static void gemm_int8(const Gemm& g, long row0, long row1, long panel0, long panel1) {
  const long whole = g.n / PANEL < panel1 ? g.n / PANEL : panel1;
  if (panel0 < whole) {
    bool done = false;
    if (g.ep.act == Act::none) done = sweep_whole<(int)Act::none>(g, row0, row1, panel0, whole);
    if (g.ep.act == Act::gelu) done = sweep_whole<(int)Act::gelu>(g, row0, row1, panel0, whole);
    if (done) panel0 = whole;
  }
  sweep_blocks(g, row0, row1, panel0, panel1,
               [&](long row, long col) { return AnyEnd{&g, row, col}; });
}

// The int32 sums alone, for tests.
struct SumsEnd {
  int32_t* sums;  // of the block's first row and column
  long ld, columns;
  void operator()(const int32_t* tile, int first, int last) const {
    for (int r = first; r < last; ++r)
      for (long j = 0; j < PANEL && j < columns; ++j) sums[r * ld + j] = tile[r * PANEL + j];
  }
};

static void sums_int8(const Gemm& g, long row0, long row1, int32_t* sums, long ld) {
  sweep_blocks(g, row0, row1, 0, up(g.n, PANEL) / PANEL,
               [&](long row, long col) { return SumsEnd{sums + row * ld + col, ld, g.n - col}; });
}
