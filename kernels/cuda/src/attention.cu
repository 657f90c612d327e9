// softmax(Q K^T / sqrt(d)) V inside each sequence, on the tensor cores, no padding.
//
// A block of four warps owns 64 queries of one sequence and head, a warp 16 of them; keys come in
// tiles of 64. Scores stay in registers: the fragment that Q K^T leaves is the one that P V reads.
// With float context the softmax is kept up to date from tile to tile (Dao et al., 2205.14135, from
// Milakov and Gimelshein, 1805.02867). Int8 context quantizes P after its softmax, as `reference`
// defines it, so the keys are gone through twice: once for the largest score and the sum.
//
// int8 P: a thread holds keys 2t, 2t+1 of two neighbouring score tiles, and the product wants four
// keys in a row. Sums do not mind the order, so V is stored in the order in which P lies.
//
// Unit: DIM (32, 64), SCORES_INT8, CONTEXT_INT8, FLOATS (F16 or BF16: what is not int8), SAMP_SM.
#include "attention.cuh"
#include "mma.cuh"

constexpr int KEYS = 64, THREADS = 128;
constexpr int QK_BYTES = DIM * (SCORES_INT8 ? 1 : 2);
// 16 bytes more than a power of two: eight rows at one column fill all banks.
constexpr int QK_PITCH = QK_BYTES + 16;
constexpr int V_PITCH = (CONTEXT_INT8 ? KEYS : DIM * 2) + 16;
constexpr int STEPS = QK_BYTES / 32, NS = KEYS / 8, DS = DIM / 8;
constexpr float LOG2E = 1.44269504f;

typedef Of<FLOATS>::Element Half;
typedef Of<SCORES_INT8 ? S8 : FLOATS> Scores;
typedef Of<CONTEXT_INT8 ? S8 : FLOATS> Context;

// Place of a key in a row of int8 V: within 16, key 8h + 2t + b lies at 4t + 2h + b.
DEVICE int place_of(int key) {
  return (key & ~15) | (key >> 1 & 3) << 2 | (key >> 3 & 1) << 1 | (key & 1);
}

// Rows `first` to first + 63 of the sequence, DIM columns from `column` on; zeros behind its end.
template <bool INT8, bool TRANSPOSED>
DEVICE void load_rows(unsigned char* to, int pitch, const Attention& a, const Work& work, int first,
                      int column, float inverse) {
#pragma unroll
  for (int i = threadIdx.x; i < 64 * (DIM / 8); i += THREADS) {
    const int row = i / (DIM / 8), part = i % (DIM / 8) * 8;
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f}, w = v;
    if (first + row < work.length) {
      const size_t at = static_cast<size_t>(work.begin + first + row) * a.qkv_ld + column + part;
      v = load4(a.qkv, a.qkv_kind, at), w = load4(a.qkv, a.qkv_kind, at + 4);
    }
    if (INT8) {
      const float eight[8] = {v.x, v.y, v.z, v.w, w.x, w.y, w.z, w.w};
      int q[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) q[e] = quantized(eight[e], inverse);
      if (TRANSPOSED) {
#pragma unroll
        for (int e = 0; e < 8; ++e) to[(part + e) * pitch + place_of(row)] = q[e];
      } else {
        unsigned* words = reinterpret_cast<unsigned*>(to + row * pitch + part);
        words[0] = pack_bytes(q[0], q[1], q[2], q[3]);
        words[1] = pack_bytes(q[4], q[5], q[6], q[7]);
      }
    } else {
      uint4 halves;
      halves.x = packed(Half(), v.x, v.y), halves.y = packed(Half(), v.z, v.w);
      halves.z = packed(Half(), w.x, w.y), halves.w = packed(Half(), w.z, w.w);
      *reinterpret_cast<uint4*>(to + row * pitch + part * 2) = halves;
    }
  }
}

// A warp's 16 x 64 scores times log2(e), -inf behind the sequence's end.
DEVICE void multiply_keys(float (&s)[NS][4], const unsigned (&q)[STEPS][4], const unsigned char* ks,
                          const Attention& a, const Work& work, int query, int k0, float scale) {
  const int lane = threadIdx.x % 32;
  Scores::Sum sums[NS][4];
#pragma unroll
  for (int j = 0; j < NS; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[j][e] = 0;
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int j = 0; j < NS; j += 2) {
      unsigned b[4];
      const int row = j * 8 + lane / 16 * 8 + lane % 8;
      load_tiles(b, ks + row * QK_PITCH + (step * 2 + lane / 8 % 2) * 16);
      mma(Scores::Element(), sums[j], q[step], b);
      mma(Scores::Element(), sums[j + 1], q[step], b + 2);
    }
#pragma unroll
  for (int j = 0; j < NS; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = k0 + j * 8 + lane % 4 * 2 + e % 2;
      float x = static_cast<float>(sums[j][e]) * scale;
      if (a.bias && key < work.length)
        x += bias_of(a, min(query + lane / 4 + e / 2 * 8, work.length - 1), key);
      s[j][e] = key < work.length ? x * LOG2E : -infinity();
    }
}

