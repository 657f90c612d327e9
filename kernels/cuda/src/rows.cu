// What is done row by row: layer norm with a residual, the embeddings, quantization, pooling.
//
// A block of 128 threads owns one row. Its values stand in shared memory, so a row is read once
// whatever its width; mean and variance are two passes over them. Widths are padded to multiples of
// 16 in memory, so four neighbours are always read and written at once. Unit: SAMP_SM.
#include "copy.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;

struct Sums {
  static DEVICE float join(float a, float b) { return a + b; }
};
struct Largest {
  static DEVICE float join(float a, float b) { return a < b ? b : a; }
};

// Of all threads, in one fixed order; `room` holds WARPS floats and is free again afterwards.
template <class Op>
DEVICE float reduce(float x, float* room) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = Op::join(x, __shfl_xor_sync(0xffffffffu, x, step));
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  x = room[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) x = Op::join(x, room[w]);
  __syncthreads();
  return x;
}

// Where a row goes: floats, a copy in fp16 or bf16, and its quantized form (int8 or e4m3) with one
// static scale or, in `token_scale`, a scale of its own; each where its pointer is not null.
struct Target {
  void* floats;
  int floats_kind;
  void* halves;
  int halves_kind;
  signed char* integers;
  int integers_kind;
  float inverse_scale;
  float* token_scale;
  int ld;
};

// The row in `values` [round up 4 of width] to its target; what pads it is zero.
DEVICE void write_row(const float* values, int width, size_t row, const Target& to, float* room) {
  float inverse = to.inverse_scale;
  if (to.integers && to.token_scale) {
    float largest = 0.0f;
    for (int i = threadIdx.x; i < width; i += THREADS)
      largest = Largest::join(largest, fabsf(values[i]));
    const float scale = fmaxf(reduce<Largest>(largest, room), 1e-30f) /
                        (to.integers_kind == E4M3 ? 448.0f : 127.0f);
    inverse = 1.0f / scale;
    if (threadIdx.x == 0) to.token_scale[row] = scale;
  }
  for (int i = threadIdx.x * 4; i < to.ld; i += THREADS * 4) {
    float4 v;
    v.x = i < width ? values[i] : 0.0f, v.y = i + 1 < width ? values[i + 1] : 0.0f;
    v.z = i + 2 < width ? values[i + 2] : 0.0f, v.w = i + 3 < width ? values[i + 3] : 0.0f;
    const size_t at = row * to.ld + i;
    if (to.floats) store4(to.floats, to.floats_kind, at, v);
    if (to.halves) store4(to.halves, to.halves_kind, at, v);
    if (to.integers)
      *reinterpret_cast<unsigned*>(to.integers + at) = quantized4(to.integers_kind, v, inverse);
  }
}

DEVICE void normalize(float* values, int width, const float* gamma, const float* beta, float eps,
                      float* room) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < width; i += THREADS) sum += values[i];
  const float mean = reduce<Sums>(sum, room) / width;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < width; i += THREADS) {
    const float apart = values[i] - mean;
    squares += apart * apart;
  }
  const float scale = rsqrtf(reduce<Sums>(squares, room) / width + eps);
  for (int i = threadIdx.x; i < width; i += THREADS)
    values[i] = (values[i] - mean) * scale * gamma[i] + beta[i];
  __syncthreads();
}

// LN(x + residual). x [rows, x_ld]; residual the same, or null; ld of both targets: out_ld.
extern "C" __global__ void __launch_bounds__(THREADS)
    layernorm(const void* x, int x_kind, int x_ld, const void* residual, int residual_kind,
              int residual_ld, const float* gamma, const float* beta, float eps, int width,
              void* floats, int floats_kind, void* halves, int halves_kind, signed char* integers,
              int integers_kind, float inverse_scale, float* token_scale, int out_ld) {
  SAMP_SHARED(shared);
  float* room = reinterpret_cast<float*>(shared);
  float* values = room + 32;
  const size_t row = blockIdx.x;
  for (int i = threadIdx.x * 4; i < width; i += THREADS * 4) {
    float4 v = load4(x, x_kind, row * x_ld + i);
    if (residual) {
      const float4 r = load4(residual, residual_kind, row * residual_ld + i);
      v.x += r.x, v.y += r.y, v.z += r.z, v.w += r.w;
    }
    *reinterpret_cast<float4*>(values + i) = v;
  }
  __syncthreads();
  normalize(values, width, gamma, beta, eps, room);
  const Target to{floats,        floats_kind,   halves,      halves_kind, integers,
                  integers_kind, inverse_scale, token_scale, out_ld};
  write_row(values, width, row, to, room);
}
SAMP_KERNEL(layernorm)

