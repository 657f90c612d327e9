#include "encoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>

namespace samp {
namespace {

// Rows that go through a layer together: their intermediates stay in L2, and a panel of weights that
// was fetched once is used for all of them. A multiple of every level's tile height.
constexpr long kBlock = 96;
// Below this many rows a thread, weights are split over threads instead of rows.
constexpr long kSplitRows = 24;

template <typename T>
class Buffer {  // uninitialised and 64-byte aligned; memory is touched when it is first used
 public:
  void reserve(size_t count) {
    if (count <= count_) return;
    std::free(data_);
    data_ = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
    if (data_ == nullptr) {
      count_ = 0;
      throw std::bad_alloc();
    }
    count_ = count;
  }
  ~Buffer() { std::free(data_); }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

struct Span {
  long first, last;
};

// Part i of `parts` nearly equal parts of [0, n).
Span part(long n, long parts, long i) { return {n * i / parts, n * (i + 1) / parts}; }

long ceil_div(long a, long b) { return (a + b - 1) / b; }

}  // namespace

struct Encoder::Rows {
  Buffer<float> res, qkv_f, ctx_f, mid_f, token_scale;
  Buffer<uint8_t> xq, qkv_q, ctx_q, mid_q;
  Buffer<int32_t> ids, types, positions, cu;

  void reserve(const Shape& s, long rows) {
    const size_t n = static_cast<size_t>(std::max(rows, 1L));
    const size_t h = static_cast<size_t>(s.hidden), f = static_cast<size_t>(s.ffn);
    for (auto* b : {&res, &ctx_f}) b->reserve(n * h);
    for (auto* b : {&xq, &ctx_q}) b->reserve(n * h);
    qkv_f.reserve(n * 3 * h);
    qkv_q.reserve(n * 3 * h);
    mid_f.reserve(n * f);
    mid_q.reserve(n * f);
    token_scale.reserve(n);
    for (auto* b : {&ids, &types, &positions}) b->reserve(n);
    cu.reserve(n + 1);
  }
};

// One kind of phase: who does what to which rows.
enum class Kind : int {
  blocks,     // whole sequences through all layers
  embed,      // rows
  chain,      // rows: the rest of layer - 1 (or the embedding), then qkv of this layer
  rest,       // rows: everything after attention in the last layer
  qkv,        // panels
  attention,  // sequences and heads
  out,        // panels
  out_norm,   // rows
  ffn_in,     // panels
  ffn_out,    // panels
  ffn_norm,   // rows
  logits,     // rows
};

struct Encoder::Pass {
  struct Phase {
    Kind kind;
    int layer;
    Rows* rows;
    long count;  // rows
  };
  struct Attend {
    long sequence, head0, head1;
  };
  Input in;
  Output output;
  float* result;
  Encoder* self;
  std::vector<Phase> phases;
  std::vector<int> tasks;
  std::vector<std::vector<int>> blocks;
  std::vector<Attend> attends;
};

class Encoder::Clock {
 public:
  Clock(Encoder& e, Op op, int layer, int thread) : on_(e.timed_) {
    if (!on_) return;
    sum_ = &e.ticks_[static_cast<size_t>(thread)][static_cast<size_t>(layer * kOps) +
                                                  static_cast<size_t>(op)];
    begin_ = std::chrono::steady_clock::now();
  }
  ~Clock() {
    if (on_)
      *sum_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  bool on_;
  double* sum_ = nullptr;
  std::chrono::steady_clock::time_point begin_;
};

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
  const double passed =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::fill(seconds_.begin(), seconds_.end(), 0.0);
  double sum = 0.0;
  for (const auto& ticks : ticks_)
    for (size_t i = 0; i < ticks.size(); ++i) {
      seconds_[i] += ticks[i];
      sum += ticks[i];
    }
  for (double& s : seconds_) s *= passed / std::max(sum, 1e-12);
}

// Three ways to spread a pass over threads. Many rows in several sequences: whole sequences, so that
// threads never meet. Few long sequences: rows between attentions, then heads. Few rows: the columns
// of each weight, since reading weights is what takes the time. One thread: the first.
void Encoder::plan(Pass& pass) const {
  const Input& in = pass.in;
  const long threads = team_.threads();
  const int last = static_cast<int>(shape_.layers) - 1;
  long longest = 0;
  for (long i = 0; i < in.sequences; ++i) longest = std::max<long>(longest, in.cu[i + 1] - in.cu[i]);
  const size_t scratch = level_->attention_scratch(shape_.hidden / shape_.heads, longest);
  auto& self = const_cast<Encoder&>(*this);
  for (size_t t = 0; t < scratch_.size(); ++t)
    if (scratch_bytes_[t] < scratch) {
      self.scratch_[t].reset(new uint8_t[scratch + 64]);
      self.scratch_bytes_[t] = scratch;
    }

  // Longest first into the emptiest block.
  long count = std::max(threads, ceil_div(ceil_div(in.tokens, kBlock), threads) * threads);
  if (threads == 1) count = ceil_div(in.tokens, kBlock);
  count = std::min(count, in.sequences);
  std::vector<int> order(static_cast<size_t>(in.sequences));
  std::iota(order.begin(), order.end(), 0);
  auto length = [&](int i) { return in.cu[i + 1] - in.cu[i]; };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return length(a) > length(b); });
  std::vector<std::vector<int>> blocks(static_cast<size_t>(count));
  std::vector<long> fill(static_cast<size_t>(count), 0);
  for (int i : order) {
    const auto at = static_cast<size_t>(std::min_element(fill.begin(), fill.end()) - fill.begin());
    blocks[at].push_back(i);
    fill[at] += length(i);
  }
  std::vector<long> busy(static_cast<size_t>(threads), 0);
  for (long rows : fill) *std::min_element(busy.begin(), busy.end()) += rows;
  const long slowest = *std::max_element(busy.begin(), busy.end());
  const bool few = in.tokens < kSplitRows * threads;
  const bool whole = threads == 1 || (!few && slowest * threads * 8 <= in.tokens * 9);

