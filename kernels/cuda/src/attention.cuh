// What both attention kernels share: which queries a block owns, and how a result is stored.
#pragma once

#include "copy.cuh"

constexpr int QUERIES = 64;  // of one block: rows of one sequence, for one head

struct Attention {
  const void* qkv;  // [tokens, 3 * heads * DIM], each third by head
  int qkv_kind, qkv_ld, hidden;
  const int* bounds;  // [sequences + 1]
  const int* tiles;   // pairs (sequence, first query); sequence -1: nothing to do
  int first_only;     // only each sequence's first row, to the row of its number
  const float* bias;  // [heads, bias_ld], added to a score by key - query + bias_center; or null
  int bias_ld, bias_center;
  void* out;
  int out_ld, out_kind;
  float inverse_scale;
};

struct Work {
  int sequence, begin, length, query;  // rows begin to begin + length; `query`: the block's first
};

DEVICE float bias_of(const Attention& a, int query, int key) {
  return a.bias[static_cast<size_t>(blockIdx.y) * a.bias_ld + a.bias_center + key - query];
}

DEVICE bool find_work(const Attention& a, Work& work) {
  work.sequence = a.tiles[2 * blockIdx.x];
  work.query = a.tiles[2 * blockIdx.x + 1];
  if (work.sequence < 0 || (a.first_only && work.query)) return false;
  work.begin = a.bounds[work.sequence];
  work.length = a.bounds[work.sequence + 1] - work.begin;
  return true;
}

// Two neighbours of query `query` of the sequence, at an even column.
DEVICE void store_context(const Attention& a, const Work& work, int query, int column, float x,
                          float y) {
  if (query >= work.length || (a.first_only && query)) return;
  const size_t row = a.first_only ? work.sequence : work.begin + query;
  const size_t at = row * a.out_ld + column;
  if (a.out_kind == F32) {
    float2 pair;
    pair.x = x, pair.y = y;
    *reinterpret_cast<float2*>(static_cast<float*>(a.out) + at) = pair;
  } else if (is_quantized(a.out_kind)) {
    *reinterpret_cast<unsigned short*>(static_cast<signed char*>(a.out) + at) =
        quantized2(a.out_kind, x, y, a.inverse_scale);
  } else {
    *reinterpret_cast<unsigned*>(static_cast<f16*>(a.out) + at) = packed_as(a.out_kind, x, y);
  }
}
