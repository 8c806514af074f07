// AVX-512 VNNI: vpdpbusd multiplies unsigned by signed bytes, four to an int32, without saturation. The query is
// the unsigned side (q + 128), so that rows are read as they are stored.
#include "avx512_traits.h"

namespace influence_fast {
namespace {

struct U8 : IntSums {
  using Element = uint8_t;
  using Vec = __m512i;
  static constexpr int kStep = 64;
  static constexpr bool kOffset = true;
  static Vec load(const void* p) { return _mm512_loadu_si512(p); }
  static Vec bcast(const void* p) { return broadcast_unit(p); }
  static Acc fma(Acc a, Vec q, Vec x) { return _mm512_dpbusd_epi32(a, q, x); }
  static Vec load_row(const int8_t* p) { return _mm512_loadu_si512(p); }
  static Vec self(Vec x) { return _mm512_xor_si512(x, _mm512_set1_epi8(static_cast<char>(0x80))); }  // x + 128
  static Vec ones() { return _mm512_set1_epi8(1); }
};

}  // namespace

void avx512_vnni_kernels(Isa& isa) { isa.i8 = make_kernel<U8, int8_t, kTileRows, kTileVecs>(Panel::u8); }

}  // namespace influence_fast