  auto add = [&](Kind kind, int layer, Rows* rows, long n, long tasks) {
    pass.phases.push_back({kind, layer, rows, n});
    pass.tasks.push_back(static_cast<int>(std::max(tasks, 1L)));
  };
  auto panels = [&](const Site& site) {
    return std::min(ceil_div(site.n, level_->panel), threads == 1 ? 1 : 3 * threads);
  };
  auto row_tasks = [&](long n) { return std::min(threads, ceil_div(n, 8)); };
  auto split_tail = [&](int layer, Rows* rows, long n) {
    const Layer& l = layers[static_cast<size_t>(layer)];
    add(Kind::out, layer, rows, n, panels(l.out));
    add(Kind::out_norm, layer, rows, n, row_tasks(n));
    add(Kind::ffn_in, layer, rows, n, panels(l.ffn_in));
    add(Kind::ffn_out, layer, rows, n, panels(l.ffn_out));
    add(Kind::ffn_norm, layer, rows, n, row_tasks(n));
  };

  if (pass.output == Output::first) pooled_->reserve(shape_, in.sequences);
  if (whole) {
    for (const auto& block : blocks) {
      long rows = 0;
      for (int i : block) rows += length(i);
      for (const auto& local : local_) local->reserve(shape_, rows);
    }
    pass.blocks = std::move(blocks);
    add(Kind::blocks, 0, nullptr, in.tokens, count);
  } else {
    Rows* rows = whole_.get();
    rows->reserve(shape_, in.tokens);
    // Heads are shared out until every thread has a few pieces.
    long pieces = std::min(shape_.heads, ceil_div(4 * threads, in.sequences));
    for (long i = 0; i < in.sequences; ++i)
      for (long p = 0; p < pieces; ++p) {
        const Span heads = part(shape_.heads, pieces, p);
        pass.attends.push_back({i, heads.first, heads.last});
      }
    const long attends = static_cast<long>(pass.attends.size());
    const long chunks = threads * ceil_div(in.tokens, threads * kBlock);
    if (few) add(Kind::embed, 0, rows, in.tokens, row_tasks(in.tokens));
    for (int l = 0; l <= last; ++l) {
      if (few)
        add(Kind::qkv, l, rows, in.tokens, panels(layers[static_cast<size_t>(l)].qkv));
      else
        add(Kind::chain, l, rows, in.tokens, chunks);
      add(Kind::attention, l, rows, in.tokens, attends);
      if (l == last && pass.output == Output::first) break;
      if (few) split_tail(l, rows, in.tokens);
    }
    if (pass.output != Output::first) {
      if (!few) add(Kind::rest, last, rows, in.tokens, chunks);
      if (pass.output == Output::tokens && classifier.packed != nullptr)
        add(Kind::logits, last, rows, in.tokens, row_tasks(in.tokens));
    }
  }
  if (pass.output == Output::first) split_tail(last, pooled_.get(), in.sequences);
}

void Encoder::work(void* context, int phase, int task, int thread) {
  Pass& pass = *static_cast<Pass*>(context);
  pass.self->step(pass, phase, task, thread);
}

