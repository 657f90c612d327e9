// softmax(Q K^T / sqrt(d)) V inside each sequence in fp32 on the ordinary cores: what `exact`
// means.
//
// A block of 256 threads owns 64 queries of one sequence and head; four threads share a query, each
// with every fourth key and a quarter of the columns. Keys come in tiles of 32.
// Beside fp32, scores or context may be int8: integers are exact in fp32 up to 2^24, far above any
// sum here, so the result is that of integer arithmetic. An int8 context quantizes P after its
// softmax and goes through the keys twice. Unit: DIM (32, 64), SAMP_SM.
#include "attention.cuh"

constexpr int KEYS = 32, THREADS = 256, PITCH = DIM + 4, QUARTER = DIM / 4;

DEVICE void load_f32(float* to, int rows, const Attention& a, const Work& work, int first,
                     int column, float inverse) {
  for (int i = threadIdx.x; i < rows * QUARTER; i += THREADS) {
    const int row = i / QUARTER, part = i % QUARTER * 4;
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    if (first + row < work.length)
      v = load4(a.qkv, a.qkv_kind,
                static_cast<size_t>(work.begin + first + row) * a.qkv_ld + column + part);
    if (inverse != 0.0f) {
      v.x = quantized(v.x, inverse), v.y = quantized(v.y, inverse);
      v.z = quantized(v.z, inverse), v.w = quantized(v.w, inverse);
    }
    *reinterpret_cast<float4*>(to + row * PITCH + part) = v;
  }
}

// inverse_q, inverse_k; inverse_p, inverse_v: 1 / scale, or 0 where the product is fp32.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_f32(const void* qkv, int qkv_kind, int qkv_ld, int hidden, const int* bounds,
                  const int* tiles, int first_only, const float* bias, int bias_ld, int bias_center,
                  float inverse_q, float inverse_k, float score_scale, float inverse_p,
                  float inverse_v, float context_scale, void* out, int out_ld, int out_kind,
                  float inverse_scale) {
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
  load_f32(qs, QUERIES, a, work, work.query, column, inverse_q);

  float largest = -infinity(), sum = 0.0f, o[QUARTER];
#pragma unroll
  for (int d = 0; d < QUARTER; ++d) o[d] = 0.0f;
  const bool twice = inverse_p != 0.0f;
  for (int turn = 0; turn <= twice; ++turn) {
    const bool last = turn == twice, whole = twice && last;
    if (whole) {
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    }
    for (int k0 = 0; k0 < work.length; k0 += KEYS) {
      __syncthreads();
      load_f32(ks, KEYS, a, work, k0, hidden + column, inverse_k);
      if (last) load_f32(vs, KEYS, a, work, k0, 2 * hidden + column, inverse_v);
      __syncthreads();
      float s[KEYS / 4], here = largest;
#pragma unroll
      for (int j = 0; j < KEYS / 4; ++j) s[j] = 0.0f;
#pragma unroll 2
      for (int d = 0; d < DIM; d += 4) {  // Few columns at a time: they stand in registers.
        const float4 x = *reinterpret_cast<const float4*>(qs + mine * PITCH + d);
#pragma unroll
        for (int j = 0; j < KEYS / 4; ++j) {
          const float4 y = *reinterpret_cast<const float4*>(ks + (j * 4 + part) * PITCH + d);
          s[j] += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
        }
      }
#pragma unroll
      for (int j = 0; j < KEYS / 4; ++j) {
        const int key = k0 + j * 4 + part;
        s[j] = key < work.length ? s[j] * score_scale : -infinity();
        if (a.bias && key < work.length) s[j] += bias_of(a, min(query, work.length - 1), key);
        here = fmaxf(here, s[j]);
      }
      here = fmaxf(here, __shfl_xor_sync(0xffffffffu, here, 1));
      here = fmaxf(here, __shfl_xor_sync(0xffffffffu, here, 2));
      if (whole) {  // The largest score and the sum are known, so P is what it will be.
#pragma unroll
        for (int j = 0; j < KEYS / 4; ++j)
          ps[mine * (KEYS + 1) + j * 4 + part] = quantized(expf(s[j] - largest) / sum, inverse_p);
      } else {
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
      }
      if (!last) continue;
      __syncthreads();
#pragma unroll 4
      for (int key = 0; key < KEYS; ++key) {
        const float p = ps[mine * (KEYS + 1) + key];
#pragma unroll
        for (int d = 0; d < QUARTER; ++d) o[d] += p * vs[key * PITCH + part * QUARTER + d];
      }
    }
  }
  if (!twice) {
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  }
  const float each = twice ? context_scale : 1.0f / sum;
#pragma unroll
  for (int d = 0; d < QUARTER; d += 2)
    store_context(a, work, query, column + part * QUARTER + d, o[d] * each, o[d + 1] * each);
}
SAMP_KERNEL(attention_f32)