// LN(word[id] + position[place] + type[kind]); tables fp32 with ld `table_ld`.
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(const int* ids, const int* kinds, const int* places, const float* word,
          const float* position, const float* type, int table_ld, const float* gamma,
          const float* beta, float eps, int width, void* floats, int floats_kind, void* halves,
          int halves_kind, signed char* integers, int integers_kind, float inverse_scale,
          float* token_scale, int out_ld) {
  SAMP_SHARED(shared);
  float* room = reinterpret_cast<float*>(shared);
  float* values = room + 32;
  const size_t row = blockIdx.x;
  const float* tables[3] = {word + static_cast<size_t>(ids[row]) * table_ld,
                            position + static_cast<size_t>(places[row]) * table_ld,
                            type + static_cast<size_t>(kinds[row]) * table_ld};
  for (int i = threadIdx.x * 4; i < width; i += THREADS * 4) {
    const float4 a = load4(tables[0], F32, i), b = load4(tables[1], F32, i);
    const float4 c = load4(tables[2], F32, i);
    float4 v;
    v.x = a.x + b.x + c.x, v.y = a.y + b.y + c.y, v.z = a.z + b.z + c.z, v.w = a.w + b.w + c.w;
    *reinterpret_cast<float4*>(values + i) = v;
  }
  __syncthreads();
  normalize(values, width, gamma, beta, eps, room);
  const Target to{floats,        floats_kind,   halves,      halves_kind, integers,
                  integers_kind, inverse_scale, token_scale, out_ld};
  write_row(values, width, row, to, room);
}
SAMP_KERNEL(embed)

// A float array to another kind; int8 and e4m3 with a static scale or one a token.
extern "C" __global__ void __launch_bounds__(THREADS)
    convert(const void* x, int x_kind, int x_ld, int width, void* floats, int floats_kind,
            void* halves, int halves_kind, signed char* integers, int integers_kind,
            float inverse_scale, float* token_scale, int out_ld) {
  SAMP_SHARED(shared);
  float* room = reinterpret_cast<float*>(shared);
  float* values = room + 32;
  const size_t row = blockIdx.x;
  for (int i = threadIdx.x * 4; i < width; i += THREADS * 4)
    *reinterpret_cast<float4*>(values + i) = load4(x, x_kind, row * x_ld + i);
  __syncthreads();
  const Target to{floats,        floats_kind,   halves,      halves_kind, integers,
                  integers_kind, inverse_scale, token_scale, out_ld};
  write_row(values, width, row, to, room);
}
SAMP_KERNEL(convert)

// One row a sequence: its first, or the mean of all (fp32 sums in the order of the tokens).
// Sequences of no tokens, which pad a batch, give zeros.
extern "C" __global__ void __launch_bounds__(THREADS)
    pool(const void* x, int x_kind, int x_ld, const int* bounds, int mean, int width, float* out,
         int out_ld) {
  const int sequence = blockIdx.x;
  const int begin = bounds[sequence], end = mean ? bounds[sequence + 1] : begin + 1;
  for (int i = threadIdx.x * 4; i < width; i += THREADS * 4) {
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int row = begin; row < end && bounds[sequence + 1] > begin; ++row) {
      const float4 v = load4(x, x_kind, static_cast<size_t>(row) * x_ld + i);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const float count = static_cast<float>(max(1, end - begin));
    sum.x /= count, sum.y /= count, sum.z /= count, sum.w /= count;
    *reinterpret_cast<float4*>(out + static_cast<size_t>(sequence) * out_ld + i) = sum;
  }
}
SAMP_KERNEL(pool)
