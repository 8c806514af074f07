// AVX2 + FMA: 16 registers, so tiles of 4 x 16 (8 sums, 2 queries, 1 broadcast, room for the compiler).
// int8 goes through int16 pairs (vpmaddwd): vpmaddubsw would saturate.
#include <immintrin.h>

#include "tile.h"

namespace influence_fast {
namespace {

struct F32 {
  using Element = float;
  using Sum = float;
  using Vec = __m256;
  using Acc = __m256;
  static constexpr int kLanes = 8, kStep = 8;
  static constexpr bool kOffset = false;
  static Acc zero() { return _mm256_setzero_ps(); }
  static Vec load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static Vec bcast(const void* p) { return _mm256_broadcast_ss(static_cast<const float*>(p)); }
  static Acc fma(Acc a, Vec q, Vec x) { return _mm256_fmadd_ps(q, x, a); }
  static Acc load_sums(const float* p) { return _mm256_loadu_ps(p); }
  static void store_sums(float* p, Acc a) { _mm256_storeu_ps(p, a); }
  static Acc add(Acc a, Acc b) { return _mm256_add_ps(a, b); }
  static float reduce(Acc a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static Vec load_row(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load_row(const uint16_t* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static Vec self(Vec x) { return x; }
  static Vec ones() { return zero(); }
};

struct I16 {
  using Element = int16_t;
  using Sum = int32_t;
  using Vec = __m256i;
  using Acc = __m256i;
  static constexpr int kLanes = 8, kStep = 16;
  static constexpr bool kOffset = false;
  static Acc zero() { return _mm256_setzero_si256(); }
  static Vec load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Vec bcast(const void* p) {
    int32_t unit;
    std::memcpy(&unit, p, 4);
    return _mm256_set1_epi32(unit);
  }
  static Acc fma(Acc a, Vec q, Vec x) { return _mm256_add_epi32(a, _mm256_madd_epi16(q, x)); }
  static Acc load_sums(const int32_t* p) { return load(p); }
  static void store_sums(int32_t* p, Acc a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static Acc add(Acc a, Acc b) { return _mm256_add_epi32(a, b); }
  static int32_t reduce(Acc a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static Vec load_row(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Vec self(Vec x) { return x; }
  static Vec ones() { return zero(); }
};

}  // namespace

void avx2_kernels(Isa& isa) {
  isa.f32 = make_kernel<F32, float, 4, 2>(Panel::f32);
  isa.bf16 = make_kernel<F32, uint16_t, 4, 2>(Panel::f32);
  isa.i8 = make_kernel<I16, int8_t, 4, 2>(Panel::i16);
}

}  // namespace influence_fast
