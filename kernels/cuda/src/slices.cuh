// What the GEMMs of the tensor cores share: how a slice of 128 bytes of k lies in shared memory,
// and how sums leave it.
#pragma once

#include "epilogue.cuh"

constexpr int SLICE = 128;

// Chunk c (16 bytes) of row r lies at c ^ (r % 8): the eight rows that are read at one chunk fill
// all 32 banks.
DEVICE int place(int row, int chunk) { return row * SLICE + ((chunk ^ (row & 7)) << 4); }

// ROWS rows of one slice, by THREADS threads: rows from `first` on of an array of `rows` rows,
// bytes from `k` on. What is behind its end becomes zero.
template <int ROWS, int THREADS>
DEVICE void copy_slice(int thread, unsigned char* to, const unsigned char* from, int first,
                       int rows, int ld, int k, int k_bytes) {
#pragma unroll
  for (int i = 0; i < ROWS / (THREADS / 8); ++i) {
    const int row = thread / 8 + i * (THREADS / 8), chunk = thread % 8;
    const int at = k + chunk * 16;
    const int bytes = first + row < rows ? max(0, min(16, k_bytes - at)) : 0;
    const size_t offset = bytes ? static_cast<size_t>(first + row) * ld + at : 0;
    copy16(to + place(row, chunk), from + offset, bytes);
  }
}

template <class Sum>
struct alignas(8) Pair {
  Sum x, y;
};

// Sums leave the registers through shared memory, so that a thread ends with four neighbours and a
// warp writes whole lines. Where column `column` stands in its row: groups of eight change places,
// so that neither side meets a bank twice.
DEVICE int mixed(int row, int column) { return column ^ (row & 3) << 3; }

// All of a block's sums [M][N] through the epilogue.
template <int M, int N, int THREADS, class Sum>
DEVICE void finish_tile(const Epilogue& to, const Sum* tile, int m0, int n0) {
#pragma unroll 1
  for (int i = threadIdx.x * 4; i < M * N; i += THREADS * 4) {
    const int row = i / N, column = i % N;
    const Sum* from = tile + row * N + mixed(row, column);
    finish(to, m0 + row, n0 + column,
           {static_cast<float>(from[0]), static_cast<float>(from[1]), static_cast<float>(from[2]),
            static_cast<float>(from[3])});
  }
}
