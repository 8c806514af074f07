// AVX-512 BF16: vdpbf16ps, two bf16 products to an fp32 sum. Subnormal inputs count as zero (below 1.2e-38).
#include "avx512_traits.h"

namespace influence_fast {
namespace {

struct BF16 : FloatSums {
  using Element = uint16_t;
  using Vec = __m512i;
  static constexpr int kStep = 32;
  static constexpr bool kOffset = false;
  static Vec load(const void* p) { return _mm512_loadu_si512(p); }
  static Vec bcast(const void* p) { return broadcast_unit(p); }
  static Acc fma(Acc a, Vec q, Vec x) { return _mm512_dpbf16_ps(a, (__m512bh)q, (__m512bh)x); }
  static Vec load_row(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static Vec self(Vec x) { return x; }
  static Vec ones() { return _mm512_setzero_si512(); }
};

}  // namespace

void avx512_bf16_kernels(Isa& isa) { isa.bf16 = make_kernel<BF16, uint16_t, kTileRows, kTileVecs>(Panel::bf16); }

}  // namespace influence_fast
