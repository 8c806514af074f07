// AVX-512 F/BW/DQ/VL (Skylake-X and later): fp32 products, int8 through int16 pairs.
#include "avx512_traits.h"

namespace influence_fast {
namespace {

struct F32 : FloatSums {
  using Element = float;
  using Vec = __m512;
  static constexpr int kStep = 16;
  static constexpr bool kOffset = false;
  static Vec load(const void* p) { return _mm512_loadu_ps(p); }
  static Vec bcast(const void* p) { return _mm512_castsi512_ps(broadcast_unit(p)); }
  static Acc fma(Acc a, Vec q, Vec x) { return _mm512_fmadd_ps(q, x, a); }
  static Vec load_row(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load_row(const uint16_t* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static Vec self(Vec x) { return x; }
  static Vec ones() { return zero(); }
};

struct I16 : IntSums {
  using Element = int16_t;
  using Vec = __m512i;
  static constexpr int kStep = 32;
  static constexpr bool kOffset = false;
  static Vec load(const void* p) { return _mm512_loadu_si512(p); }
  static Vec bcast(const void* p) { return broadcast_unit(p); }
  static Acc fma(Acc a, Vec q, Vec x) { return _mm512_add_epi32(a, _mm512_madd_epi16(q, x)); }
  static Vec load_row(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Vec self(Vec x) { return x; }
  static Vec ones() { return zero(); }
};

}  // namespace

void avx512_kernels(Isa& isa) {
  isa.f32 = make_kernel<F32, float, kTileRows, kTileVecs>(Panel::f32);
  isa.bf16 = make_kernel<F32, uint16_t, kTileRows, kTileVecs>(Panel::f32);
  isa.i8 = make_kernel<I16, int8_t, kTileRows, kTileVecs>(Panel::i16);
}

}  // namespace influence_fast
