// y = epilogue(x W^T): x [rows, k], W [width, k], both int8, fp16, bf16 or e4m3, on the tensor
// cores.
//
// A block owns TILE_M x TILE_N of y. k runs in slices of 128 bytes, the same for all types: STAGES
// slices are in flight. The sums of an element run over k in one order whatever the tile, so a row
// of y does not depend on how many rows there are; only int8, whose sums are exact, may split k
// over blocks.
//
// Unit: ELEMENT (S8, F16, BF16, E4M3), TILE_M, TILE_N, WARPS_M, WARPS_N, STAGES, SAMP_SM.
#include "mma.cuh"
#include "slices.cuh"

typedef Of<ELEMENT>::Element Element;
typedef Of<ELEMENT>::Sum Sum;

constexpr int THREADS = 32 * WARPS_M * WARPS_N;
// sm_90 multiplies e4m3 as fp16 here, and unrolled conversions take too many registers; the largest
// tile of bytes has no room for two blocks there. Its own way for both is wgmma.
constexpr bool CONVERTS = ELEMENT == E4M3 && SAMP_SM == 90;
constexpr bool ROOMY =
    SAMP_SM == 90 && TILE_M * TILE_N == 128 * 128 && (ELEMENT == S8 || ELEMENT == E4M3);
// Of one multiprocessor, at least.
constexpr int BLOCKS = SAMP_SM >= 80 ? (ROOMY ? 384 : 512) / THREADS : 1;
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * SLICE;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr int MS = WARP_M / 16, NS = WARP_N / 8;
static_assert(NS % 2 == 0, "B is read two tiles of 8 columns at a time");
static_assert(TILE_M % (THREADS / 8) == 0 && TILE_N % (THREADS / 8) == 0, "whole copies");

// Not from a cache that may hold an older value.
DEVICE int read_again(const volatile int* from) { return *from; }

// ld in bytes. partial [splits, rows, width] and arrived [blocks of y], zero before and after, are
// read only where splits > 1.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    gemm(const unsigned char* x, int x_ld, const unsigned char* w, int w_ld, int w_rows,
         int k_bytes, const float* row_scale, const float* column_scale, const float* bias,
         int activation, const void* residual, const int* residual_rows, int residual_ld,
         int residual_kind, void* out, int out_ld, int out_kind, float inverse_scale, int rows,
         int width, int splits, int* partial, unsigned* arrived) {
  SAMP_SHARED(shared);
  const int m0 = blockIdx.y * TILE_M, n0 = blockIdx.x * TILE_N;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
  const int all = (k_bytes + SLICE - 1) / SLICE;
  const int each = (all + splits - 1) / splits;
  const int begin = min(all, static_cast<int>(blockIdx.z) * each), end = min(all, begin + each);

  Sum sums[MS][NS][4];
#pragma unroll
  for (int i = 0; i < MS; ++i)
#pragma unroll
    for (int j = 0; j < NS; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;

  auto fetch = [&](int slice) {
    if (slice < end) {
      unsigned char* stage = shared + (slice - begin) % STAGES * STAGE_BYTES;
      copy_slice<TILE_M, THREADS>(threadIdx.x, stage, x, m0, rows, x_ld, slice * SLICE, k_bytes);
      copy_slice<TILE_N, THREADS>(threadIdx.x, stage + TILE_M * SLICE, w, n0, w_rows, w_ld,
                                  slice * SLICE, k_bytes);
    }
    commit_copies();  // Also an empty group: the waits below count groups.
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) fetch(begin + stage);

  for (int slice = begin; slice < end; ++slice) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    fetch(slice + STAGES - 1);  // Into the stage that all warps have left.
    const unsigned char* xs = shared + (slice - begin) % STAGES * STAGE_BYTES;
    const unsigned char* ws = xs + TILE_M * SLICE;
#pragma unroll(CONVERTS ? 1 : SLICE / 32)
    for (int step = 0; step < SLICE / 32; ++step) {
      unsigned a[MS][4], b[NS][2];
#pragma unroll
      for (int i = 0; i < MS; ++i)
        load_tiles(a[i], xs + place(warp_m + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < NS; j += 2) {
        unsigned four[4];
        const int row = warp_n + j * 8 + lane / 16 * 8 + lane % 8;
        load_tiles(four, ws + place(row, step * 2 + lane / 8 % 2));
        b[j][0] = four[0], b[j][1] = four[1], b[j + 1][0] = four[2], b[j + 1][1] = four[3];
      }
#pragma unroll
      for (int i = 0; i < MS; ++i)
#pragma unroll
        for (int j = 0; j < NS; ++j) mma(Element(), sums[i][j], a[i], b[j]);
    }
  }
  wait_copies<0>();

  __syncthreads();
  Sum* tile = reinterpret_cast<Sum*>(shared);  // [TILE_M][TILE_N]
#pragma unroll
  for (int i = 0; i < MS; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_m + i * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < NS; ++j) {
        Sum* to = tile + row * TILE_N + mixed(row, warp_n + j * 8 + lane % 4 * 2);
        *reinterpret_cast<Pair<Sum>*>(to) =
            Pair<Sum>{sums[i][j][2 * half], sums[i][j][2 * half + 1]};
      }
    }
  __syncthreads();
  if (ELEMENT == S8 && splits > 1) {
    // Whoever comes last adds what all have left. int32: the order does not matter.
    for (int i = threadIdx.x * 4; i < TILE_M * TILE_N; i += THREADS * 4) {
      const int row = i / TILE_N, column = i % TILE_N;
      if (m0 + row >= rows || n0 + column >= width) continue;
      const size_t at = (static_cast<size_t>(blockIdx.z) * rows + m0 + row) * width + n0 + column;
      *reinterpret_cast<uint4*>(partial + at) =
          *reinterpret_cast<const uint4*>(tile + row * TILE_N + mixed(row, column));
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* here = arrived + blockIdx.y * gridDim.x + blockIdx.x;
      tile[0] = atomicAdd(here, 1u) == static_cast<unsigned>(splits - 1);
      if (tile[0]) *here = 0;
    }
    __syncthreads();
    const bool last = tile[0];
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int i = threadIdx.x * 4; i < TILE_M * TILE_N; i += THREADS * 4) {
      const int row = i / TILE_N, column = i % TILE_N;
      if (m0 + row >= rows || n0 + column >= width) continue;
      int four[4] = {0, 0, 0, 0};
      for (int z = 0; z < splits; ++z) {
        const size_t at = (static_cast<size_t>(z) * rows + m0 + row) * width + n0 + column;
#pragma unroll
        for (int e = 0; e < 4; ++e) four[e] += read_again(partial + at + e);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) tile[row * TILE_N + mixed(row, column) + e] = four[e];
    }
    __syncthreads();
  }

  const Epilogue to{row_scale,     column_scale,  bias,          activation, residual,
                    residual_rows, residual_ld,   residual_kind, out,        out_ld,
                    out_kind,      inverse_scale, rows,          width};
  finish_tile<TILE_M, TILE_N, THREADS>(to, tile, m0, n0);
}
SAMP_KERNEL(gemm)
