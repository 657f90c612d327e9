// What every GEMM does with its sums: row scale, column scale, bias, activation, residual, and then
// to fp32, fp16, bf16, int8 or e4m3. One chain for all precisions; the choices are the same for a
// whole launch.
#pragma once

#include "copy.cuh"

enum Activation { NONE = 0, GELU = 1, GELU_TANH = 2, TANH = 3, RELU = 4 };

struct Epilogue {
  const float* row_scale;     // [rows] or null
  const float* column_scale;  // [width] or null; null for float sums
  const float* bias;          // [width]
  int activation;
  const void* residual;      // [.., width], or null
  const int* residual_rows;  // the residual's row of each row; null: the same row
  int residual_ld, residual_kind;
  void* out;  // [rows, width]
  int out_ld, out_kind;
  float inverse_scale;  // of an int8 or e4m3 output
  int rows, width;      // width: a multiple of 16; columns that pad the weight come out as act(0)
};

DEVICE float activate(float x, int activation) {
  if (activation == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  if (activation == GELU_TANH) {
    const float inner = 0.79788456f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(inner));
  }
  if (activation == TANH) return tanhf(x);
  if (activation == RELU) return x < 0.0f ? 0.0f : x;
  return x;
}

// Four neighbours of one row; `column` is a multiple of 4.
DEVICE void finish(const Epilogue& to, int row, int column, float4 y) {
  if (row >= to.rows || column >= to.width) return;
  if (to.column_scale) {
    const float scale = to.row_scale ? to.row_scale[row] : 1.0f;
    const float4 columns = *reinterpret_cast<const float4*>(to.column_scale + column);
    y.x *= columns.x * scale, y.y *= columns.y * scale;
    y.z *= columns.z * scale, y.w *= columns.w * scale;
  }
  const float4 bias = *reinterpret_cast<const float4*>(to.bias + column);
  y.x = activate(y.x + bias.x, to.activation), y.y = activate(y.y + bias.y, to.activation);
  y.z = activate(y.z + bias.z, to.activation), y.w = activate(y.w + bias.w, to.activation);
  if (to.residual) {
    const size_t from = to.residual_rows ? to.residual_rows[row] : row;
    const float4 rest = load4(to.residual, to.residual_kind, from * to.residual_ld + column);
    y.x += rest.x, y.y += rest.y, y.z += rest.z, y.w += rest.w;
  }
  const size_t at = static_cast<size_t>(row) * to.out_ld + column;
  if (is_quantized(to.out_kind))
    *reinterpret_cast<unsigned*>(static_cast<signed char*>(to.out) + at) =
        quantized4(to.out_kind, y, to.inverse_scale);
  else
    store4(to.out, to.out_kind, at, y);
}
