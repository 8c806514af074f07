// What the three AVX-512 translation units share: sums of 16 lanes. Anonymous namespace, as in tile.h.
#pragma once
#include <immintrin.h>

#include "tile.h"

namespace influence_fast {
namespace {

// 32 registers: tiles of 6 x 64 (24 sums, 4 queries, 1 broadcast). 10 loads for 24 multiply-adds a step.
constexpr int kTileRows = 6, kTileVecs = 4;

struct FloatSums {
  using Sum = float;
  using Acc = __m512;
  static constexpr int kLanes = 16;
  static Acc zero() { return _mm512_setzero_ps(); }
  static Acc load_sums(const float* p) { return _mm512_loadu_ps(p); }
  static void store_sums(float* p, Acc a) { _mm512_storeu_ps(p, a); }
  static Acc add(Acc a, Acc b) { return _mm512_add_ps(a, b); }
  static float reduce(Acc a) { return _mm512_reduce_add_ps(a); }
};

struct IntSums {
  using Sum = int32_t;
  using Acc = __m512i;
  static constexpr int kLanes = 16;
  static Acc zero() { return _mm512_setzero_si512(); }
  static Acc load_sums(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_sums(int32_t* p, Acc a) { _mm512_storeu_si512(p, a); }
  static Acc add(Acc a, Acc b) { return _mm512_add_epi32(a, b); }
  static int32_t reduce(Acc a) { return _mm512_reduce_add_epi32(a); }
};

inline __m512i broadcast_unit(const void* p) {
  int32_t unit;
  std::memcpy(&unit, p, 4);
  return _mm512_set1_epi32(unit);
}

}  // namespace
}  // namespace influence_fast
