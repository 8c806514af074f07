// The loops shared by all instruction sets. Each kernels/*.cpp defines traits T and instantiates them:
//
//   T::Vec, T::Acc            vector of panel elements, vector of 4-byte sums
//   T::Element, T::Sum        panel element, float or int32_t
//   T::kLanes                 sums in an Acc;  T::kStep = panel elements in a Vec = kLanes * elements of a unit
//   T::load(p), T::bcast(p)   a whole vector; one unit in all lanes
//   T::fma(acc, q, x)         acc + sum over each unit of q * x
//   T::zero(), T::load_sums(p), T::store_sums(p, acc), T::add(a, b), T::reduce(acc)
//   T::load_row(const S*)     kStep stored elements of type S as a Vec
//   T::self(x), T::ones()     the query that gives <x, x>, and the one that gives sum(x) (u8 only, kOffset)
//
// All in an anonymous namespace: every translation unit keeps its own copy, compiled with its own flags.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernel.h"

namespace influence_fast {
namespace {

template <class T, int MR, int NV>
void tile_fixed(const char* a, const char* b, int64_t units, typename T::Sum* c, int64_t ldc) {
  typename T::Acc acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[r][v] = T::zero();
  constexpr int kVecBytes = T::kLanes * 4;
  for (int64_t u = 0; u < units; ++u) {
    typename T::Vec q[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) q[v] = T::load(b + v * kVecBytes);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const typename T::Vec x = T::bcast(a + r * kRowStrideBytes);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[r][v] = T::fma(acc[r][v], q[v], x);
    }
    a += 4;
    b += NV * kVecBytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      typename T::Sum* p = c + r * ldc + v * T::kLanes;
      T::store_sums(p, T::add(T::load_sums(p), acc[r][v]));
    }
}

template <class T, int MR>
void tile_any(const char* a, const char* b, int64_t units, int vecs, void* c_, int64_t ldc) {
  auto* c = static_cast<typename T::Sum*>(c_);
  switch (vecs) {
    case 1: return tile_fixed<T, MR, 1>(a, b, units, c, ldc);
    case 2: return tile_fixed<T, MR, 2>(a, b, units, c, ldc);
    case 3: return tile_fixed<T, MR, 3>(a, b, units, c, ldc);
    default: return tile_fixed<T, MR, 4>(a, b, units, c, ldc);
  }
}

template <class T, class S, int RB, int NQ, bool SQUARES>
void dot_fixed(const void* const* rows_, const void* const* queries_, int64_t k, typename T::Sum* dots, int64_t ldd,
               typename T::Sum* sums, typename T::Sum* squares, int64_t ahead) {
  const S* row[RB];
  const typename T::Element* query[NQ > 0 ? NQ : 1];
  for (int r = 0; r < RB; ++r) row[r] = static_cast<const S*>(rows_[r]);
  for (int q = 0; q < NQ; ++q) query[q] = static_cast<const typename T::Element*>(queries_[q]);
  typename T::Acc dot[RB][NQ > 0 ? NQ : 1], sum[RB], square[RB];
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < NQ; ++q) dot[r][q] = T::zero();
    sum[r] = T::zero();
    square[r] = T::zero();
  }
  const auto step = [&](int64_t i, const S* const* at) {
    typename T::Vec y[NQ > 0 ? NQ : 1];
#pragma GCC unroll 4
    for (int q = 0; q < NQ; ++q) y[q] = T::load(query[q] + i);
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) {
      const typename T::Vec x = T::load_row(at[r]);
#pragma GCC unroll 4
      for (int q = 0; q < NQ; ++q) dot[r][q] = T::fma(dot[r][q], y[q], x);
      if constexpr (T::kOffset) sum[r] = T::fma(sum[r], T::ones(), x);
      if constexpr (SQUARES) square[r] = T::fma(square[r], T::self(x), x);
    }
  };
  const int64_t whole = k - k % T::kStep;
  for (int64_t i = 0; i < whole; i += T::kStep) {
    const S* at[RB];
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) at[r] = row[r] + i;
    if (ahead)  // rows are short: the hardware's own prefetch starts anew at each page of each
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r)
        __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at[r]) + ahead), 0, 2);
    step(i, at);
  }
  if (whole < k) {  // the ragged end, copied to zero-padded vectors so that nothing past a row is read
    S tail[RB][T::kStep];
    const S* at[RB];
    std::memset(tail, 0, sizeof(tail));
    for (int r = 0; r < RB; ++r) {
      std::memcpy(tail[r], row[r] + whole, static_cast<size_t>(k - whole) * sizeof(S));
      at[r] = tail[r];
    }
    step(whole, at);
  }
  for (int r = 0; r < RB; ++r) {
    for (int q = 0; q < NQ; ++q) dots[r * ldd + q] = T::reduce(dot[r][q]);
    if constexpr (T::kOffset) sums[r] = T::reduce(sum[r]);
    if constexpr (SQUARES) squares[r] = T::reduce(square[r]);
  }
  if constexpr (T::kOffset && SQUARES) {  // self(x) = x + 128
    for (int r = 0; r < RB; ++r)
      squares[r] = static_cast<int32_t>(static_cast<uint32_t>(squares[r]) - 128u * static_cast<uint32_t>(sums[r]));
  }
}

