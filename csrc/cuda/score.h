// The operation of ../score.h on a CUDA device, for int8 and bf16 rows: tensor-core products of a chunk of rows with
// all queries, and scores, columns or group sums taken from the tile while it is in shared memory.
//
//   scores[i, q] = row_factor[i] * sum_t query_factor[t, q] * sum_j row[i, j] query[t, q, j]
//
// with row_factor the row's scale, or its sign over the row's norm where cosines are asked for. Plain pointers and
// sizes; all pointers here are of the device unless they say host. Errors are thrown as std::runtime_error.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

namespace influence_fast::cuda {

struct Queries {
  const void* data;      // [terms, count, stride bytes], int8 or bf16, zeros beyond k; address and stride: 16 bytes
  const float* factor;   // [terms, count]
  int64_t terms, count, k, stride;
  bool integer;          // int8, accumulated in int32; else bf16, accumulated in fp32
};

struct Rows {
  const void* data;      // [count, k] of the queries' dtype, elements of a row contiguous
  int64_t count;
  int64_t stride;        // bytes between rows
  const float* scales;   // [count] or null
};

// Of rows [0, count): each pointer is that of the first row (of its column, for `columns`). Null where not wanted.
struct Outputs {
  bool normalize = false;
  float* scores = nullptr;       // [count, scores_stride]
  int64_t scores_stride = 0;
  float* columns = nullptr;      // [queries, columns_stride]
  int64_t columns_stride = 0;
  double* group_sums = nullptr;  // [count, group_stride], added to
  int64_t group_stride = 0;
  int64_t groups = 0;
  const int32_t* group_begin = nullptr;   // TileGroups of plan.h
  const int32_t* group_column = nullptr;
  int32_t* bad = nullptr;        // [count], zeroed by the caller; set to 1 for rows with a NaN or infinite score
  float* row_factor = nullptr;   // [count] of scratch, needed to normalize
};

// "" where a device of compute capability 8.0 or later can be used, else why not. Never throws.
std::string unavailable();

// Queues the work on `stream` (a cudaStream_t) of `device`; returns at once.
void score(int device, const Queries& queries, const Rows& rows, const Outputs& out, uintptr_t stream);

// Rows of host memory (memory-mapped shards) by way of two pinned buffers: while one chunk is multiplied, the next is
// read from its file and copied. begin = constructor, push = a block, finish = wait for what is queued.
class Stream {
 public:
  // Buffers of `chunk` rows of `k_bytes` bytes each.
  Stream(int device, int64_t chunk, int64_t k_bytes);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // `rows` and its scales are of the host and may go when this returns; `out` is of the device, and work queued on
  // `stream` before sees none of this block's writes, work queued after sees them all. `stop` is asked between chunks;
  // returns false if it said so, with no work in flight.
  bool push(const Queries& queries, const Rows& rows, const Outputs& out, int threads, uintptr_t stream,
            const std::function<bool()>& stop);
  void finish();

 private:
  struct State;
  State* state_;
};

}  // namespace influence_fast::cuda
