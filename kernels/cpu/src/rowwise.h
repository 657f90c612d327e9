// Ops on whole rows: residual + layer norm + quantize, embedding, quantize, mean. Included by
// level.cc after vmath.h, inside the namespace of a level.
//
// A row is read from memory once: its values stay in a buffer of one row (L1) for the passes over
// it, which are the reference's: the mean, then the variance of the centred values. Every sum runs
// over kLanes accumulators in an order that the width alone fixes.

constexpr int kLanes = 4;  // independent accumulators hide the latency of an addition

// Calls f(i, accumulator, n) for the vector at i of n elements; n is a constant, W, but at the end.
template <class F>
SAMP_INLINE void each_vector(long width, const F& f) {
  long i = 0;
  for (; i + kLanes * W <= width; i += kLanes * W)
#pragma GCC unroll 4
    for (int j = 0; j < kLanes; ++j) f(i + j * W, j, W);
  for (; i + W <= width; i += W) f(i, 0, W);
  if (i < width) f(i, 0, (int)(width - i));
}
// A lambda is called from three places, which gcc would otherwise take for too many to inline.
#define SAMP_EACH [&](long i, int j, int n) __attribute__((always_inline))

SAMP_INLINE vi lane_index() {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane;
}
SAMP_INLINE vf first_n(vf x, int n) {
  return n == W ? x : (vf)((vi)x & (vi)(lane_index() < set1i(n)));
}

SAMP_INLINE float sum_lanes(const vf* a) { return reduce_add((a[0] + a[1]) + (a[2] + a[3])); }
SAMP_INLINE float max_lanes(const vf* a) {
  return reduce_max(vmax(vmax(a[0], a[1]), vmax(a[2], a[3])));
}

// The scale of one token, as the reference has it: never 0, so that a row of zeros stays finite.
SAMP_INLINE float token_scale_of(float largest) {
  return (largest > 1e-30f ? largest : 1e-30f) * (1.0f / 127.0f);
}

SAMP_INLINE void quantize_row(const float* x, long width, float inv_scale, uint8_t* q) {
  const vf s = set1(inv_scale);
  each_vector(width, SAMP_EACH {
    (void)j;
    store_u8(q + i, load_n(x + i, n) * s, n);
  });
}

// The layer norm of one row whose values `at(i, n)` gives; `buffer` holds one row.
template <class At>
SAMP_INLINE void layernorm_row(const At& at, const LayerNormW& ln, long width, const RowOut& out,
                               long row, float* buffer) {
  vf sum[kLanes] = {};
  each_vector(width, SAMP_EACH {
    vf v = at(i, n);
    store(buffer + i, v);
    sum[j] += v;
  });
  const vf mean = set1(sum_lanes(sum) / (float)width);

  vf square[kLanes] = {};
  each_vector(width, SAMP_EACH {
    vf v = first_n(load(buffer + i) - mean, n);
    square[j] = fma(v, v, square[j]);
  });
  const float variance = sum_lanes(square) / (float)width;
  const vf inv = set1(1.0f / __builtin_sqrtf(variance + ln.eps));

  float* f = out.out_f ? out.out_f + row * out.ld_f : nullptr;
  uint8_t* q = out.out_q ? out.out_q + row * out.ld_q : nullptr;
  const vf scale = set1(out.inv_scale);
  const bool per_token = q && out.token_scale;
  vf largest[kLanes] = {};
  each_vector(width, SAMP_EACH {
    vf y = fma((load(buffer + i) - mean) * inv, load_n(ln.gamma + i, n), load_n(ln.beta + i, n));
    if (f) store_n(f + i, y, n);
    if (per_token) {
      store(buffer + i, y);
      largest[j] = vmax(largest[j], first_n(vabs(y), n));
    } else if (q) {
      store_u8(q + i, y * scale, n);
    }
  });
  if (!per_token) return;
  const float s = token_scale_of(max_lanes(largest));
  out.token_scale[row] = s;
  quantize_row(buffer, width, 1.0f / s, q);
}

// One row of floats on the stack, whole vectors, aligned. A row is a model's width: a few KB.
#define SAMP_ROW_BUFFER(width) \
  (float*)__builtin_alloca_with_align((size_t)(((width) + W - 1) / W * W) * sizeof(float), 512)

#define SAMP_AT [=](long i, int n) __attribute__((always_inline))

static void add_layernorm(const AddLayerNorm& op, long row0, long row1) {
  float* buffer = SAMP_ROW_BUFFER(op.width);
  for (long row = row0; row < row1; ++row) {
    const float* x = op.x + row * op.ld_x;
    if (op.residual) {
      const float* r = op.residual + row * op.ld_residual;
      layernorm_row(SAMP_AT { return load_n(x + i, n) + load_n(r + i, n); }, op.ln, op.width,
                    op.out, row, buffer);
    } else {
      layernorm_row(SAMP_AT { return load_n(x + i, n); }, op.ln, op.width, op.out, row, buffer);
    }
  }
}

static void embed(const Embed& op, long row0, long row1) {
  float* buffer = SAMP_ROW_BUFFER(op.width);
  for (long row = row0; row < row1; ++row) {
    const float* w = op.word + op.ids[row] * op.width;
    const float* p = op.position + op.positions[row] * op.width;
    const float* t = op.type + op.types[row] * op.width;
    layernorm_row(
        SAMP_AT { return load_n(w + i, n) + load_n(p + i, n) + load_n(t + i, n); }, op.ln,
        op.width, op.out, row, buffer);
  }
}

static void quantize(const Quantize& op, long row0, long row1) {
  for (long row = row0; row < row1; ++row) {
    const float* x = op.x + row * op.ld_x;
    float inv_scale = op.out.inv_scale;
    if (op.out.token_scale) {
      vf largest[kLanes] = {};
      each_vector(op.width,
                  SAMP_EACH { largest[j] = vmax(largest[j], vabs(load_n(x + i, n))); });
      const float s = token_scale_of(max_lanes(largest));
      op.out.token_scale[row] = s;
      inv_scale = 1.0f / s;
    }
    quantize_row(x, op.width, inv_scale, op.out.out_q + row * op.out.ld_q);
  }
}

// out = mean of rows [begin, end): a block of columns stays in registers, rows are added in order.
static void mean_rows(const float* x, long ld, long begin, long end, long width, float* out) {
  const vf inv = set1(1.0f / (float)(end - begin));
  long i = 0;
  for (; i + 4 * W <= width; i += 4 * W) {
    vf a[4] = {};
    for (long row = begin; row < end; ++row)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) a[j] += load(x + row * ld + i + j * W);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(out + i + j * W, a[j] * inv);
  }
  for (; i < width; i += W) {
    const int n = width - i < W ? (int)(width - i) : W;
    vf a{};
    for (long row = begin; row < end; ++row) a += load_n(x + row * ld + i, n);
    store_n(out + i, a * inv, n);
  }
}
