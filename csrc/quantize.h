// fp32 rows to int8 with one fp32 scale a row, scale = max|row| / 127.
//
//   nearest      q = round(x / scale), half to even            |x - scale q| <= scale / 2
//   stochastic   q = floor(x / scale) + [u < fraction]         |x - scale q| <  scale, E[scale q] = x
//
// (both bounds up to the rounding of x / scale in fp32). u is a function of (key, row, column) alone: 24 bits of
// word column % 4 of philox4x32-10(counter = (column / 4, row mod 2^32, row >> 32, 2), key), so a row quantises
// to the same bytes in whatever shard, order or thread.
#pragma once
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace influence_fast {

void philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

struct Rounding {
  bool stochastic = false;
  uint32_t key[2] = {0, 0};
  int64_t first_row = 0;  // index of the first row, for the counter
};

// rows [count, k] fp32, `stride` elements apart -> quantized [count, k], scales [count]; returns the indices of rows
// with a NaN or infinite value (written as zeros). A row of zeros has scale 0.
std::vector<int64_t> quantize_rows(const float* rows, int64_t count, int64_t k, int64_t stride, const Rounding& rounding,
                                   int8_t* quantized, float* scales, int threads, const Poll& poll, bool& complete);

// Round to nearest even, NaN stays NaN.   in, out [count, k] with `stride` elements between rows of `in`
bool convert_bf16(const float* in, int64_t count, int64_t k, int64_t stride, uint16_t* out, int threads,
                  const Poll& poll);

}  // namespace influence_fast
