// What encoder.cc (the ops of a layer) and schedule.cc (who runs them) share.
#pragma once

#include <chrono>
#include <cstdlib>
#include <new>

#include "encoder.h"

namespace samp {

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
inline Span part(long n, long parts, long i) { return {n * i / parts, n * (i + 1) / parts}; }

inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

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
    sum_ = &e.ticks_[static_cast<size_t>(thread)]
                    [static_cast<size_t>(layer * kOps) + static_cast<size_t>(op)];
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

}  // namespace samp