template <class T, class S, int RB>
void dot_rows(const void* const* rows, const void* const* queries, int nq, int64_t k, void* dots_, int64_t ldd,
              void* sums_, void* squares_, int64_t ahead) {
  auto* dots = static_cast<typename T::Sum*>(dots_);
  auto* sums = static_cast<typename T::Sum*>(sums_);
  auto* squares = static_cast<typename T::Sum*>(squares_);
#define IF_DOT(NQ)                                                                                     \
  case NQ:                                                                                             \
    if (squares) return dot_fixed<T, S, RB, NQ, true>(rows, queries, k, dots, ldd, sums, squares, ahead);     \
    return dot_fixed<T, S, RB, NQ, false>(rows, queries, k, dots, ldd, sums, squares, ahead);
  switch (nq) {
    IF_DOT(0)
    IF_DOT(1)
    IF_DOT(2)
    IF_DOT(3)
    default:
    IF_DOT(4)
  }
#undef IF_DOT
}

template <class T, class S>
void dot_any(const void* const* rows, int nrows, const void* const* queries, int nq, int64_t k, void* dots,
             int64_t ldd, void* sums, void* squares, int64_t ahead) {
  if (nrows == kDotRows) return dot_rows<T, S, kDotRows>(rows, queries, nq, k, dots, ldd, sums, squares, ahead);
  for (int r = 0; r < nrows; ++r)
    dot_rows<T, S, 1>(rows + r, queries, nq, k, static_cast<typename T::Sum*>(dots) + r * ldd, ldd,
                      sums ? static_cast<typename T::Sum*>(sums) + r : nullptr,
                      squares ? static_cast<typename T::Sum*>(squares) + r : nullptr, ahead);
}

inline void widen(const float* in, int64_t n, float* out) { std::memcpy(out, in, static_cast<size_t>(n) * 4); }
inline void widen(const uint16_t* in, int64_t n, uint16_t* out) { std::memcpy(out, in, static_cast<size_t>(n) * 2); }
inline void widen(const int8_t* in, int64_t n, int8_t* out) { std::memcpy(out, in, static_cast<size_t>(n)); }
inline void widen(const int8_t* in, int64_t n, uint8_t* out) { std::memcpy(out, in, static_cast<size_t>(n)); }
inline void widen(const int8_t* in, int64_t n, int16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
}
inline void widen(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

template <class T, class S>
void pack_any(const void* row, int64_t count, void* packed_) {
  auto* packed = static_cast<typename T::Element*>(packed_);
  constexpr int64_t kUnit = 4 / sizeof(typename T::Element);
  widen(static_cast<const S*>(row), count, packed);
  for (int64_t i = count; i % kUnit != 0; ++i) packed[i] = 0;
}

template <class T, class S, int MR, int MAX_NV>
Kernel make_kernel(Panel panel) {
  static_assert(MAX_NV <= 4, "tile_any knows 1 to 4 vectors");
  return Kernel{panel, T::kLanes, MR, MAX_NV, T::kStep, pack_any<T, S>, tile_any<T, MR>, dot_any<T, S>};
}

}  // namespace
}  // namespace influence_fast
