// Queries rounded to what the kernel multiplies, laid out once for all row blocks.
//
// A query is a sum of one or two *terms*, q = sum_t factor_t * term_t with terms of the rows' dtype:
//   fast   one term: bf16(q), or int8 with factor max|q| / 127 (nearest)
//   high   two terms: the second holds what the first rounded away (16 significant bits in all)
// fp32 panels hold fp32 queries, so `high` needs no second term there; `fast` still rounds the queries of bf16 rows
// to bf16, so that every instruction set gives the same answer.
#pragma once
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernels/kernel.h"
#include "parallel.h"

namespace influence_fast {

class Queries {
 public:
  // values [count, k] fp32 with `stride` elements between queries; finite.
  Queries(const float* values, int64_t count, int64_t k, int64_t stride, DType rows, bool high, const Kernel& kernel,
          int threads, const Poll& poll);

  int64_t count, k;
  DType rows;
  Kernel kernel;
  int terms;             // 1 or 2
  int64_t columns;       // count * terms; column t * count + q is term t of query q
  int64_t padded;        // columns rounded up to whole vectors
  bool tiled;            // packed in panels for tiles, else row-major for dots
  std::vector<float> factor;  // [columns]
  std::vector<double> norm;   // [count], of the rounded query
  bool complete = true;       // false if interrupted

  int64_t panel_columns() const { return static_cast<int64_t>(kernel.lanes) * kernel.tile_vecs; }
  const char* panel(int64_t index) const { return packed_.data() + index * panel_columns() * units_ * 4; }
  const char* row(int64_t column) const { return packed_.data() + column * row_bytes_; }
  int64_t units() const { return units_; }

  // Elements of k in a chunk of a packed panel, and in one int32 accumulation.
  int64_t chunk() const { return kChunkBytes / element_bytes(); }
  int64_t element_bytes() const;

 private:
  int64_t units_, row_bytes_;
  Buffer<char> packed_;
};

uint16_t to_bf16(float value);  // round to nearest even; NaN stays NaN
float from_bf16(uint16_t bits);

}  // namespace influence_fast
