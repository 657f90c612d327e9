// softmax(Q K^T / sqrt(d)) V inside each sequence in fp32 on the ordinary cores: what `exact`
// means.
//
// A block of 256 threads owns 64 queries of one sequence and head; four threads share a query, each
// with every fourth key and a quarter of the columns. Keys come in tiles of 32.
// Unit: DIM (32, 64), SAMP_SM.
#include "attention.cuh"

constexpr int KEYS = 32, THREADS = 256, PITCH = DIM + 4, QUARTER = DIM / 4;

DEVICE void load_f32(float* to, int rows, const Attention& a, const Work& work, int first,
                     int column) {
  for (int i = threadIdx.x; i < rows * QUARTER; i += THREADS) {
    const int row = i / QUARTER, part = i % QUARTER * 4;
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    if (first + row < work.length)
      v = load4(a.qkv, a.qkv_kind,
                static_cast<size_t>(work.begin + first + row) * a.qkv_ld + column + part);
    *reinterpret_cast<float4*>(to + row * PITCH + part) = v;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_f32(const void* qkv, int qkv_kind, int qkv_ld, int hidden, const int* bounds,
                  const int* tiles, int first_only, const float* bias, int bias_ld, int bias_center,
                  float score_scale, void* out, int out_ld, int out_kind, float inverse_scale) {
  SAMP_SHARED(shared);
  float* qs = reinterpret_cast<float*>(shared);  // [QUERIES][PITCH]
  float* ks = qs + QUERIES * PITCH;              // [KEYS][PITCH]
  float* vs = ks + KEYS * PITCH;
  float* ps = vs + KEYS * PITCH;  // [QUERIES][KEYS + 1]
  const Attention a{qkv,  qkv_kind, qkv_ld,      hidden, bounds, tiles,    first_only,
                    bias, bias_ld,  bias_center, out,    out_ld, out_kind, inverse_scale};
  Work work;
  if (!find_work(a, work)) return;
  const int mine = threadIdx.x / 4, part = threadIdx.x % 4, column = blockIdx.y * DIM;
  const int query = work.query + mine;
  load_f32(qs, QUERIES, a, work, work.query, column);

  float largest = -infinity(), sum = 0.0f, o[QUARTER];
#pragma unroll
  for (int d = 0; d < QUARTER; ++d) o[d] = 0.0f;
  for (int k0 = 0; k0 < work.length; k0 += KEYS) {
    __syncthreads();
    load_f32(ks, KEYS, a, work, k0, hidden + column);
    load_f32(vs, KEYS, a, work, k0, 2 * hidden + column);
    __syncthreads();
    float s[KEYS / 4], here = largest;
#pragma unroll
    for (int j = 0; j < KEYS / 4; ++j) {
      const int key = j * 4 + part;
      float dot = 0.0f;
#pragma unroll
      for (int d = 0; d < DIM; d += 4) {
        const float4 x = *reinterpret_cast<const float4*>(qs + mine * PITCH + d);
        const float4 y = *reinterpret_cast<const float4*>(ks + key * PITCH + d);
        dot += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
      }
      dot *= score_scale;
      if (k0 + key >= work.length) {
        dot = -infinity();
      } else if (a.bias) {
        dot += bias_of(a, min(query, work.length - 1), k0 + key);
      }
      s[j] = dot;
      here = fmaxf(here, dot);
    }
    here = fmaxf(here, __shfl_xor_sync(0xffffffffu, here, 1));
    here = fmaxf(here, __shfl_xor_sync(0xffffffffu, here, 2));
    const float shrink = expf(largest - here);
    largest = here;
    sum *= shrink;
#pragma unroll
    for (int d = 0; d < QUARTER; ++d) o[d] *= shrink;
#pragma unroll
    for (int j = 0; j < KEYS / 4; ++j) {
      const float p = expf(s[j] - here);
      sum += p;
      ps[mine * (KEYS + 1) + j * 4 + part] = p;
    }
    __syncthreads();
    for (int key = 0; key < KEYS; ++key) {
      const float p = ps[mine * (KEYS + 1) + key];
#pragma unroll
      for (int d = 0; d < QUARTER; ++d) o[d] += p * vs[key * PITCH + part * QUARTER + d];
    }
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
#pragma unroll
  for (int d = 0; d < QUARTER; d += 2)
    store_context(a, work, query, column + part * QUARTER + d, o[d] / sum, o[d + 1] / sum);
}
SAMP_KERNEL(attention_f32)
