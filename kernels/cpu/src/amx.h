// AMX tiles, level 4 only: eight registers of 16 rows x 64 bytes, and u8 x s8 products of two of
// them into a third, 16 x 16 int32. Included by level.cc after simd.h.
//
// gcc's own intrinsics tell the compiler nothing of the memory that they read: here a configuration
// and a fence are full barriers, and the order of volatile asm keeps the rest.

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row
  uint8_t rows[16];
} TileShapes;

// A process asks the system once for the tiles (dispatch.cc); each thread shapes its own. That
// costs as much as a small product: once a call of an op. `bytes` is of a row of each tile; tiles 0
// to 3 are sums.
SAMP_INLINE void shape_tiles(const int (&rows)[8], const int (&bytes)[4]) {
  alignas(64) TileShapes t{};
  t.palette = 1;
  for (int i = 0; i < 8; ++i) {
    t.rows[i] = (uint8_t)(rows[i] ? rows[i] : 1);
    t.bytes[i] = (uint16_t)(i < 4 ? 64 : bytes[i - 4]);
  }
  asm volatile("ldtilecfg %0" : : "m"(t) : "memory");
}

// Afterwards a switch of threads has no tiles to save.
SAMP_INLINE void release_tiles() { asm volatile("tilerelease" : : : "memory"); }

SAMP_INLINE void tile_fence() { asm volatile("" : : : "memory"); }

#define SAMP_TILE_LOAD(tile, at, ld) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(at), "r"((long)(ld)))
#define SAMP_TILE_STORE(tile, at, ld) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(at), "r"((long)(ld)) : "memory")
#define SAMP_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile : :)
// sums += activations (u8) x weights (s8); each operand that stays from the product before is free.
#define SAMP_TILE_DOT(sums, x, w) asm volatile("tdpbusd %%tmm" #w ", %%tmm" #x ", %%tmm" #sums : :)
