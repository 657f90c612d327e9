// A whole encoder under one plan as one call: which ops run on which rows, in what order, on which
// thread. The mathematics is in the levels; nothing here depends on an instruction set.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "level.h"
#include "team.h"

namespace samp {

enum class Output : int { first = 0, mean = 1, tokens = 2 };

// One weight site. Pointers are kept alive by the Python session.
struct Site {
  bool int8 = false;
  bool per_token = false;    // the input has a scale for each token, written by the layer norm
  float input_scale = 1.0f;  // static scale of the input, when int8 and not per token
  const void* packed = nullptr;
  long n = 0, k = 0;
  std::vector<float> col_scale;  // int8: weight scale x static input scale
  std::vector<float> bias;
  std::vector<int32_t> side_index;  // the outlier split: input channels kept in float
  std::vector<float> side_w;        // [side_k, n]
};

struct Norm {
  std::vector<float> gamma, beta;
};

struct Layer {
  Site qkv, out, ffn_in, ffn_out;
  Norm attention_ln, output_ln;
  bool int8_scores = false, int8_context = false;
  float q_scale = 1, k_scale = 1, p_scale = 1, v_scale = 1;
  std::vector<float> qkv_inv;  // [3H] 1 / scale of q, k, v, when the gemm writes them quantized
};

struct Shape {
  long layers = 0, hidden = 0, heads = 0, ffn = 0;
  Act act = Act::gelu;
  float eps = 1e-12f;
};

struct Tables {
  const float* word = nullptr;
  const float* position = nullptr;
  const float* type = nullptr;
  Norm ln;
};

struct Input {
  const int32_t* ids;
  const int32_t* types;
  const int32_t* positions;
  const int32_t* cu;  // [sequences + 1]
  long tokens, sequences;
};

// Kinds of timed work, in the order of a layer.
enum class Op : int {
  embed = 0,
  qkv,
  attention,
  out,
  attention_ln,
  ffn_in,
  ffn_out,
  output_ln,
  pool,
  logits
};
constexpr int kOps = 10;

class Encoder {
 public:
  Encoder(const Level* level, const Shape& shape, int threads);
  ~Encoder();

  Tables tables;
  std::vector<Layer> layers;
  Site classifier;                   // packed == nullptr: none
  std::vector<float> position_bias;  // [heads, 2 reach - 1], or empty
  long reach = 0;

  // out: [B, H] for first and mean, [T, H] or [T, C] for tokens.
  void run(const Input& input, Output output, float* out);

  // Seconds of each op of the last timed pass, [layers * kOps + ...], scaled to add up to its time.
  void time(bool on) { timed_ = on; }
  const std::vector<double>& seconds() const { return seconds_; }
  // The same as each thread's own clock saw it, and the pass's time: what is missing of it, the
  // thread waited or was off its core.
  const std::vector<std::vector<double>>& busy() const { return ticks_; }
  double passed() const { return passed_; }

  // What the ops of the last pass really ran: 1 fp32, 2 int8; [layer][6 sites in the plan's order].
  const std::vector<uint8_t>& executed() const { return executed_; }

 private:
  struct Rows;  // activations of some rows
  struct Pass;  // one call of run
  class Clock;

  void plan(Pass& pass);
  static void work(void* context, int phase, int task, int thread);
  void step(Pass& pass, int phase, int task, int thread);

  void embed(const Input& in, Rows& rows, long row0, long row1, int thread);
  void gemm(Op op, int layer, const Site& site, Gemm g, long row0, long row1, long panel0,
            long panel1, int thread);
  void ran(Op op, int layer, bool int8, bool int8_context = false);
  const void* after(Op op, int layer) const;
  void read_norm(Gemm& g, const Site& site, const Rows& rows) const;
  void add_residual(Gemm& g, Rows& rows) const;
  void qkv(int layer, Rows& rows, long row0, long row1, long panel0, long panel1, int thread);
  void attention(int layer, Rows& rows, const int32_t* cu, long sequence, long head0, long head1,
                 long pooled, int thread);
  void out(int layer, Rows& rows, long row0, long row1, long panel0, long panel1, int thread);
  void ffn_in(int layer, Rows& rows, long row0, long row1, long panel0, long panel1, int thread);
  void ffn_out(int layer, Rows& rows, long row0, long row1, long panel0, long panel1, int thread);
  void norm(Op op, int layer, Rows& rows, long row0, long row1, int thread);
  void tail(int layer, Rows& rows, long row0, long row1, int thread);
  void block(Pass& pass, int index, int thread);

  const Level* level_;
  Shape shape_;
  Team team_;
  bool timed_ = false;
  double passed_ = 0.0;
  std::vector<double> seconds_;
  std::vector<uint8_t> executed_;
  std::unique_ptr<Rows> whole_, pooled_;
  std::vector<std::unique_ptr<Rows>> local_;  // one a thread
  std::vector<std::unique_ptr<uint8_t[]>> scratch_;
  std::vector<size_t> scratch_bytes_;
  std::vector<std::vector<double>> ticks_;  // [thread][layers * kOps]
};

}  // namespace samp
