// What one dispatch level exports, and the arguments of its ops.
//
// A level is this folder's *_impl.h files compiled once for one instruction set (level.cc). All
// pointers are caller-owned; rows are tokens, row-major; `ld*` are row strides in elements. int8
// activations are stored as u8 with zero point 128. No op allocates, locks or throws. Every op
// works on a range, so that the caller decides how the work is spread over threads; a row's result
// never depends on the range that it was computed in.
#pragma once

#include <cstddef>
#include <cstdint>

namespace samp {

enum class Act : int { none = 0, gelu = 1, gelu_tanh = 2, tanh = 3, relu = 4 };

// y = act(acc * row_scale[t] * col_scale[n] + side[t, n] + bias[n]) + residual[t, n], written as
// float, as u8 (q = clip(rint(y * inv_scale[n or 0]), -127, 127) + 128), or both.
struct Epilogue {
  const float* col_scale = nullptr;  // [N] weight scale x static input scale; null for fp32
  const float* row_scale = nullptr;  // [T] per-token input scale, or null
  const float* bias = nullptr;       // [N]
  Act act = Act::none;
  const float* residual = nullptr;  // [T, N] or null
  long ld_residual = 0;
  float* out_f = nullptr;  // [T, N] or null
  long ld_f = 0;
  uint8_t* out_q = nullptr;  // [T, N] or null
  long ld_q = 0;
  float inv_scale = 1.0f;  // of out_q
  const float* inv_scale_col =
      nullptr;  // [N], wins over inv_scale: q, k, v with scales of their own
  // The outlier split: side[t, n] = sum_j side_x[t, side_index[j]] * side_w[j, n].
  const float* side_x = nullptr;
  long ld_side = 0;
  const int32_t* side_index = nullptr;  // [side_k]
  const float* side_w = nullptr;        // [side_k, side_width], side_width >= N
  long side_width = 0;
  long side_k = 0;
};

// One gemm: x [T, K] times a packed weight [N, K] transposed.
struct Gemm {
  const void* x = nullptr;  // u8 or float; rows of at least K elements
  long ld_x = 0;
  const void* packed = nullptr;  // of pack_*; 64-byte aligned
  long n = 0, k = 0;             // k % 4 == 0 for int8
  // The packed weight that is read after this one: its first panel is fetched with the last.
  const void* next = nullptr;
  Epilogue ep;
};

struct LayerNormW {
  const float* gamma = nullptr;
  const float* beta = nullptr;
  float eps = 1e-12f;
};

// Where a layer norm writes: float always if out_f, and quantized with a static scale or per token.
struct RowOut {
  float* out_f = nullptr;
  long ld_f = 0;
  uint8_t* out_q = nullptr;
  long ld_q = 0;
  float inv_scale = 1.0f;
  float* token_scale =
      nullptr;  // [T]: written (max|row| / 127, at least 1e-30 / 127) when per token
};

// LN(x + residual) row by row; x may be out_f (in place).
struct AddLayerNorm {
  const float* x = nullptr;
  long ld_x = 0;
  const float* residual = nullptr;  // or null
  long ld_residual = 0;
  LayerNormW ln;
  long width = 0;
  RowOut out;
};

// LN(word[ids] + position[positions] + type[types]). Indices are checked by the caller.
struct Embed {
  const int32_t* ids = nullptr;
  const int32_t* types = nullptr;
  const int32_t* positions = nullptr;
  const float* word = nullptr;
  const float* position = nullptr;
  const float* type = nullptr;
  LayerNormW ln;
  long width = 0;
  RowOut out;
};

struct Quantize {
  const float* x = nullptr;
  long ld_x = 0;
  long width = 0;
  RowOut out;  // out_f is ignored
};

// softmax(Q K^T / sqrt(d) + bias) V inside one sequence of rows [begin, end), heads [head0, head1).
struct Attention {
  const float* qkv_f = nullptr;    // [T, 3H]: Q | K | V; or
  const uint8_t* qkv_q = nullptr;  // the same already quantized with q_scale, k_scale, v_scale
  long ld = 0;
  long heads = 0, head_dim = 0;
  // Or null: [heads, 2 reach - 1]; query i adds [reach - 1 + j - i] to key j. No sequence is longer
  // than `reach`.
  const float* position_bias = nullptr;
  long reach = 0;
  bool int8_scores = false, int8_context = false;  // with qkv_q both are true
  float q_scale = 1, k_scale = 1, p_scale = 1, v_scale = 1;
  bool first_only =
      false;   // only query 0 of each sequence, written to row `first_row` of the output
  RowOut out;  // token_scale is not used
};

struct Level {
  const char* name;
  long panel;  // columns of one packed panel: the unit in which N is split over threads
  // Rows that go through a layer together: their intermediates stay in L2, and a panel of weights
  // that was fetched once is used for all of them. A multiple of the tiles' height.
  long block;
  // Below this many rows a thread, weights are split over threads instead of rows. Both: measured.
  long split;

  size_t (*packed_int8)(long n, long k);  // bytes
  void (*pack_int8)(const int8_t* w, long n, long k, void* packed);
  size_t (*packed_f32)(long n, long k);
  void (*pack_f32)(const float* w, long n, long k, void* packed);

  // Rows [row0, row1), panels [panel0, panel1).
  void (*gemm_int8)(const Gemm&, long row0, long row1, long panel0, long panel1);
  void (*gemm_f32)(const Gemm&, long row0, long row1, long panel0, long panel1);

  void (*add_layernorm)(const AddLayerNorm&, long row0, long row1);
  void (*embed)(const Embed&, long row0, long row1);
  void (*quantize)(const Quantize&, long row0, long row1);

  size_t (*attention_scratch)(long head_dim, long max_seqlen);  // bytes, 64-byte aligned
  void (*attention)(const Attention&, long begin, long end, long first_row, long head0, long head1,
                    void* scratch);
  void (*mean_rows)(const float* x, long ld, long begin, long end, long width, float* out);
  // Sum of the int32 products themselves, for tests: [rows, n] without any epilogue.
  void (*sums_int8)(const Gemm&, long row0, long row1, int32_t* sums, long ld);
};

// null where this build or this CPU lacks the level.
const Level* level_amx_int8();
const Level* level_avx512_vnni();
const Level* level_avx2_vnni();
const Level* level_avx2();
const Level* level_portable();

}  // namespace samp
