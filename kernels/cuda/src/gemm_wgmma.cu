// gemm.cu for sm_90a: by warpgroups, which read their operands from shared memory.
//
// The last four warps copy, the others multiply: warpgroup g owns rows 64 g to 64 g + 63 of the
// block's TILE_M x TILE_N. Slices of 128 bytes of k go round through STAGES places; `full` says
// that a place holds its slice, `empty` that all have left it. The weight comes in tile order
// (ops.in_tiles): 128 rows of a slice are 16 KiB in a row, swizzled, one bulk copy (the half of it
// for a tile of 64 columns). The rows of x come in 16-byte copies, which need no descriptor that a
// driver encodes and end at any row; since products read through another proxy, their thread fences
// them before it says so. Sums of an element run over k in one order in every tile, so a row
// depends on no other.
//
// Unit: ELEMENT (S8, E4M3, F16, BF16), TILE_M (64, 128), TILE_N (64, 128, 256), STAGES, SAMP_SM.
#include "hopper.cuh"
#include "slices.cuh"

typedef Of<ELEMENT>::Element Element;
typedef Of<ELEMENT>::Sum Sum;

constexpr int GROUPS = TILE_M / 64, COPIERS = 128, THREADS = GROUPS * 128 + COPIERS;
constexpr int BLOCK_ROWS = 128, BLOCK_BYTES = BLOCK_ROWS * SLICE;  // Of the weight.
// Columns of one product, which are rows of one copy; and how many of them a tile has.
constexpr int PART = TILE_N < BLOCK_ROWS ? TILE_N : BLOCK_ROWS, PART_BYTES = PART * SLICE;
constexpr int NS = TILE_N / PART;
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * SLICE;
// Slices whose copies are under way. A group lets go of a slice only when it has the next, so two
// places more than these must be there.
constexpr int LEAD = STAGES / 2;
static_assert(LEAD + 2 <= STAGES, "the copies would wait for the products, and these for them");
static_assert(TILE_M * TILE_N * 4 <= STAGES * STAGE_BYTES, "sums take the slices' place");

// x_ld in bytes; w [blocks of 128 rows][slices][128][128 bytes].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gemm_wgmma(const unsigned char* x, int x_ld, const unsigned char* w, int w_rows, int k_bytes,
               const float* row_scale, const float* column_scale, const float* bias, int activation,
               const void* residual, const int* residual_rows, int residual_ld, int residual_kind,
               void* out, int out_ld, int out_kind, float inverse_scale, int rows, int width) {
  SAMP_SHARED(shared);
  u64* full = reinterpret_cast<u64*>(shared + STAGES * STAGE_BYTES);
  u64* empty = full + STAGES;
  const int m0 = blockIdx.y * TILE_M, n0 = blockIdx.x * TILE_N;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slices = (k_bytes + SLICE - 1) / SLICE;
  if (threadIdx.x == 0) {
    if (shared_address(shared) % 1024) __trap();  // The swizzle counts from there.
    for (int stage = 0; stage < STAGES; ++stage) {
      init_barrier(full + stage, COPIERS + 1);
      init_barrier(empty + stage, GROUPS * 4);
    }
    fence_async();
  }
  __syncthreads();

  Sum* tile = reinterpret_cast<Sum*>(shared);  // [TILE_M][TILE_N], after the last slice
  if (warp >= GROUPS * 4) {
    const int thread = threadIdx.x - GROUPS * 128;
    const int parts = min(NS, (w_rows - n0 + PART - 1) / PART);
    for (int slice = 0; slice < slices + LEAD; ++slice) {
      if (slice < slices) {
        const int at = slice % STAGES;
        unsigned char* stage = shared + at * STAGE_BYTES;
        wait_barrier(empty + at, slice / STAGES & 1 ^ 1);
        if (thread == 0) {
          arrive_expecting(full + at, parts * PART_BYTES);
          for (int p = 0; p < parts; ++p) {
            const int row = n0 + p * PART;
            const size_t block = static_cast<size_t>(row / BLOCK_ROWS) * slices + slice;
            bulk_copy(stage + TILE_M * SLICE + p * PART_BYTES,
                      w + block * BLOCK_BYTES + row % BLOCK_ROWS * SLICE, PART_BYTES, full + at);
          }
        }
        copy_slice<TILE_M, COPIERS>(thread, stage, x, m0, rows, x_ld, slice * SLICE, k_bytes);
      }
      commit_copies();  // Also an empty group: the wait counts groups.
      if (slice >= LEAD) {
        wait_copies<LEAD>();
        fence_async();
        arrive(full + (slice - LEAD) % STAGES);
      }
    }
    wait_copies<0>();
    __syncthreads();
  } else {
    const int group = warp / 4;
    Sum sums[NS][PART / 2];
#pragma unroll
    for (int j = 0; j < NS; ++j)
#pragma unroll
      for (int e = 0; e < PART / 2; ++e) sums[j][e] = 0;
    for (int slice = 0; slice < slices; ++slice) {
      const int at = slice % STAGES;
      const unsigned char* stage = shared + at * STAGE_BYTES;
      wait_barrier(full + at, slice / STAGES & 1);
      const u64 a = describe(stage + group * 64 * SLICE), b = describe(stage + TILE_M * SLICE);
      begin_products();
#pragma unroll
      for (int step = 0; step < SLICE / 32; ++step)
#pragma unroll
        for (int j = 0; j < NS; ++j)
          multiply(Element(), sums[j], a + step * 2, b + j * (PART_BYTES >> 4) + step * 2);
      commit_products();
      wait_products<1>();  // Those of the slice before.
      if (slice > 0 && lane == 0) arrive(empty + (slice - 1) % STAGES);
    }
    wait_products<0>();
#pragma unroll
    for (int j = 0; j < NS; ++j)
#pragma unroll
      for (int e = 0; e < PART / 2; ++e) settle(sums[j][e]);
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < TILE_N / 8; ++j) {
        Sum* to = tile + row * TILE_N + mixed(row, j * 8 + lane % 4 * 2);
        const Sum* from = sums[j / (PART / 8)] + j % (PART / 8) * 4 + half * 2;
        *reinterpret_cast<Pair<Sum>*>(to) = Pair<Sum>{from[0], from[1]};
      }
    }
  }
  __syncthreads();
  const Epilogue to{row_scale,     column_scale,  bias,          activation, residual,
                    residual_rows, residual_ld,   residual_kind, out,        out_ld,
                    out_kind,      inverse_scale, rows,          width};
  finish_tile<TILE_M, TILE_N, THREADS>(to, tile, m0, n0);
}
SAMP_KERNEL(gemm_wgmma)
