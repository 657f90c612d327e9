// Ops on whole rows: residual + layer norm + quantize, embedding, quantize, mean. Included by
// level.cc after vmath.h, inside the namespace of a level.
//
// A row is read from memory once: its values stay in a buffer of one row (L1) for the passes over
// it, which are the reference's: the mean, then the variance of the centred values. Every sum runs
// over kLanes accumulators in an order that the width alone fixes.

constexpr int kRows = 4;  // rows in flight: a row's reductions wait for nothing but themselves

// ---- sums of 4 vectors at once ----

// In each lane of 16 bytes: element j of z[i] -> element i of column[j].
SAMP_INLINE void transpose_lanes(const vf* z, vf* column) {
#if SAMP_LEVEL >= 3
  const __m512 z0 = (__m512)z[0], z1 = (__m512)z[1], z2 = (__m512)z[2], z3 = (__m512)z[3];
  const __m512d a = (__m512d)_mm512_unpacklo_ps(z0, z1), b = (__m512d)_mm512_unpacklo_ps(z2, z3);
  const __m512d c = (__m512d)_mm512_unpackhi_ps(z0, z1), d = (__m512d)_mm512_unpackhi_ps(z2, z3);
  column[0] = (vf)_mm512_unpacklo_pd(a, b), column[1] = (vf)_mm512_unpackhi_pd(a, b);
  column[2] = (vf)_mm512_unpacklo_pd(c, d), column[3] = (vf)_mm512_unpackhi_pd(c, d);
#elif SAMP_LEVEL >= 1
  const __m256 z0 = (__m256)z[0], z1 = (__m256)z[1], z2 = (__m256)z[2], z3 = (__m256)z[3];
  const __m256d a = (__m256d)_mm256_unpacklo_ps(z0, z1), b = (__m256d)_mm256_unpacklo_ps(z2, z3);
  const __m256d c = (__m256d)_mm256_unpackhi_ps(z0, z1), d = (__m256d)_mm256_unpackhi_ps(z2, z3);
  column[0] = (vf)_mm256_unpacklo_pd(a, b), column[1] = (vf)_mm256_unpackhi_pd(a, b);
  column[2] = (vf)_mm256_unpacklo_pd(c, d), column[3] = (vf)_mm256_unpackhi_pd(c, d);
#else
  const vf a = SAMP_SHUFFLE(vi, z[0], z[1], 0, 4, 1, 5);
  const vf b = SAMP_SHUFFLE(vi, z[2], z[3], 0, 4, 1, 5);
  const vf c = SAMP_SHUFFLE(vi, z[0], z[1], 2, 6, 3, 7);
  const vf d = SAMP_SHUFFLE(vi, z[2], z[3], 2, 6, 3, 7);
  column[0] = SAMP_SHUFFLE(vi, a, b, 0, 1, 4, 5), column[1] = SAMP_SHUFFLE(vi, a, b, 2, 3, 6, 7);
  column[2] = SAMP_SHUFFLE(vi, c, d, 0, 1, 4, 5), column[3] = SAMP_SHUFFLE(vi, c, d, 2, 3, 6, 7);
#endif
}

typedef float vf4 __attribute__((vector_size(16)));

SAMP_INLINE vf4 max4(vf4 a, vf4 b) {
#if SAMP_LEVEL >= 1
  return (vf4)_mm_max_ps((__m128)a, (__m128)b);
#else
  return vmax(a, b);
#endif
}

// The sum, or the largest, of each of 4 vectors. The order does not depend on the vector's place.
template <bool largest>
SAMP_INLINE vf4 reduce4(const vf* x) {
  vf c[4];
  transpose_lanes(x, c);
  const vf y = largest ? vmax(vmax(c[0], c[1]), vmax(c[2], c[3])) : (c[0] + c[1]) + (c[2] + c[3]);
  vf4 lane[W / 4];
  __builtin_memcpy(lane, &y, sizeof y);
#pragma GCC unroll 2
  for (int step = W / 8; step; step /= 2)
#pragma GCC unroll 2
    for (int i = 0; i < step; ++i)
      lane[i] = largest ? max4(lane[i], lane[i + step]) : lane[i] + lane[i + step];
  return lane[0];
}

// ---- loops over a row ----

// Runs the statement for every vector: n elements at i, n being a constant, W, but at the end; j
// (0 to 3) tells independent accumulators apart, which hide the latency of an addition.
#define SAMP_EACH_VECTOR(width, ...)                                              \
  {                                                                               \
    long i = 0;                                                                   \
    for (; i + 4 * W <= (width);) {                                               \
      constexpr int n = W;                                                        \
      _Pragma("GCC unroll 4") for (int j = 0; j < 4; ++j, i += W) { __VA_ARGS__ } \
    }                                                                             \
    constexpr int j = 0;                                                          \
    for (; i + W <= (width); i += W) {                                            \
      constexpr int n = W;                                                        \
      __VA_ARGS__                                                                 \
    }                                                                             \
    if (const int n = (int)((width) - i); n > 0) {                                \
      __VA_ARGS__                                                                 \
    }                                                                             \
  }

SAMP_INLINE vi lane_index() {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane;
}
SAMP_INLINE vf first_n(vf x, int n) {
  return n == W ? x : (vf)((vi)x & (vi)(lane_index() < set1i(n)));
}

