// A weight in the layout of one level, in memory of its own: 64-byte aligned, on huge pages where
// the system gives them, since a small batch is bound by reading weights and a TLB miss a page
// shows.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "level.h"

namespace samp {

class Packed {
 public:
  Packed(const Level* level, bool int8, const void* w, long n, long k)
      : level(level), int8(int8), n(n), k(k) {
    const size_t need = int8 ? level->packed_int8(n, k) : level->packed_f32(n, k);
    const size_t huge = size_t{1} << 21;
    const size_t align = need >= huge / 2 ? huge : 64;
    bytes = (need + align - 1) / align * align;
    data = std::aligned_alloc(align, bytes);
    if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (align == huge) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    if (int8)
      level->pack_int8(static_cast<const int8_t*>(w), n, k, data);
    else
      level->pack_f32(static_cast<const float*>(w), n, k, data);
  }
  ~Packed() { std::free(data); }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  const Level* level;
  bool int8;
  long n, k;
  size_t bytes = 0;
  void* data = nullptr;
};

}  // namespace samp
