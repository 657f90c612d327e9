// One op at a time, on NumPy arrays that the caller made: for tests, calibration and the loop over
// ops. Every shape and index is checked here, so that no call from Python can leave an array; a
// wrong one is a ValueError. The interpreter's lock is free while an op works.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "packed.h"

namespace nb = nanobind;

namespace samp {
namespace {

// Vectors lie without gaps; the rows of a matrix do, and may be apart.
template <typename T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;
template <typename T>
using Maybe = std::optional<T>;

void expect(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

template <typename A>
long size(const A& a, int dim) {
  return static_cast<long>(a.shape(static_cast<size_t>(dim)));
}

// The row stride of a matrix [rows, width], checked.
template <typename T>
long rows_of(const Matrix<T>& x, long rows, long width, const char* what) {
  expect(size(x, 0) == rows && size(x, 1) == width, what);
  expect(width <= 1 || x.stride(1) == 1, "rows without gaps");
  expect(rows <= 1 || x.stride(0) >= width, "rows that do not overlap");
  return rows <= 1 ? width : static_cast<long>(x.stride(0));
}

template <typename T>
T* values(const Vector<T>& x, long n, const char* what) {
  expect(size(x, 0) == n, what);
  return x.data();
}

void within(const Vector<const int32_t>& index, long n, long below, const char* what) {
  expect(size(index, 0) == n, what);
  for (long i = 0; i < n; ++i) expect(index.data()[i] >= 0 && index.data()[i] < below, what);
}

// What an op writes: floats, u8 with a static scale, u8 with a scale for each token.
using OutF = Maybe<Matrix<float>>;
using OutQ = Maybe<Matrix<uint8_t>>;
using OutT = Maybe<Vector<float>>;

RowOut row_out(const OutF& f, const OutQ& q, float inv_scale, const OutT& token, long rows,
               long width) {
  RowOut out;
  if (f) out.ld_f = rows_of(*f, rows, width, "out_f [rows, width]"), out.out_f = f->data();
  if (q) out.ld_q = rows_of(*q, rows, width, "out_q [rows, width]"), out.out_q = q->data();
  if (token) out.token_scale = values(*token, rows, "token_scale [rows]");
  expect(!token || q, "token_scale with out_q");
  out.inv_scale = inv_scale;
  return out;
}

// K of an int8 weight is stored rounded up to 4, with zeros.
long padded(long k) { return (k + 3) / 4 * 4; }

// A weight [out, in] as one level wants it: the process's own, where none is named.
template <typename T>
void pack_at(Packed* to, const Matrix<const T>& w, const Level* level) {
  constexpr bool kInt8 = std::is_same_v<T, int8_t>;
  const long n = size(w, 0), k = size(w, 1), wide = kInt8 ? padded(k) : k;
  expect(n > 0 && k > 0, "a weight [out, in] of at least one row and column");
  const long ld = rows_of(w, n, k, "a weight [out, in]");
  std::vector<T> copy;
  const T* rows = w.data();
  if (ld != wide) {
    copy.assign(static_cast<size_t>(n * wide), 0);
    for (long i = 0; i < n; ++i) std::copy_n(rows + i * ld, k, copy.data() + i * wide);
    rows = copy.data();
  }
  new (to) Packed(level != nullptr ? level : current_level(), kInt8, rows, n, wide);
}

// u8 rows of K as rows of the K that was packed; copied only where that is rounded up.
struct Rows {
  Rows(const Matrix<const uint8_t>& x, const Packed& packed) {
    expect(packed.int8, "an int8 weight for u8 rows");
    count = size(x, 0);
    const long k = size(x, 1);
    expect(padded(k) == packed.k, "x [rows, in of the weight]");
    ld = rows_of(x, count, k, "x [rows, in]");
    data = x.data();
    if (k == packed.k) return;
    copy.assign(static_cast<size_t>(count * packed.k), 128);
    for (long i = 0; i < count; ++i) std::copy_n(x.data() + i * ld, k, copy.data() + i * packed.k);
    data = copy.data();
    ld = packed.k;
  }
  long count, ld;
  const uint8_t* data;
  std::vector<uint8_t> copy;
};

// act(x W^T ...) + residual; out_f, out_q or both. side: x [T, k] times weight [k, N], added.
template <typename X>
void gemm(const Level& level, const X& x, const Packed& packed,
          const Maybe<Vector<const float>>& col_scale, const Maybe<Vector<const float>>& row_scale,
          const Vector<const float>& bias, int act, const Maybe<Matrix<const float>>& residual,
          const OutF& out_f, const OutQ& out_q, float inv_scale,
          const Maybe<Matrix<const float>>& side_x, const Maybe<Matrix<const float>>& side_w) {
  expect(packed.level == &level, "a weight that was packed at this level");
  Gemm g;
  long rows;
  std::optional<Rows> quantized;
  if constexpr (std::is_same_v<X, Matrix<const uint8_t>>) {
    quantized.emplace(x, packed);
    rows = quantized->count;
    g.x = quantized->data;
    g.ld_x = quantized->ld;
    expect(col_scale.has_value(), "col_scale for an int8 weight");
  } else {
    expect(!packed.int8 && !col_scale && !row_scale,
           "an fp32 weight, and no scales, for float rows");
    rows = size(x, 0);
    g.ld_x = rows_of(x, rows, packed.k, "x [rows, in of the weight]");
    g.x = x.data();
  }
  const long n = packed.n;
  g.packed = packed.data;
  g.n = n;
  g.k = packed.k;
  Epilogue& e = g.ep;
  if (col_scale) e.col_scale = values(*col_scale, n, "col_scale [out]");
  if (row_scale) e.row_scale = values(*row_scale, rows, "row_scale [rows]");
  e.bias = values(bias, n, "bias [out]");
  expect(act >= 0 && act <= 4, "act from 0 to 4");
  e.act = static_cast<Act>(act);
  if (residual) {
    e.ld_residual = rows_of(*residual, rows, n, "residual [rows, out]");
    e.residual = residual->data();
  }
  const RowOut out = row_out(out_f, out_q, inv_scale, {}, rows, n);
  e.out_f = out.out_f, e.ld_f = out.ld_f, e.out_q = out.out_q, e.ld_q = out.ld_q;
  e.inv_scale = inv_scale;
  std::vector<int32_t> index;
  expect(side_x.has_value() == side_w.has_value(), "side_x and side_w, or neither");
  if (side_x) {
    e.side_k = size(*side_w, 0);
    e.ld_side = rows_of(*side_x, rows, e.side_k, "side_x [rows, k]");
    e.side_width = rows_of(*side_w, e.side_k, n, "side_w [k, out]");
    e.side_x = side_x->data();
    e.side_w = side_w->data();
    for (long i = 0; i < e.side_k; ++i) index.push_back(static_cast<int32_t>(i));
    e.side_index = index.data();
  }
  const long panels = (n + level.panel - 1) / level.panel;
  if (rows == 0) return;
  nb::gil_scoped_release release;
  (packed.int8 ? level.gemm_int8 : level.gemm_f32)(g, 0, rows, 0, panels);
}

void sums(const Level& level, const Matrix<const uint8_t>& x, const Packed& packed,
          const Matrix<int32_t>& out) {
  expect(packed.level == &level, "a weight that was packed at this level");
  const Rows rows(x, packed);
  Gemm g;
  g.x = rows.data;
  g.ld_x = rows.ld;
  g.packed = packed.data;
  g.n = packed.n;
  g.k = packed.k;
  const long ld = rows_of(out, rows.count, packed.n, "out [rows, out]");
  if (rows.count == 0) return;
  nb::gil_scoped_release release;
  level.sums_int8(g, 0, rows.count, out.data(), ld);
}

LayerNormW norm(const Vector<const float>& gamma, const Vector<const float>& beta, float eps,
                long width) {
  return {values(gamma, width, "gamma [width]"), values(beta, width, "beta [width]"), eps};
}

void add_layernorm(const Level& level, const Matrix<const float>& x,
                   const Maybe<Matrix<const float>>& residual, const Vector<const float>& gamma,
                   const Vector<const float>& beta, float eps, const OutF& out_f, const OutQ& out_q,
                   float inv_scale, const OutT& token_scale) {
  AddLayerNorm a;
  const long rows = size(x, 0);
  a.width = size(x, 1);
  expect(a.width > 0, "x of at least one column");
  a.ld_x = rows_of(x, rows, a.width, "x [rows, width]");
  a.x = x.data();
  if (residual) {
    a.ld_residual = rows_of(*residual, rows, a.width, "residual [rows, width]");
    a.residual = residual->data();
  }
  a.ln = norm(gamma, beta, eps, a.width);
  a.out = row_out(out_f, out_q, inv_scale, token_scale, rows, a.width);
  nb::gil_scoped_release release;
  level.add_layernorm(a, 0, rows);
}

void embed(const Level& level, const Vector<const int32_t>& ids, const Vector<const int32_t>& types,
           const Vector<const int32_t>& positions, const Matrix<const float>& word,
           const Matrix<const float>& position, const Matrix<const float>& type,
           const Vector<const float>& gamma, const Vector<const float>& beta, float eps,
           const OutF& out_f, const OutQ& out_q, float inv_scale, const OutT& token_scale) {
  Embed e;
  const long rows = size(ids, 0);
  e.width = size(word, 1);
  expect(e.width > 0, "tables of at least one column");
  struct {
    const Matrix<const float>& table;
    const Vector<const int32_t>& index;
    const float** at;
    const int32_t** by;
  } parts[] = {{word, ids, &e.word, &e.ids},
               {position, positions, &e.position, &e.positions},
               {type, types, &e.type, &e.types}};
  for (auto& part : parts) {
    const long n = size(part.table, 0);
    const long ld = rows_of(part.table, n, e.width, "tables of one width");
    expect(ld == e.width, "tables without gaps");
    within(part.index, rows, n, "one index a token, each within its table");
    *part.at = part.table.data();
    *part.by = part.index.data();
  }
  e.ln = norm(gamma, beta, eps, e.width);
  e.out = row_out(out_f, out_q, inv_scale, token_scale, rows, e.width);
  nb::gil_scoped_release release;
  level.embed(e, 0, rows);
}

void quantize(const Level& level, const Matrix<const float>& x, const Matrix<uint8_t>& out_q,
              float inv_scale, const OutT& token_scale) {
  Quantize q;
  const long rows = size(x, 0);
  q.width = size(x, 1);
  expect(q.width > 0, "x of at least one column");
  q.ld_x = rows_of(x, rows, q.width, "x [rows, width]");
  q.x = x.data();
  q.out = row_out({}, out_q, inv_scale, token_scale, rows, q.width);
  nb::gil_scoped_release release;
  level.quantize(q, 0, rows);
}

// The bounds of sequences in `rows` rows; the longest of them.
long longest(const Vector<const int32_t>& cu, long rows) {
  const long sequences = size(cu, 0) - 1;
  expect(sequences >= 1 && cu.data()[0] == 0 && cu.data()[sequences] <= rows, "cu_seqlens from 0");
  long most = 0;
  for (long i = 0; i < sequences; ++i) {
    const long length = static_cast<long>(cu.data()[i + 1]) - cu.data()[i];
    expect(length > 0, "cu_seqlens that rise");
    most = std::max(most, length);
  }
  return most;
}

// qkv of floats, or of u8 where scores and context are int8. first_only: one row a sequence.
template <typename T>
void attention(const Level& level, const Matrix<const T>& qkv, const Vector<const int32_t>& cu,
               long heads, const Maybe<Matrix<const float>>& bias, bool int8_scores,
               bool int8_context, float q_scale, float k_scale, float p_scale, float v_scale,
               bool first_only, const OutF& out_f, const OutQ& out_q, float inv_scale) {
  constexpr bool kQuantized = std::is_same_v<T, uint8_t>;
  Attention a;
  const long rows = size(qkv, 0), width = size(qkv, 1), sequences = size(cu, 0) - 1;
  expect(heads >= 1 && width > 0 && width % (3 * heads) == 0, "qkv [rows, 3 * heads * d]");
  expect(!kQuantized || (int8_scores && int8_context), "int8 scores and context for u8 rows");
  const long most = longest(cu, rows);
  a.ld = rows_of(qkv, rows, width, "qkv [rows, 3 * heads * d]");
  if constexpr (kQuantized)
    a.qkv_q = qkv.data();
  else
    a.qkv_f = qkv.data();
  a.heads = heads;
  a.head_dim = width / 3 / heads;
  if (bias) {
    const char* what = "position_bias [heads, 2 n - 1], n at least the longest sequence";
    const long distances = size(*bias, 1);
    a.reach = (distances + 1) / 2;
    expect(distances % 2 == 1 && a.reach >= most, what);
    expect(rows_of(*bias, heads, distances, what) == distances, what);
    a.position_bias = bias->data();
  }
  a.int8_scores = int8_scores;
  a.int8_context = int8_context;
  a.q_scale = q_scale, a.k_scale = k_scale, a.p_scale = p_scale, a.v_scale = v_scale;
  a.first_only = first_only;
  a.out = row_out(out_f, out_q, inv_scale, {}, first_only ? sequences : rows, width / 3);
  const size_t need = (level.attention_scratch(a.head_dim, most) + 63) / 64 * 64;
  std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, need + 64),
                                                      &std::free);
  if (scratch == nullptr) throw std::bad_alloc();
  nb::gil_scoped_release release;
  for (long i = 0; i < sequences; ++i)
    level.attention(a, cu.data()[i], cu.data()[i + 1], i, 0, heads, scratch.get());
}

void mean(const Level& level, const Matrix<const float>& x, const Vector<const int32_t>& cu,
          const Matrix<float>& out) {
  const long rows = size(x, 0), width = size(x, 1), sequences = size(cu, 0) - 1;
  longest(cu, rows);
  const long ld = rows_of(x, rows, width, "x [rows, width]");
  const long ld_out = rows_of(out, sequences, width, "out [sequences, width]");
  nb::gil_scoped_release release;
  for (long i = 0; i < sequences; ++i)
    level.mean_rows(x.data(), ld, cu.data()[i], cu.data()[i + 1], width, out.data() + i * ld_out);
}

// Arguments by name; never converted, since a converted output would be a copy.
#define ARG(name) nb::arg(name).noconvert()
#define MAYBE(name) nb::arg(name).noconvert() = nb::none()

template <typename X, typename C>
void bind_gemm(C& level) {
  level.def("gemm", &gemm<X>, ARG("x"), nb::arg("packed"), MAYBE("col_scale"), MAYBE("row_scale"),
            ARG("bias"), nb::arg("act") = 0, MAYBE("residual"), MAYBE("out_f"), MAYBE("out_q"),
            nb::arg("inv_scale") = 1.0f, MAYBE("side_x"), MAYBE("side_w"));
}

template <typename T, typename C>
void bind_attention(C& level) {
  level.def("attention", &attention<T>, ARG("qkv"), ARG("cu_seqlens"), nb::arg("heads"),
            MAYBE("position_bias"), nb::arg("int8_scores") = false, nb::arg("int8_context") = false,
            nb::arg("q_scale") = 1.0f, nb::arg("k_scale") = 1.0f, nb::arg("p_scale") = 1.0f,
            nb::arg("v_scale") = 1.0f, nb::arg("first_only") = false, MAYBE("out_f"),
            MAYBE("out_q"), nb::arg("inv_scale") = 1.0f);
}

}  // namespace