SAMP_INLINE void quantize_row(const float* x, long width, float inv_scale, uint8_t* q) {
  const vf s = set1(inv_scale);
  SAMP_EACH_VECTOR(width, (void)j; store_u8(q + i, load_n(x + i, n) * s, n);)
}

// One row to out.out_q, with the static scale or with one of its own.
SAMP_INLINE void quantize_to(const RowOut& out, const float* x, long width, long row) {
  float inv_scale = out.inv_scale;
  if (out.token_scale) {
    vf top[4] = {};
    SAMP_EACH_VECTOR(width, top[j] = vmax(top[j], vabs(load_n(x + i, n)));)
    const float largest = reduce_max(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
    // As the reference has it: never 0, so that a row of zeros stays finite.
    const float scale = (largest > 1e-30f ? largest : 1e-30f) / 127.0f;
    out.token_scale[row] = scale;
    inv_scale = 1.0f / scale;
  }
  quantize_row(x, width, inv_scale, out.out_q + row * out.ld_q);
}

// ---- layer norm ----

template <int terms>
SAMP_INLINE vf sum_row(const float* const* term, long width, float* to) {
  const float *a = term[0], *b = term[1], *c = term[2];
  vf s[4] = {};
  SAMP_EACH_VECTOR(width, {
    vf v = load_n(a + i, n);
    if (terms > 1) v += load_n(b + i, n);
    if (terms > 2) v += load_n(c + i, n);
    store(to + i, v);
    s[j] += v;
  })
  return (s[0] + s[1]) + (s[2] + s[3]);
}

SAMP_INLINE vf square_row(const float* x, long width, vf mean) {
  vf s[4] = {};
  SAMP_EACH_VECTOR(width, {
    const vf v = first_n(load(x + i) - mean, n);
    s[j] = fma(v, v, s[j]);
  })
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// `term(r, t)` is the t-th of `terms` rows whose sum is row r; `buffer` holds kRows rows.
template <int terms, class Term>
SAMP_INLINE void layernorm_rows(const Term& term, const LayerNormW& ln, long width,
                                const RowOut& out, long row, long rows, float* buffer) {
  const long ld = (width + W - 1) / W * W;
  vf sum[kRows] = {};
  for (long r = 0; r < rows; ++r) {
    const float* of[3] = {term(r, 0), terms > 1 ? term(r, 1) : nullptr,
                          terms > 2 ? term(r, 2) : nullptr};
    sum[r] = sum_row<terms>(of, width, buffer + r * ld);
  }
  const vf4 mean = reduce4<false>(sum) / (float)width;
  for (long r = 0; r < rows; ++r) sum[r] = square_row(buffer + r * ld, width, set1(mean[r]));
  vf4 deviation = reduce4<false>(sum) / (float)width + ln.eps;
  for (int r = 0; r < 4; ++r) deviation[r] = __builtin_sqrtf(deviation[r]);
  const vf4 inverse = 1.0f / deviation;

  const float *gamma = ln.gamma, *beta = ln.beta;
  for (long r = 0; r < rows; ++r) {
    float* x = buffer + r * ld;
    float* y = out.out_f ? out.out_f + (row + r) * out.ld_f : x;
    const vf centre = set1(mean[r]), inv = set1(inverse[r]);
    SAMP_EACH_VECTOR(width, {
      (void)j;
      const vf v = (load(x + i) - centre) * inv;
      store_n(y + i, fma(v, load_n(gamma + i, n), load_n(beta + i, n)), n);
    })
    if (out.out_q) quantize_to(out, y, width, row + r);
  }
}

// kRows rows of floats on the stack, whole vectors, aligned. A row is a model's width: a few KB.
#define SAMP_ROW_BUFFER(width)                                                                     \
  (float*)__builtin_alloca_with_align((size_t)(((width) + W - 1) / W * W * kRows) * sizeof(float), \
                                      512)
#define SAMP_TERM [&](long r, int t) __attribute__((always_inline))

static void add_layernorm(const AddLayerNorm& op, long row0, long row1) {
  float* buffer = SAMP_ROW_BUFFER(op.width);
  for (long row = row0; row < row1; row += kRows) {
    const long rows = row1 - row < kRows ? row1 - row : kRows;
    const auto term = SAMP_TERM {
      return t ? op.residual + (row + r) * op.ld_residual : op.x + (row + r) * op.ld_x;
    };
    if (op.residual)
      layernorm_rows<2>(term, op.ln, op.width, op.out, row, rows, buffer);
    else
      layernorm_rows<1>(term, op.ln, op.width, op.out, row, rows, buffer);
  }
}

static void embed(const Embed& op, long row0, long row1) {
  float* buffer = SAMP_ROW_BUFFER(op.width);
  for (long row = row0; row < row1; row += kRows) {
    const long rows = row1 - row < kRows ? row1 - row : kRows;
    const auto term = SAMP_TERM {
      const float* const table[3] = {op.word, op.position, op.type};
      const int32_t* const index[3] = {op.ids, op.positions, op.types};
      return table[t] + index[t][row + r] * op.width;
    };
    layernorm_rows<3>(term, op.ln, op.width, op.out, row, rows, buffer);
  }
}

static void quantize(const Quantize& op, long row0, long row1) {
  for (long row = row0; row < row1; ++row) quantize_to(op.out, op.x + row * op.ld_x, op.width, row);
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
