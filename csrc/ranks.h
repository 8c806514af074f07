// Ranks of columns: 1 = lowest, ties get the average of their places (scipy.stats.rankdata, method="average").
#pragma once
#include <cstdint>

#include "parallel.h"
#include "score.h"

namespace influence_fast {

// Replaces each column of `columns` [count, rows] (fp32, finite) by *twice* its ranks as uint32: exact, where fp32
// could not hold the half ranks of ties beyond 2^23 rows. Needs rows < 2^31 and 16 bytes a row and thread.
bool rank_columns(float* columns, int64_t count, int64_t rows, int threads, const Poll& poll);

// sums[row, g] += sum of the ranks in the columns of group g.   columns [count, rows], sums [rows, groups]
bool add_ranks(const uint32_t* columns, int64_t rows, const Groups& groups, double* sums, int threads,
               const Poll& poll);

}  // namespace influence_fast
