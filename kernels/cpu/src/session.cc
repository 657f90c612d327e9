// The native encoder as Python sees it. Arrays are checked here; below this file nothing is.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "encoder.h"
#include "packed.h"

namespace nb = nanobind;

namespace samp {
namespace {

using F1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using F2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using I1 = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

std::vector<float> floats(const F1& x, long n, const char* name) {
  if (static_cast<long>(x.shape(0)) != n)
    refuse(std::string(name) + ": " + std::to_string(x.shape(0)) + " values; wanted " +
           std::to_string(n));
  return {x.data(), x.data() + n};
}

void within(const int32_t* index, long n, long below, const char* name) {
  int32_t low = 0, high = 0;
  for (long i = 0; i < n; ++i) {
    low = index[i] < low ? index[i] : low;
    high = index[i] > high ? index[i] : high;
  }
  if (low < 0 || high >= below)
    refuse(std::string(name) + " from " + std::to_string(low) + " to " + std::to_string(high) +
           "; allowed: 0 to " + std::to_string(below - 1));
}

class Session {
 public:
  Session(const Level* level, long layers, long hidden, long heads, long ffn, int act, float eps,
          int threads)
      : shape_{layers, hidden, heads, ffn, static_cast<Act>(act), eps},
        encoder_(std::make_unique<Encoder>(level, shape_, threads)) {}

  void set_embeddings(F2 word, F2 position, F2 type, F1 gamma, F1 beta) {
    for (const F2* table : {&word, &position, &type})
      if (static_cast<long>(table->shape(1)) != shape_.hidden)
        refuse("an embedding table of width " + std::to_string(table->shape(1)) + "; wanted " +
               std::to_string(shape_.hidden));
    Tables& t = encoder().tables;
    t.word = word.data();
    t.position = position.data();
    t.type = type.data();
    t.ln.gamma = floats(gamma, shape_.hidden, "gamma");
    t.ln.beta = floats(beta, shape_.hidden, "beta");
    rows_[0] = static_cast<long>(word.shape(0));
    rows_[1] = static_cast<long>(position.shape(0));
    rows_[2] = static_cast<long>(type.shape(0));
    tables_ = {word, position, type};  // The arrays stay where they are: often a mapped file.
  }

  // input_scale: of a static int8 site; 0: a scale for each token; < 0: fp32.
  void set_gemm(long layer, const std::string& which, nb::object packed, F1 bias, F1 weight_scale,
                float input_scale, I1 outliers, F1 outlier_weight) {
    const Packed& weight = nb::cast<const Packed&>(packed);
    Site site;
    site.packed = weight.data;
    site.n = weight.n;
    site.k = weight.k;
    site.int8 = weight.int8;
    site.per_token = weight.int8 && input_scale == 0.0f;
    site.input_scale = input_scale > 0.0f ? input_scale : 1.0f;
    site.bias = floats(bias, site.n, "bias");
    if (site.int8) {
      if (!(input_scale >= 0.0f)) refuse("an int8 weight without the scale of its input");
      site.col_scale = floats(weight_scale, site.n, "weight_scale");
      for (float& s : site.col_scale) s *= site.input_scale;
    }
    const long kept = static_cast<long>(outliers.shape(0));
    within(outliers.data(), kept, site.k, "outliers");
    site.side_index.assign(outliers.data(), outliers.data() + kept);
    site.side_w = floats(outlier_weight, kept * site.n, "outlier_weight");
    const long h = shape_.hidden, f = shape_.ffn;
    if (which == "classifier") {
      check(site, site.n, h);
      encoder().classifier = std::move(site);
    } else {
      Layer& l = at(layer);
      Site* to = which == "qkv"      ? &l.qkv
                 : which == "out"    ? &l.out
                 : which == "ffn_in" ? &l.ffn_in
                                     : &l.ffn_out;
      check(site, to == &l.qkv ? 3 * h : to == &l.ffn_in ? f : h, to == &l.ffn_out ? f : h);
      *to = std::move(site);
    }
    keep_.push_back(packed);
  }

  void set_norm(long layer, const std::string& which, F1 gamma, F1 beta) {
    Norm& ln = which == "attention_ln" ? at(layer).attention_ln : at(layer).output_ln;
    ln.gamma = floats(gamma, shape_.hidden, "gamma");
    ln.beta = floats(beta, shape_.hidden, "beta");
  }

  // A scale of 0 says that the site is fp32.
  void set_attention(long layer, float q, float k, float p, float v) {
    Layer& l = at(layer);
    l.int8_scores = q > 0.0f && k > 0.0f;
    l.int8_context = p > 0.0f && v > 0.0f;
    if (l.int8_scores) l.q_scale = q, l.k_scale = k;
    if (l.int8_context) l.p_scale = p, l.v_scale = v;
    if (!l.int8_scores || !l.int8_context) return;
    const auto h = static_cast<size_t>(shape_.hidden);
    l.qkv_inv.assign(3 * h, 1.0f / q);
    for (size_t i = 0; i < h; ++i) {
      l.qkv_inv[h + i] = 1.0f / k;
      l.qkv_inv[2 * h + i] = 1.0f / v;
    }
  }

