// The one chain behind every GEMM: scale, outlier side product, bias, activation, residual, and the
// output as float, u8 or both. A tile of accumulators is spilled to L1 first: the micro-kernels
// then know nothing of epilogues, and the out-of-order core overlaps this with the next tile's
// loads.

constexpr int NV = 2;          // vectors of one panel
constexpr int PANEL = NV * W;  // columns of one packed panel

template <int ACT>
SAMP_INLINE vf activate(vf y) {
  if (ACT == (int)Act::gelu) return gelu(y);
  if (ACT == (int)Act::gelu_tanh) return gelu_tanh(y);
  if (ACT == (int)Act::tanh) return tanh_(y);
  if (ACT == (int)Act::relu) return vmax(y, vf{});
  return y;
}

SAMP_INLINE vf as_float(const int32_t* p) { return to_float(loadi(p)); }
SAMP_INLINE vf as_float(const float* p) { return load(p); }

// `tile` [rows][ld_tile] of T = int32 sums or float sums; columns [col, col + columns) of row `row`
// on.
template <int ACT, bool WHOLE, typename T>
SAMP_INLINE void finish_rows(const Epilogue& e, const T* tile, int ld_tile, long row, int rows,
                             long col, int n) {
  const bool scaled = e.col_scale != nullptr;
  const vf scale = !scaled ? set1(1.0f)
                   : WHOLE ? load(e.col_scale + col)
                           : load_n(e.col_scale + col, n);
  const vf bias = WHOLE ? load(e.bias + col) : load_n(e.bias + col, n);
  vf inv = set1(e.inv_scale);
  if (e.inv_scale_col) inv = WHOLE ? load(e.inv_scale_col + col) : load_n(e.inv_scale_col + col, n);
  for (int r = 0; r < rows; ++r) {
    vf y = as_float(tile + (long)r * ld_tile);
    if (scaled) {
      const vf s = e.row_scale ? scale * set1(e.row_scale[row + r]) : scale;
      y = fma(y, s, bias);
    } else {
      y = y + bias;
    }
    if (e.side_k) {
      const float* x = e.side_x + (row + r) * e.ld_side;
      const long width = e.side_width;
      for (long j = 0; j < e.side_k; ++j) {
        const float* w = e.side_w + j * width + col;
        y = fma(set1(x[e.side_index[j]]), WHOLE ? load(w) : load_n(w, n), y);
      }
    }
    y = activate<ACT>(y);
    if (e.residual) {
      const float* p = e.residual + (row + r) * e.ld_residual + col;
      y = y + (WHOLE ? load(p) : load_n(p, n));
    }
    if (e.out_f) {
      float* p = e.out_f + (row + r) * e.ld_f + col;
      if (WHOLE)
        store(p, y);
      else
        store_n(p, y, n);
    }
    if (e.out_q) store_u8(e.out_q + (row + r) * e.ld_q + col, y * inv, WHOLE ? W : n);
  }
}

// Which of an encoder's three cases an epilogue is, for whole panels: out_f; out_f with a residual;
// out_q. All have static scales and no outliers.
enum class To { floats, sum, bytes, other };

SAMP_INLINE To output_of(const Epilogue& e) {
  if (e.row_scale || e.side_k || (e.out_f && e.out_q)) return To::other;
  if (e.out_f) return e.residual ? To::sum : To::floats;
  return e.out_q && !e.residual ? To::bytes : To::other;
}

// One whole panel of such a case, from row `row` on. Fields are copied out: a store through
// uint8_t* may alias them, and each would be read again.
template <int ACT, To TO, typename T>
struct PanelEnd {
  vf s0, s1, b0, b1, i0, i1;
  float* f;
  uint8_t* q;
  const float* residual;
  long ld_f, ld_q, ld_residual;

  SAMP_MEMBER PanelEnd(const Epilogue& e, long row, long col) {
    const bool scaled = sizeof(T) == sizeof(int32_t) && e.col_scale != nullptr;
    s0 = scaled ? load(e.col_scale + col) : set1(1.0f);
    s1 = scaled ? load(e.col_scale + col + W) : s0;
    b0 = load(e.bias + col), b1 = load(e.bias + col + W);
    i0 = e.inv_scale_col ? load(e.inv_scale_col + col) : set1(e.inv_scale);
    i1 = e.inv_scale_col ? load(e.inv_scale_col + col + W) : i0;
    ld_f = e.ld_f, ld_q = e.ld_q, ld_residual = e.ld_residual;
    f = TO == To::bytes ? nullptr : e.out_f + row * ld_f + col;
    q = TO == To::bytes ? e.out_q + row * ld_q + col : nullptr;
    residual = TO == To::sum ? e.residual + row * ld_residual + col : nullptr;
  }

  // Rows [first, last) of `tile` [rows][PANEL].
  SAMP_MEMBER void operator()(const T* tile, long first, long last) const {
    for (long r = first; r < last; ++r) {
      const T* sums = tile + r * PANEL;
      vf y0 = activate<ACT>(fma(as_float(sums), s0, b0));
      vf y1 = activate<ACT>(fma(as_float(sums + W), s1, b1));
      if (TO == To::sum) {
        y0 = y0 + load(residual + r * ld_residual);
        y1 = y1 + load(residual + r * ld_residual + W);
      }
      if (TO == To::bytes) {
        store_u8(q + r * ld_q, y0 * i0, W);
        store_u8(q + r * ld_q + W, y1 * i1, W);
      } else {
        store(f + r * ld_f, y0);
        store(f + r * ld_f + W, y1);
      }
    }
  }
};

template <int ACT, To TO, typename T>
static void finish_panel(const Epilogue& e, const T* tile, long row, int rows, long col) {
  PanelEnd<ACT, TO, T>(e, row, col)(tile, 0, rows);
}

template <int ACT, typename T>
static void finish_act(const Epilogue& e, const T* tile, int ld_tile, long row, int rows, long col,
                       long n) {
  if (col + PANEL <= n) switch (output_of(e)) {
      case To::sum: return finish_panel<ACT, To::sum>(e, tile, row, rows, col);
      case To::floats: return finish_panel<ACT, To::floats>(e, tile, row, rows, col);
      case To::bytes: return finish_panel<ACT, To::bytes>(e, tile, row, rows, col);
      case To::other: break;
    }
  for (int v = 0; v < ld_tile / W; ++v) {
    const long c = col + v * W;
    if (c + W <= n)
      finish_rows<ACT, true>(e, tile + v * W, ld_tile, row, rows, c, W);
    else if (c < n)
      finish_rows<ACT, false>(e, tile + v * W, ld_tile, row, rows, c, (int)(n - c));
  }
}

template <typename T>
static void finish(const Epilogue& e, const T* tile, int ld_tile, long row, int rows, long col,
                   long n) {
  switch (e.act) {
    case Act::gelu: return finish_act<(int)Act::gelu>(e, tile, ld_tile, row, rows, col, n);
    case Act::gelu_tanh:
      return finish_act<(int)Act::gelu_tanh>(e, tile, ld_tile, row, rows, col, n);
    case Act::tanh: return finish_act<(int)Act::tanh>(e, tile, ld_tile, row, rows, col, n);
    case Act::relu: return finish_act<(int)Act::relu>(e, tile, ld_tile, row, rows, col, n);
    default: return finish_act<(int)Act::none>(e, tile, ld_tile, row, rows, col, n);
  }
}
