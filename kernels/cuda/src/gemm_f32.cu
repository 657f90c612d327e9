// y = epilogue(x W^T) in fp32 on the ordinary cores (no TF32): what `exact` means.
//
// A block of 256 threads owns 64 x 64 of y, each thread 4 x 4; k runs in steps of 16 through shared
// memory, transposed there so that a thread reads its four values at once. Unit: SAMP_SM.
#include "epilogue.cuh"

constexpr int TILE = 64, DEPTH = 16, PITCH = TILE + 4;

// ld in elements, a multiple of 4; the arguments are those of gemm.cu.
extern "C" __global__ void __launch_bounds__(256)
    gemm_f32(const float* x, int x_ld, const float* w, int w_ld, int w_rows, int k,
             const float* bias, int activation, const void* residual, const int* residual_rows,
             int residual_ld, int residual_kind, void* out, int out_ld, int out_kind,
             float inverse_scale, int rows, int width) {
  SAMP_SHARED(shared);
  float* xs = reinterpret_cast<float*>(shared);  // [DEPTH][PITCH]
  float* ws = xs + DEPTH * PITCH;
  const int m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 4;      // of a copy
  const int y = threadIdx.x / 16 * 4, across = threadIdx.x % 16 * 4;  // of the sums
  float sums[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;

  for (int k0 = 0; k0 < k; k0 += DEPTH) {
    float4 left = {0.0f, 0.0f, 0.0f, 0.0f}, right = left;
    if (m0 + row < rows)
      left =
          *reinterpret_cast<const float4*>(x + static_cast<size_t>(m0 + row) * x_ld + k0 + column);
    if (n0 + row < w_rows)
      right =
          *reinterpret_cast<const float4*>(w + static_cast<size_t>(n0 + row) * w_ld + k0 + column);
    const float lefts[4] = {left.x, left.y, left.z, left.w};
    const float rights[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool inside = k0 + column + i < k;  // What pads a row is never read as a number.
      xs[(column + i) * PITCH + row] = inside ? lefts[i] : 0.0f;
      ws[(column + i) * PITCH + row] = inside ? rights[i] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const float4 a = *reinterpret_cast<const float4*>(xs + d * PITCH + y);
      const float4 b = *reinterpret_cast<const float4*>(ws + d * PITCH + across);
      const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += as[i] * bs[j];
    }
    __syncthreads();
  }
  const Epilogue to{nullptr,       nullptr,       bias,          activation, residual,
                    residual_rows, residual_ld,   residual_kind, out,        out_ld,
                    out_kind,      inverse_scale, rows,          width};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    finish(to, m0 + y + i, n0 + across, {sums[i][0], sums[i][1], sums[i][2], sums[i][3]});
}
SAMP_KERNEL(gemm_f32)
