// How one pass is spread over threads.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "encoder_parts.h"

namespace samp {

// Three ways to spread a pass over threads. Many rows in several sequences: whole sequences, so
// that threads never meet. Few long sequences: rows between attentions, then heads. Few rows: the
// columns of each weight, since reading weights is what takes the time. One thread: the first.
void Encoder::plan(Pass& pass) {
  const Input& in = pass.in;
  const long threads = team_.threads();
  const int last = static_cast<int>(shape_.layers) - 1;
  long longest = 0;
  for (long i = 0; i < in.sequences; ++i)
    longest = std::max<long>(longest, in.cu[i + 1] - in.cu[i]);
  const size_t scratch = level_->attention_scratch(shape_.hidden / shape_.heads, longest);
  for (size_t t = 0; t < scratch_.size(); ++t)
    if (scratch_bytes_[t] < scratch) {
      scratch_[t].reset(new uint8_t[scratch + 64]);
      scratch_bytes_[t] = scratch;
    }

  // Longest first into the emptiest block.
  long count = std::max(threads, ceil_div(ceil_div(in.tokens, level_->block), threads) * threads);
  if (threads == 1) count = ceil_div(in.tokens, level_->block);
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
  const bool few = in.tokens < level_->split * threads;
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
    const long chunks = threads * ceil_div(in.tokens, threads * level_->block);
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
  auto panels = [&](const Site& site) {
    return part(ceil_div(site.n, level_->panel), parts, task);
  };
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
  const long pieces = ceil_div(total, level_->block);
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

}  // namespace samp