void bind_ops(nb::module_& m) {
  nb::class_<Packed>(m, "Packed")
      .def("__init__", &pack_at<int8_t>, ARG("weight"), nb::arg("level") = nb::none())
      .def("__init__", &pack_at<float>, ARG("weight"), nb::arg("level") = nb::none())
      .def_ro("n", &Packed::n)
      .def_ro("k", &Packed::k)
      .def_ro("int8", &Packed::int8)
      .def_ro("bytes", &Packed::bytes);

  auto level = nb::class_<Level>(m, "Level");
  level.def_prop_ro("name", [](const Level& l) { return std::string(l.name); });
  level.def_ro("panel", &Level::panel);
  bind_gemm<Matrix<const uint8_t>>(level);
  bind_gemm<Matrix<const float>>(level);
  level.def("sums", &sums, ARG("x"), nb::arg("packed"), ARG("out"));
  level.def("add_layernorm", &add_layernorm, ARG("x"), MAYBE("residual"), ARG("gamma"), ARG("beta"),
            nb::arg("eps"), MAYBE("out_f"), MAYBE("out_q"), nb::arg("inv_scale") = 1.0f,
            MAYBE("token_scale"));
  level.def("embed", &embed, ARG("ids"), ARG("types"), ARG("positions"), ARG("word"),
            ARG("position"), ARG("type"), ARG("gamma"), ARG("beta"), nb::arg("eps"), MAYBE("out_f"),
            MAYBE("out_q"), nb::arg("inv_scale") = 1.0f, MAYBE("token_scale"));
  level.def("quantize", &quantize, ARG("x"), ARG("out_q"), nb::arg("inv_scale") = 1.0f,
            MAYBE("token_scale"));
  bind_attention<float>(level);
  bind_attention<uint8_t>(level);
  level.def("mean", &mean, ARG("x"), ARG("cu_seqlens"), ARG("out"));

  m.def("find_level", &find_level, nb::arg("name") = "", nb::rv_policy::reference,
        "A level by name; the best that this CPU runs for \"\".");
  m.def("current_level", &current_level, nb::rv_policy::reference,
        "The level of this process: SAMP_CPU_LEVEL, else the best.");
}

}  // namespace samp
