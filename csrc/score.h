// Inner products of a block of stored rows with packed queries, with what is wanted of them taken on the spot:
// the (rows, queries) matrix is written only where `scores` or `columns` asks for it.
//
//   scores[i, q] = row_scale[i] * sum_j row[i, j] query[q, j]         divided by |row i| |query q| if normalized
//                                                                     (a zero row or query has cosine 0)
#pragma once
#include <cstdint>
#include <vector>

#include "queries.h"
#include "topk.h"

namespace influence_fast {

struct Rows {
  const char* data;     // [count, k] of `dtype`, elements of a row contiguous
  int64_t count, k;
  int64_t stride;       // bytes between rows
  DType dtype;
  const float* scales;  // [count] or null
  int64_t start;        // index of the first row in the whole matrix
};

struct Groups {         // CSR lists of query indices
  int64_t count = 0;
  const int64_t* begin = nullptr;  // [count + 1]
  const int64_t* query = nullptr;  // [begin[count]]
};

struct Outputs {
  bool normalize = false;
  float* scores = nullptr;  // [rows.count, queries], of this block
  int64_t scores_stride = 0;
  float* columns = nullptr;  // [queries, columns_stride], column-major over the whole matrix, for ranks
  int64_t columns_stride = 0;
  double* group_sums = nullptr;  // [rows.count, groups], added to
  int64_t group_stride = 0;
  Groups groups;
  TopK* topk = nullptr;
};

// Returns the indices (start + i) of rows with a NaN or infinite score; sets `complete` false if interrupted.
std::vector<int64_t> score_rows(const Queries& queries, const Rows& rows, const Outputs& outputs, int threads,
                                const Poll& poll, bool& complete);

}  // namespace influence_fast