DEVICE float of_quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
DEVICE float of_quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Scores to exp2(score - largest so far); gives the factor by which what came before shrinks.
DEVICE float soften(float (&s)[NS][4], int half, float& largest, float& sum) {
  float here = largest;
#pragma unroll
  for (int j = 0; j < NS; ++j) here = fmaxf(here, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
  here = of_quad_max(here);
  const float shrink = fast_exp2(largest - here);
  float more = 0.0f;
#pragma unroll
  for (int j = 0; j < NS; ++j)
#pragma unroll
    for (int e = 2 * half; e < 2 * half + 2; ++e) {
      s[j][e] = fast_exp2(s[j][e] - here);
      more += s[j][e];
    }
  largest = here;
  sum = sum * shrink + more;
  return shrink;
}

extern "C" __global__ void __launch_bounds__(THREADS, SAMP_SM >= 80 ? 4 : 3)
    attention(const void* qkv, int qkv_kind, int qkv_ld, int hidden, const int* bounds,
              const int* tiles, int first_only, const float* bias, int bias_ld, int bias_center,
              float inverse_q, float inverse_k, float score_scale, float inverse_p, float inverse_v,
              float context_scale, void* out, int out_ld, int out_kind, float inverse_scale) {
  SAMP_SHARED(shared);
  unsigned char* qs = shared;
  unsigned char* ks = qs + QUERIES * QK_PITCH;
  unsigned char* vs = ks + KEYS * QK_PITCH;
  const Attention a{qkv,  qkv_kind, qkv_ld,      hidden, bounds, tiles,    first_only,
                    bias, bias_ld,  bias_center, out,    out_ld, out_kind, inverse_scale};
  Work work;
  if (!find_work(a, work)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int query = work.query + warp * 16, column = blockIdx.y * DIM;

  load_rows<SCORES_INT8, false>(qs, QK_PITCH, a, work, work.query, column, inverse_q);
  __syncthreads();
  unsigned q[STEPS][4];
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
    load_tiles(q[step], qs + (warp * 16 + lane % 16) * QK_PITCH + (step * 2 + lane / 16) * 16);

  float s[NS][4], largest[2] = {-infinity(), -infinity()}, sum[2] = {0.0f, 0.0f};
  Context::Sum o[DS][4];
#pragma unroll
  for (int d = 0; d < DS; ++d)
#pragma unroll
    for (int e = 0; e < 4; ++e) o[d][e] = 0;

#if CONTEXT_INT8
  for (int k0 = 0; k0 < work.length; k0 += KEYS) {
    __syncthreads();
    load_rows<SCORES_INT8, false>(ks, QK_PITCH, a, work, k0, hidden + column, inverse_k);
    __syncthreads();
    multiply_keys(s, q, ks, a, work, query, k0, score_scale);
#pragma unroll
    for (int half = 0; half < 2; ++half) soften(s, half, largest[half], sum[half]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) sum[half] = of_quad_sum(sum[half]);
#endif

  for (int k0 = 0; k0 < work.length; k0 += KEYS) {
    __syncthreads();
    load_rows<SCORES_INT8, false>(ks, QK_PITCH, a, work, k0, hidden + column, inverse_k);
    load_rows<CONTEXT_INT8, CONTEXT_INT8>(vs, V_PITCH, a, work, k0, 2 * hidden + column, inverse_v);
    __syncthreads();
    multiply_keys(s, q, ks, a, work, query, k0, score_scale);
#if CONTEXT_INT8
#pragma unroll
    for (int half = 0; half < KEYS / 32; ++half) {
      unsigned p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // i % 2: the row's half, i / 2: which 16 keys
        const int j = half * 4 + i / 2 * 2, e = i % 2 * 2;
        const float top = largest[i % 2], each = 1.0f / sum[i % 2];
        p[i] = pack_bytes(quantized(fast_exp2(s[j][e] - top) * each, inverse_p),
                          quantized(fast_exp2(s[j][e + 1] - top) * each, inverse_p),
                          quantized(fast_exp2(s[j + 1][e] - top) * each, inverse_p),
                          quantized(fast_exp2(s[j + 1][e + 1] - top) * each, inverse_p));
      }
#pragma unroll
      for (int d = 0; d < DS; d += 2) {
        unsigned b[4];
        const int row = d * 8 + lane / 16 * 8 + lane % 8;
        load_tiles(b, vs + row * V_PITCH + (half * 2 + lane / 8 % 2) * 16);
        mma(Context::Element(), o[d], p, b);
        mma(Context::Element(), o[d + 1], p, b + 2);
      }
    }
#else
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float shrink = soften(s, half, largest[half], sum[half]);
#pragma unroll
      for (int d = 0; d < DS; ++d) o[d][2 * half] *= shrink, o[d][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int j = 0; j < NS; j += 2) {
      const unsigned p[4] = {packed(Half(), s[j][0], s[j][1]), packed(Half(), s[j][2], s[j][3]),
                             packed(Half(), s[j + 1][0], s[j + 1][1]),
                             packed(Half(), s[j + 1][2], s[j + 1][3])};
#pragma unroll
      for (int d = 0; d < DS; d += 2) {
        unsigned b[4];
        const int key = j * 8 + lane / 8 % 2 * 8 + lane % 8;
        load_tiles_transposed(b, vs + key * V_PITCH + (d * 8 + lane / 16 * 8) * 2);
        mma(Context::Element(), o[d], p, b);
        mma(Context::Element(), o[d + 1], p, b + 2);
      }
    }
#endif
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#if CONTEXT_INT8
    const float each = context_scale;
#else
    const float each = 1.0f / of_quad_sum(sum[half]);
#endif
#pragma unroll
    for (int d = 0; d < DS; ++d)
      store_context(a, work, query + lane / 4 + half * 8, column + d * 8 + lane % 4 * 2,
                    static_cast<float>(o[d][2 * half]) * each,
                    static_cast<float>(o[d][2 * half + 1]) * each);
  }
}
SAMP_KERNEL(attention)