  // Of every layer: [heads, 2 n - 1], n the longest sequence that can run.
  void set_position_bias(F2 table) {
    const long heads = static_cast<long>(table.shape(0));
    const long distances = static_cast<long>(table.shape(1));
    if (heads != shape_.heads || distances % 2 == 0)
      refuse("position_bias [" + std::to_string(heads) + ", " + std::to_string(distances) +
             "]; wanted [" + std::to_string(shape_.heads) + ", 2 n - 1]");
    encoder().position_bias.assign(table.data(), table.data() + heads * distances);
    encoder().reach = (distances + 1) / 2;
  }

  nb::object run(I1 ids, I1 types, I1 positions, I1 cu, int output, bool timed) {
    Encoder& e = encoder();
    const long tokens = static_cast<long>(ids.shape(0));
    const long sequences = static_cast<long>(cu.shape(0)) - 1;
    if (static_cast<long>(types.shape(0)) != tokens ||
        static_cast<long>(positions.shape(0)) != tokens)
      refuse("ids, types and positions of different lengths");
    if (sequences < 1 || cu.data()[0] != 0 || cu.data()[sequences] != tokens)
      refuse("cu_seqlens that do not run from 0 to " + std::to_string(tokens));
    for (long i = 0; i < sequences; ++i)
      if (cu.data()[i] >= cu.data()[i + 1]) refuse("cu_seqlens that do not rise");
    for (long i = 0; i < sequences && e.reach > 0; ++i)
      if (cu.data()[i + 1] - cu.data()[i] > e.reach)
        refuse("a sequence of " + std::to_string(cu.data()[i + 1] - cu.data()[i]) +
               " tokens; allowed: at most " + std::to_string(e.reach) + ", for its position bias");
    within(ids.data(), tokens, rows_[0], "ids");
    within(positions.data(), tokens, rows_[1], "positions");
    within(types.data(), tokens, rows_[2], "types");
    const auto kind = static_cast<Output>(output);
    const long rows = kind == Output::tokens ? tokens : sequences;
    const bool logits = kind == Output::tokens && e.classifier.packed != nullptr;
    const long width = logits ? e.classifier.n : shape_.hidden;
    auto* out = new float[static_cast<size_t>(rows * width)];
    nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    e.time(timed);
    {
      nb::gil_scoped_release release;
      e.run({ids.data(), types.data(), positions.data(), cu.data(), tokens, sequences}, kind, out);
    }
    size_t shape[2] = {static_cast<size_t>(rows), static_cast<size_t>(width)};
    return nb::cast(nb::ndarray<nb::numpy, float>(out, 2, shape, owner));
  }

  std::vector<double> seconds() { return encoder().seconds(); }

  std::pair<double, std::vector<std::vector<double>>> busy() {
    return {encoder().passed(), encoder().busy()};
  }

  std::vector<int> executed() {
    const auto& x = encoder().executed();
    return {x.begin(), x.end()};
  }

  void close() {
    encoder_.reset();
    keep_.clear();
    tables_.clear();
  }

 private:
  Encoder& encoder() {
    if (encoder_ == nullptr) refuse("the session is closed");
    return *encoder_;
  }

  Layer& at(long layer) {
    if (layer < 0 || layer >= shape_.layers) refuse("layer " + std::to_string(layer));
    return encoder().layers[static_cast<size_t>(layer)];
  }

  void check(const Site& site, long n, long k) const {
    if (site.n != n || site.k != k)
      refuse("a weight [" + std::to_string(site.n) + ", " + std::to_string(site.k) + "]; wanted [" +
             std::to_string(n) + ", " + std::to_string(k) + "]");
  }

  Shape shape_;
  std::unique_ptr<Encoder> encoder_;
  std::vector<nb::object> keep_;
  std::vector<F2> tables_;
  long rows_[3] = {0, 0, 0};
};

}  // namespace

void bind_session(nb::module_& m) {
  nb::class_<Session>(m, "Session")
      .def("__init__",
           [](Session* self, const Level& level, long layers, long hidden, long heads, long ffn,
              int act, float eps, int threads) {
             if (layers < 1 || heads < 1 || hidden < heads || hidden % heads || hidden % 4 ||
                 ffn % 4)
               refuse("hidden " + std::to_string(hidden) + ", heads " + std::to_string(heads) +
                      ", ffn " + std::to_string(ffn) +
                      "; wanted multiples of 4, hidden a multiple of heads");
             new (self) Session(&level, layers, hidden, heads, ffn, act, eps, threads);
           })
      .def("set_embeddings", &Session::set_embeddings)
      .def("set_gemm", &Session::set_gemm)
      .def("set_norm", &Session::set_norm)
      .def("set_attention", &Session::set_attention)
      .def("set_position_bias", &Session::set_position_bias)
      .def("run", &Session::run)
      .def("seconds", &Session::seconds)
      .def("busy", &Session::busy)
      .def("executed", &Session::executed)
      .def("close", &Session::close);
}

}  // namespace samp
