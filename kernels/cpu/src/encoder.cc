// The ops of an encoder layer on a range of rows or panels.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "encoder_parts.h"

namespace samp {

Encoder::Encoder(const Level* level, const Shape& shape, int threads)
    : level_(level), shape_(shape), team_(std::max(threads, 1)) {
  layers.resize(static_cast<size_t>(shape.layers));
  executed_.assign(static_cast<size_t>(shape.layers) * 6, 0);
  seconds_.assign(static_cast<size_t>(shape.layers * kOps), 0.0);
  const size_t n = static_cast<size_t>(team_.threads());
  ticks_.assign(n, seconds_);
  local_.resize(n);
  for (auto& rows : local_) rows = std::make_unique<Rows>();
  scratch_.resize(n);
  scratch_bytes_.assign(n, 0);
  whole_ = std::make_unique<Rows>();
  pooled_ = std::make_unique<Rows>();
}

Encoder::~Encoder() = default;

void Encoder::run(const Input& input, Output output, float* out) {
  Pass pass;
  pass.in = input;
  pass.output = output;
  pass.result = out;
  pass.self = this;
  plan(pass);
  std::fill(executed_.begin(), executed_.end(), uint8_t{0});
  for (auto& ticks : ticks_) std::fill(ticks.begin(), ticks.end(), 0.0);
  const auto begin = std::chrono::steady_clock::now();
  team_.run(pass.tasks, &Encoder::work, &pass);
  const long h = shape_.hidden;
  const Rows& last = output == Output::first ? *pooled_ : *whole_;
  const bool in_blocks = !pass.blocks.empty();
  if (output == Output::first) {
    std::memcpy(out, last.res.get(), static_cast<size_t>(input.sequences * h) * sizeof(float));
  } else if (!in_blocks && output == Output::mean) {
    Clock clock(*this, Op::pool, 0, 0);
    for (long i = 0; i < input.sequences; ++i)
      level_->mean_rows(last.res.get(), h, input.cu[i], input.cu[i + 1], h, out + i * h);
  } else if (!in_blocks && classifier.packed == nullptr) {
    std::memcpy(out, last.res.get(), static_cast<size_t>(input.tokens * h) * sizeof(float));
  }
  if (!timed_) return;
  // Threads work side by side: each op's share of all work, of the time that passed.
  passed_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::fill(seconds_.begin(), seconds_.end(), 0.0);
  double sum = 0.0;
  for (const auto& ticks : ticks_)
    for (size_t i = 0; i < ticks.size(); ++i) {
      seconds_[i] += ticks[i];
      sum += ticks[i];
    }
  for (double& s : seconds_) s *= passed_ / std::max(sum, 1e-12);
}

namespace {

// Where a layer norm puts the rows that `next` reads: always as float (the residual), quantized too
// if that site is int8.
RowOut feed(const Site* next, float* res, uint8_t* xq, float* token_scale, long width) {
  RowOut out;
  out.out_f = res;
  out.ld_f = width;
  if (next != nullptr && next->int8) {
    out.out_q = xq;
    out.ld_q = width;
    if (next->per_token)
      out.token_scale = token_scale;
    else
      out.inv_scale = 1.0f / next->input_scale;
  }
  return out;
}

void set_side(Epilogue& e, const Site& site, const float* x, long ld) {
  if (site.side_index.empty()) return;
  e.side_x = x;
  e.ld_side = ld;
  e.side_index = site.side_index.data();
  e.side_w = site.side_w.data();
  e.side_width = site.n;
  e.side_k = static_cast<long>(site.side_index.size());
}

}  // namespace

void Encoder::embed(const Input& in, Rows& rows, long row0, long row1, int thread) {
  Clock clock(*this, Op::embed, 0, thread);
  Embed e;
  e.ids = in.ids;
  e.types = in.types;
  e.positions = in.positions;
  e.word = tables.word;
  e.position = tables.position;
  e.type = tables.type;
  e.ln = {tables.ln.gamma.data(), tables.ln.beta.data(), shape_.eps};
  e.width = shape_.hidden;
  e.out = feed(&layers[0].qkv, rows.res.get(), rows.xq.get(), rows.token_scale.get(), e.width);
  level_->embed(e, row0, row1);
}

void Encoder::gemm(Op op, int layer, const Site& site, Gemm g, long row0, long row1, long panel0,
                   long panel1, int thread) {
  Clock clock(*this, op, layer, thread);
  g.packed = site.packed;
  if (panel1 == ceil_div(site.n, level_->panel)) g.next = after(op, layer);
  g.n = site.n;
  g.k = site.k;
  g.ep.bias = site.bias.data();
  if (site.int8) g.ep.col_scale = site.col_scale.data();
  if (site.int8)
    level_->gemm_int8(g, row0, row1, panel0, panel1);
  else
    level_->gemm_f32(g, row0, row1, panel0, panel1);
  ran(op, layer, site.int8);
}

// The weight that is read after an op's own.
const void* Encoder::after(Op op, int layer) const {
  const Layer& l = layers[static_cast<size_t>(layer)];
  switch (op) {
    case Op::qkv: return l.out.packed;
    case Op::out: return l.ffn_in.packed;
    case Op::ffn_in: return l.ffn_out.packed;
    case Op::ffn_out:
      return layer + 1 < shape_.layers ? layers[static_cast<size_t>(layer) + 1].qkv.packed
                                       : nullptr;
    default: return nullptr;
  }
}

void Encoder::ran(Op op, int layer, bool int8, bool int8_context) {
  static constexpr int kPlace[kOps] = {-1, 0, 1, 3, -1, 4, 5, -1, -1, -1};
  const int place = kPlace[static_cast<int>(op)];
  if (place < 0) return;
  uint8_t* at = executed_.data() + static_cast<size_t>(layer) * 6 + place;
  __atomic_store_n(at, int8 ? 2 : 1, __ATOMIC_RELAXED);
  if (op == Op::attention) __atomic_store_n(at + 1, int8_context ? 2 : 1, __ATOMIC_RELAXED);
}

void Encoder::qkv(int l, Rows& rows, long row0, long row1, long panel0, long panel1, int thread) {
  const Layer& layer = layers[static_cast<size_t>(l)];
  const long h = shape_.hidden;
  Gemm g;
  read_norm(g, layer.qkv, rows);
  if (layer.int8_scores && layer.int8_context) {
    g.ep.out_q = rows.qkv_q.get();
    g.ep.ld_q = 3 * h;
    g.ep.inv_scale_col = layer.qkv_inv.data();
  } else {
    g.ep.out_f = rows.qkv_f.get();
    g.ep.ld_f = 3 * h;
  }
  gemm(Op::qkv, l, layer.qkv, g, row0, row1, panel0, panel1, thread);
}

// The input of qkv and ffn_in: what the layer norm before them wrote.
void Encoder::read_norm(Gemm& g, const Site& site, const Rows& rows) const {
  const long h = shape_.hidden;
  g.ld_x = h;
  if (site.int8)
    g.x = rows.xq.get();
  else
    g.x = rows.res.get();
  if (site.int8 && site.per_token) g.ep.row_scale = rows.token_scale.get();
  set_side(g.ep, site, rows.res.get(), h);
}

// One sequence. `pooled` >= 0: its first token alone, to that row of the pooled rows, and with it
// the token's residual.
void Encoder::attention(int l, Rows& rows, const int32_t* cu, long sequence, long head0, long head1,
                        long pooled, int thread) {
  Clock clock(*this, Op::attention, l, thread);
  const Layer& layer = layers[static_cast<size_t>(l)];
  const long h = shape_.hidden;
  Attention a;
  const bool quantized = layer.int8_scores && layer.int8_context;
  a.qkv_f = quantized ? nullptr : rows.qkv_f.get();
  a.qkv_q = quantized ? rows.qkv_q.get() : nullptr;
  a.ld = 3 * h;
  a.heads = shape_.heads;
  a.head_dim = h / shape_.heads;
  a.position_bias = position_bias.empty() ? nullptr : position_bias.data();
  a.reach = reach;
  a.int8_scores = layer.int8_scores;
  a.int8_context = layer.int8_context;
  a.q_scale = layer.q_scale;
  a.k_scale = layer.k_scale;
  a.p_scale = layer.p_scale;
  a.v_scale = layer.v_scale;
  a.first_only = pooled >= 0;
  Rows& to = pooled >= 0 ? *pooled_ : rows;
  if (layer.out.int8) {
    a.out.out_q = to.ctx_q.get();
    a.out.ld_q = h;
    a.out.inv_scale = 1.0f / layer.out.input_scale;
  }
  if (!layer.out.int8 || !layer.out.side_index.empty()) {
    a.out.out_f = to.ctx_f.get();
    a.out.ld_f = h;
  }
  uint8_t* raw = scratch_[static_cast<size_t>(thread)].get();
  void* scratch = raw + (64 - reinterpret_cast<uintptr_t>(raw) % 64) % 64;
  const long begin = cu[sequence];
  level_->attention(a, begin, cu[sequence + 1], pooled, head0, head1, scratch);
  if (pooled >= 0 && head0 == 0)
    std::memcpy(to.res.get() + pooled * h, rows.res.get() + begin * h,
                static_cast<size_t>(h) * sizeof(float));
  ran(Op::attention, l, layer.int8_scores, layer.int8_context);
}

void Encoder::out(int l, Rows& rows, long row0, long row1, long panel0, long panel1, int thread) {
  const Layer& layer = layers[static_cast<size_t>(l)];
  const long h = shape_.hidden;
  Gemm g;
  g.ld_x = h;
  if (layer.out.int8)
    g.x = rows.ctx_q.get();
  else
    g.x = rows.ctx_f.get();
  set_side(g.ep, layer.out, rows.ctx_f.get(), h);
  add_residual(g, rows);
  gemm(Op::out, l, layer.out, g, row0, row1, panel0, panel1, thread);
}

// In place: each element of the residual is read and written by the same epilogue step.
void Encoder::add_residual(Gemm& g, Rows& rows) const {
  g.ep.residual = g.ep.out_f = rows.res.get();
  g.ep.ld_residual = g.ep.ld_f = shape_.hidden;
}

void Encoder::ffn_in(int l, Rows& rows, long row0, long row1, long panel0, long panel1,
                     int thread) {
  const Layer& layer = layers[static_cast<size_t>(l)];
  Gemm g;
  read_norm(g, layer.ffn_in, rows);
  g.ep.act = shape_.act;
  if (layer.ffn_out.int8) {
    g.ep.out_q = rows.mid_q.get();
    g.ep.ld_q = shape_.ffn;
    g.ep.inv_scale = 1.0f / layer.ffn_out.input_scale;
  }
  if (!layer.ffn_out.int8 || !layer.ffn_out.side_index.empty()) {
    g.ep.out_f = rows.mid_f.get();
    g.ep.ld_f = shape_.ffn;
  }
  gemm(Op::ffn_in, l, layer.ffn_in, g, row0, row1, panel0, panel1, thread);
}

void Encoder::ffn_out(int l, Rows& rows, long row0, long row1, long panel0, long panel1,
                      int thread) {
  const Layer& layer = layers[static_cast<size_t>(l)];
  Gemm g;
  g.ld_x = shape_.ffn;
  if (layer.ffn_out.int8)
    g.x = rows.mid_q.get();
  else
    g.x = rows.mid_f.get();
  set_side(g.ep, layer.ffn_out, rows.mid_f.get(), shape_.ffn);
  add_residual(g, rows);
  gemm(Op::ffn_out, l, layer.ffn_out, g, row0, row1, panel0, panel1, thread);
}

void Encoder::norm(Op op, int l, Rows& rows, long row0, long row1, int thread) {
  Clock clock(*this, op, l, thread);
  const Layer& layer = layers[static_cast<size_t>(l)];
  const bool inner = op == Op::attention_ln;
  const Norm& ln = inner ? layer.attention_ln : layer.output_ln;
  const Site* next = inner                   ? &layer.ffn_in
                     : l + 1 < shape_.layers ? &layers[static_cast<size_t>(l) + 1].qkv
                                             : nullptr;
  AddLayerNorm a;
  a.x = rows.res.get();
  a.ld_x = a.width = shape_.hidden;
  a.ln = {ln.gamma.data(), ln.beta.data(), shape_.eps};
  a.out = feed(next, rows.res.get(), rows.xq.get(), rows.token_scale.get(), a.width);
  level_->add_layernorm(a, row0, row1);
}

// Everything of a layer that stays within a row.
void Encoder::tail(int l, Rows& rows, long row0, long row1, int thread) {
  const Layer& layer = layers[static_cast<size_t>(l)];
  auto panels = [&](const Site& site) { return ceil_div(site.n, level_->panel); };
  out(l, rows, row0, row1, 0, panels(layer.out), thread);
  norm(Op::attention_ln, l, rows, row0, row1, thread);
  ffn_in(l, rows, row0, row1, 0, panels(layer.ffn_in), thread);
  ffn_out(l, rows, row0, row1, 0, panels(layer.ffn_out), thread);
  norm(Op::output_ln, l, rows, row0, row1, thread);
}

}  // namespace samp
