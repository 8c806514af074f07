// What an instruction set must provide for inner products: plain functions over plain pointers.
//
// A *unit* is 4 bytes of a packed panel: one fp32, two bf16, two int16 or four int8 values along k. Every
// micro-kernel loads units of queries as a vector (one query a lane) and broadcasts units of rows, so the four
// panel formats share one shape of loop (tile.h) and one driver (../score.cpp).
//
// This header is included by translation units compiled for different instruction sets: it may hold no inline
// function or template of the standard library, or the linker could keep the copy with the wrong instructions.
#pragma once
#include <cstdint>

namespace influence_fast {

enum class DType : int { f32 = 0, bf16 = 1, i8 = 2 };  // of the stored rows

enum class Panel : int {
  f32,   // fp32 x fp32, fp32 sums; bf16 rows are widened when packed
  bf16,  // bf16 pairs x bf16 pairs, fp32 sums
  i16,   // int8 widened to int16 pairs, int32 sums
  u8,    // signed int8 rows x (int8 query + 128) as unsigned, int32 sums; 128 * sum(row) is taken off at the end
};

// A packed chunk of rows: kChunkBytes of each row, at a stride that keeps six rows out of one L1 set. 4096 with blocks
// of 48 rows measured best of 512..8192 and 24..192 (k = 8192, 512 queries, int8: 4 % over 1024 with 96 rows).
inline constexpr int kChunkBytes = 4096;
inline constexpr int kRowStrideBytes = kChunkBytes + 64;
inline constexpr int kDotRows = 4;     // rows a dot call may take
inline constexpr int kDotQueries = 4;  // queries a dot call may take

struct Kernel {
  Panel panel;
  int lanes;       // queries in a vector of accumulators
  int tile_rows;   // rows in a tile
  int tile_vecs;   // most vectors of queries in a tile
  int dot_step;    // elements in a vector along k: queries in dot layout are zero-padded to a multiple

  // Rows to packed form: `count` stored elements (count <= chunk) to panel elements, zero-padded to a whole unit.
  void (*pack)(const void* row, int64_t count, void* packed);

  // c[tile_rows][vecs * lanes] (4-byte sums, leading dimension ldc) += a[tile_rows][units] b[units][vecs * lanes]
  void (*tile)(const char* a, const char* b, int64_t units, int vecs, void* c, int64_t ldc);

  // dots[r * ldd + q] = <row r, query q> for rows <= kDotRows unpacked rows and queries <= kDotQueries queries
  // (panel elements, row-major, padded), sums[r] = sum of row r (u8 only), squares[r] = <row r, row r> if not null.
  // 4-byte results: float or int32 after the panel; int32 wraps modulo 2^32. `ahead` bytes past each row element read,
  // memory is prefetched (0: not).
  void (*dot)(const void* const* rows, int nrows, const void* const* queries, int nqueries, int64_t k, void* dots,
              int64_t ldd, void* sums, void* squares, int64_t ahead);
};

struct Isa {
  const char* name;
  Kernel f32, bf16, i8;
};

// Fill the kernels a translation unit has; defined only where CMake compiled it (IF_HAVE_*).
void portable_kernels(Isa& isa);
void avx2_kernels(Isa& isa);
void avx512_kernels(Isa& isa);
void avx512_vnni_kernels(Isa& isa);  // int8 only
void avx512_bf16_kernels(Isa& isa);  // bf16 only
void neon_kernels(Isa& isa);

}  // namespace influence_fast
