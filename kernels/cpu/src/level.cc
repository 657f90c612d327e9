// One dispatch level: compiled once for each SAMP_LEVEL with that instruction set's flags
// (setup.py).
#include "level.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if SAMP_LEVEL == 4
#define SAMP_NAME amx_int8
#elif SAMP_LEVEL == 3
#define SAMP_NAME avx512_vnni
#elif SAMP_LEVEL == 2
#define SAMP_NAME avx2_vnni
#elif SAMP_LEVEL == 1
#define SAMP_NAME avx2
#else
#define SAMP_NAME portable
#endif
#define SAMP_TEXT2(x) #x
#define SAMP_TEXT(x) SAMP_TEXT2(x)
#define SAMP_JOIN2(a, b) a##b
#define SAMP_JOIN(a, b) SAMP_JOIN2(a, b)

namespace samp {
namespace SAMP_NAME {
#include "simd.h"
#include "vmath.h"
#include "epilogue.h"
#include "gemm.h"
#if SAMP_LEVEL >= 4
#include "amx.h"
#include "gemm_amx.h"
#else
#include "gemm_int8.h"
#endif
#include "rowwise.h"
#include "attention.h"

static constexpr Level kLevel = {
    SAMP_TEXT(SAMP_NAME),
    PANEL,
    SAMP_LEVEL >= 4 ? 256 : 96,
    SAMP_LEVEL >= 4 ? 96 : 24,
    packed_int8,
    pack_int8,
    packed_f32,
    pack_f32,
    gemm_int8,
    gemm_f32,
    add_layernorm,
    embed,
    quantize,
    attention_scratch,
    attention,
    mean_rows,
    sums_int8,
};
}  // namespace SAMP_NAME

const Level* SAMP_JOIN(level_, SAMP_NAME)() { return &SAMP_NAME::kLevel; }

}  // namespace samp