void Encoder::step(Pass& pass, int index, int task, int thread) {
  const Pass::Phase& phase = pass.phases[static_cast<size_t>(index)];
  const int parts = pass.tasks[static_cast<size_t>(index)];
  const int l = phase.layer;
  const Layer& layer = layers[static_cast<size_t>(l)];
  const bool first = pass.output == Output::first && l + 1 == shape_.layers;
  const Span rows = part(phase.count, parts, task);
  auto panels = [&](const Site& site) { return part(ceil_div(site.n, level_->panel), parts, task); };
  switch (phase.kind) {
    case Kind::blocks: return block(pass, task, thread);
    case Kind::embed: return embed(pass.in, *phase.rows, rows.first, rows.last, thread);
    case Kind::chain:
      if (l == 0)
        embed(pass.in, *phase.rows, rows.first, rows.last, thread);
      else
        tail(l - 1, *phase.rows, rows.first, rows.last, thread);
      return qkv(l, *phase.rows, rows.first, rows.last, 0, ceil_div(layer.qkv.n, level_->panel),
                 thread);
    case Kind::rest: return tail(l, *phase.rows, rows.first, rows.last, thread);
    case Kind::qkv: {
      const Span p = panels(layer.qkv);
      return qkv(l, *phase.rows, 0, phase.count, p.first, p.last, thread);
    }
    case Kind::attention: {
      const Pass::Attend& a = pass.attends[static_cast<size_t>(task)];
      return attention(l, *phase.rows, pass.in.cu, a.sequence, a.head0, a.head1,
                       first ? a.sequence : -1, thread);
    }
    case Kind::out: {
      const Span p = panels(layer.out);
      return out(l, *phase.rows, 0, phase.count, p.first, p.last, thread);
    }
    case Kind::out_norm:
      return norm(Op::attention_ln, l, *phase.rows, rows.first, rows.last, thread);
    case Kind::ffn_in: {
      const Span p = panels(layer.ffn_in);
      return ffn_in(l, *phase.rows, 0, phase.count, p.first, p.last, thread);
    }
    case Kind::ffn_out: {
      const Span p = panels(layer.ffn_out);
      return ffn_out(l, *phase.rows, 0, phase.count, p.first, p.last, thread);
    }
    case Kind::ffn_norm: return norm(Op::output_ln, l, *phase.rows, rows.first, rows.last, thread);
    case Kind::logits: {
      Gemm g;
      g.ep.out_f = pass.result;
      g.ep.ld_f = classifier.n;
      g.x = phase.rows->res.get();
      g.ld_x = shape_.hidden;
      return gemm(Op::logits, l, classifier, g, rows.first, rows.last, 0,
                  ceil_div(classifier.n, level_->panel), thread);
    }
  }
}

void Encoder::block(Pass& pass, int index, int thread) {
  const std::vector<int>& sequences = pass.blocks[static_cast<size_t>(index)];
  const Input& in = pass.in;
  Rows& rows = *local_[static_cast<size_t>(thread)];
  const long count = static_cast<long>(sequences.size()), h = shape_.hidden;
  int32_t* cu = rows.cu.get();
  cu[0] = 0;
  for (long i = 0; i < count; ++i) {
    const int s = sequences[static_cast<size_t>(i)];
    const long n = in.cu[s + 1] - in.cu[s];
    const auto bytes = static_cast<size_t>(n) * sizeof(int32_t);
    std::memcpy(rows.ids.get() + cu[i], in.ids + in.cu[s], bytes);
    std::memcpy(rows.types.get() + cu[i], in.types + in.cu[s], bytes);
    std::memcpy(rows.positions.get() + cu[i], in.positions + in.cu[s], bytes);
    cu[i + 1] = cu[i] + static_cast<int32_t>(n);
  }
  const long total = cu[count];
  const long pieces = ceil_div(total, kBlock);
  const Input local{rows.ids.get(), rows.types.get(), rows.positions.get(), cu, total, count};
  const int last = static_cast<int>(shape_.layers) - 1;
  for (int l = 0; l <= last; ++l) {
    const long panels = ceil_div(layers[static_cast<size_t>(l)].qkv.n, level_->panel);
    for (long p = 0; p < pieces; ++p) {
      const Span r = part(total, pieces, p);
      if (l == 0)
        embed(local, rows, r.first, r.last, thread);
      else
        tail(l - 1, rows, r.first, r.last, thread);
      qkv(l, rows, r.first, r.last, 0, panels, thread);
    }
    const bool first = l == last && pass.output == Output::first;
    for (long i = 0; i < count; ++i)
      attention(l, rows, cu, i, 0, shape_.heads, first ? sequences[static_cast<size_t>(i)] : -1,
                thread);
  }
  if (pass.output == Output::first) return;
  for (long p = 0; p < pieces; ++p) {
    const Span r = part(total, pieces, p);
    tail(last, rows, r.first, r.last, thread);
  }
  for (long i = 0; i < count; ++i) {
    const long s = sequences[static_cast<size_t>(i)];
    const float* x = rows.res.get() + cu[i] * h;
    const long n = cu[i + 1] - cu[i];
    if (pass.output == Output::mean) {
      Clock clock(*this, Op::pool, 0, thread);
      level_->mean_rows(rows.res.get(), h, cu[i], cu[i + 1], h, pass.result + s * h);
    } else if (classifier.packed == nullptr) {
      std::memcpy(pass.result + in.cu[s] * h, x, static_cast<size_t>(n * h) * sizeof(float));
    } else {
      Gemm g;
      g.x = x;
      g.ld_x = h;
      g.ep.out_f = pass.result + in.cu[s] * classifier.n;
      g.ep.ld_f = classifier.n;
      gemm(Op::logits, last, classifier, g, 0, n, 0, ceil_div(classifier.n, level_->panel), thread);
    }
  }
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

// One sequence. `pooled` >= 0: its first token alone, to that row of the pooled rows, and with it the
// token's residual.
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

void Encoder::ffn_in(int l, Rows& rows, long row0, long row1, long panel0, long panel1, int thread) {
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
