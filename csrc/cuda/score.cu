// One thread block owns 128 rows and goes through all queries, a tile of 16 or 128 at a time: no other block adds to
// the sums of its rows, so group sums need no atomics and come out the same in every run.
//
// Both dtypes move as bytes: mma m16n8k32 (int8) and m16n8k16 (bf16) take 32 bytes of k a step in the same places of
// the same registers, so that one ldmatrix serves either (PTX ISA, "Matrix Fragments for mma").
#include "score.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "check.h"
#include "plan.h"

namespace influence_fast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kStages = 4;                        // of the pipeline from memory to shared memory
constexpr int kStepBytes = 64;                    // of k in a stage
constexpr int kStride = kStepBytes + kGranule;    // of a row in shared memory: 5 granules, so ldmatrix has no conflicts
constexpr int kGranules = kStepBytes / kGranule;

struct Launch {
  const char* rows;
  int64_t row_count, row_stride;
  const float* row_factor;  // or null
  const char* queries;
  int64_t query_stride;
  const float* query_factor;
  int query_count;
  int bytes;                // of k, from the pointers above
  bool aligned;             // rows may be copied by granules
  bool add;                 // to the scores and columns there, which hold the terms before
  Outputs out;
};

template <int kColumns>
struct Shape {
  static constexpr int kWarpsDown = kColumns == kFewColumns ? 8 : 4;
  static constexpr int kWarpsAcross = kWarps / kWarpsDown;
  static constexpr int kBlocksDown = kTileRows / kWarpsDown / 16;     // of 16 rows in a warp
  static constexpr int kBlocksAcross = kColumns / kWarpsAcross / 8;   // of 8 queries
  static constexpr int kStage = (kTileRows + kColumns) * kStride;
  static constexpr int kScoreStride = kColumns + 4;
  static constexpr int kScores = kTileRows * kScoreStride * 4;        // takes the place of the stages
  static constexpr int kShared = kStages * kStage > kScores ? kStages * kStage : kScores;
  static_assert(kBlocksAcross % 2 == 0, "queries are loaded 16 at a time");
};

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory: `bytes` (0 to 16) from `from`, then zeros.
__device__ inline void copy_granule(unsigned char* to, const char* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

__device__ inline void copy_bytes(unsigned char* to, const char* from, int bytes) {
#pragma unroll
  for (int b = 0; b < static_cast<int>(kGranule); ++b) to[b] = b < bytes ? static_cast<unsigned char>(from[b]) : 0;
}

__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline void load_matrices(uint32_t (&to)[4], const unsigned char* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(from))
               : "memory");
}

__device__ inline void multiply(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What one thread copies of every stage: granule threadIdx % 4 of rows (and queries) threadIdx / 4, + 64, ...
// A granule that does not exist is zeros, and nothing is read for it (cp.async with a source size of 0).
template <int kCount>
struct Copier {
  static constexpr int kApart = kThreads / kGranules;
  static constexpr int kTimes = (kCount + kApart - 1) / kApart;
  const char* from;
  int64_t stride;  // of kApart rows
  int place;       // in the stage
  int exist;       // how many of this thread's granules do

  __device__ Copier(const char* data, int64_t row_stride, int64_t first, int64_t count) {
    const int mine = threadIdx.x / kGranules, granule = threadIdx.x % kGranules;
    from = data + (first + mine) * row_stride + granule * static_cast<int>(kGranule);
    stride = row_stride * kApart;
    place = mine * kStride + granule * static_cast<int>(kGranule);
    const int64_t left = count - first - mine;
    exist = mine >= kCount || left <= 0 ? 0 : static_cast<int>((left - 1 < kCount ? left - 1 : kCount) / kApart) + 1;
  }

  // kStepBytes of k, `at` from the start, where `left` bytes of k are left.
  __device__ void copy(unsigned char* stage, int at, int left, bool aligned) const {
    left -= threadIdx.x % kGranules * static_cast<int>(kGranule);
    left = left < 0 ? 0 : left < static_cast<int>(kGranule) ? left : static_cast<int>(kGranule);
    if (kCount < kApart && threadIdx.x / kGranules >= kCount) return;
    const char* source = from + at;
#pragma unroll
    for (int u = 0; u < kTimes; ++u, source += stride) {
      unsigned char* to = stage + place + u * kApart * kStride;
      const int bytes = u < exist ? left : 0;
      if (aligned)
        copy_granule(to, source, bytes);
      else
        copy_bytes(to, source, bytes);
    }
  }
};

// What is wanted of the tile of finished scores in shared memory.
template <int kColumns>
__device__ inline void take(const Launch& in, const float* scores, int64_t first_row, int first_query, int tile) {
  constexpr int kScoreStride = Shape<kColumns>::kScoreStride;
  const Outputs& out = in.out;
  const int rows = static_cast<int>(in.row_count - first_row < kTileRows ? in.row_count - first_row : kTileRows);
  const int columns = in.query_count - first_query < kColumns ? in.query_count - first_query : kColumns;
  if (out.scores) {
    for (int e = threadIdx.x; e < rows * kColumns; e += kThreads) {
      const int i = e / kColumns, q = e % kColumns;
      if (q >= columns) continue;
      float* to = out.scores + (first_row + i) * out.scores_stride + first_query + q;
      const float value = scores[i * kScoreStride + q] + (in.add ? *to : 0.0f);
      *to = value;
      if (!isfinite(value)) out.bad[first_row + i] = 1;
    }
  }
  if (out.columns) {
    for (int e = threadIdx.x; e < columns * static_cast<int>(kTileRows); e += kThreads) {
      const int i = e % static_cast<int>(kTileRows), q = e / static_cast<int>(kTileRows);
      if (i >= rows) continue;
      float* to = out.columns + (first_query + q) * out.columns_stride + first_row + i;
      const float value = scores[i * kScoreStride + q] + (in.add ? *to : 0.0f);
      *to = value;
      if (!isfinite(value)) out.bad[first_row + i] = 1;
    }
  }
  if (out.group_sums) {
    const int32_t* begin = out.group_begin + tile * (out.groups + 1);
    for (int64_t e = threadIdx.x; e < out.groups * kTileRows; e += kThreads) {
      const int i = static_cast<int>(e % kTileRows);
      const int64_t g = e / kTileRows;
      if (i >= rows || begin[g] == begin[g + 1]) continue;
      double sum = 0.0;
      for (int32_t m = begin[g]; m < begin[g + 1]; ++m) sum += scores[i * kScoreStride + out.group_column[m]];
      out.group_sums[(first_row + i) * out.group_stride + g] += sum;
    }
  }
}

template <typename Sum, int kColumns>
__global__ __launch_bounds__(kThreads, 2) void score_kernel(const Launch in) {
  using S = Shape<kColumns>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / S::kWarpsAcross * S::kBlocksDown * 16;
  const int warp_query = warp % S::kWarpsAcross * S::kBlocksAcross * 8;
  // Where this lane points ldmatrix: rows come as 16 x 32 bytes, queries as 16 x 32 bytes in two blocks of 8.
  const int row_offset = (warp_row + lane % 16) * kStride + lane / 16 * 16;
  const int query_offset =
      (static_cast<int>(kTileRows) + warp_query + lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 16;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int steps = (in.bytes + kStepBytes - 1) / kStepBytes;
  const Copier<static_cast<int>(kTileRows)> row_copier(in.rows, in.row_stride, first_row, in.row_count);

  for (int first_query = 0, tile = 0; first_query < in.query_count; first_query += kColumns, ++tile) {
    const Copier<kColumns> query_copier(in.queries, in.query_stride, first_query, in.query_count);
    const auto load = [&](int step) {
      unsigned char* stage = shared + step % kStages * S::kStage;
      const int at = step * kStepBytes;
      row_copier.copy(stage, at, in.bytes - at, in.aligned);
      query_copier.copy(stage + kTileRows * kStride, at, in.bytes - at, true);
    };
    Sum sum[S::kBlocksDown][S::kBlocksAcross][4] = {};
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) load(s);
      commit();
    }
    for (int step = 0; step < steps; ++step) {
      wait<kStages - 2>();
      __syncthreads();  // the stage has come, and all warps are done with the one before it, which is filled next
      if (step + kStages - 1 < steps) load(step + kStages - 1);
      commit();
      const unsigned char* stage = shared + step % kStages * S::kStage;
#pragma unroll
      for (int at = 0; at < kStepBytes; at += 32) {
        uint32_t a[S::kBlocksDown][4];
#pragma unroll
        for (int i = 0; i < S::kBlocksDown; ++i) load_matrices(a[i], stage + row_offset + i * 16 * kStride + at);
#pragma unroll
        for (int j = 0; j < S::kBlocksAcross; j += 2) {
          uint32_t b[4];
          load_matrices(b, stage + query_offset + j * 8 * kStride + at);
#pragma unroll
          for (int i = 0; i < S::kBlocksDown; ++i) {
            multiply(sum[i][j], a[i], b[0], b[1]);
            multiply(sum[i][j + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
    wait<0>();
    __syncthreads();  // the scores take the stages' place

    float* scores = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < S::kBlocksDown; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = warp_row + i * 16 + half * 8 + lane / 4;
        const bool exists = first_row + r < in.row_count;
        const float by_row = !exists ? 0.0f : in.row_factor ? in.row_factor[first_row + r] : 1.0f;
        bool finite = true;
#pragma unroll
        for (int j = 0; j < S::kBlocksAcross; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int q = warp_query + j * 8 + lane % 4 * 2 + c;
            const float by_query = first_query + q < in.query_count ? in.query_factor[first_query + q] : 0.0f;
            const float value = static_cast<float>(sum[i][j][half * 2 + c]) * by_query * by_row;
            scores[r * S::kScoreStride + q] = value;
            finite = finite && isfinite(value);
          }
        }
        if (exists && !finite) in.out.bad[first_row + r] = 1;
      }
    }
    __syncthreads();
    take<kColumns>(in, scores, first_row, first_query, tile);
    __syncthreads();  // the next tile's stages take the scores' place
  }
}

__device__ inline double square_of(int8_t value) { return static_cast<double>(static_cast<int>(value) * value); }
__device__ inline double square_of(uint16_t bits) {
  const double value = __uint_as_float(static_cast<uint32_t>(bits) << 16);
  return value * value;
}

// factor[i] = sign of the scale / |row i|; 0 for a row of zeros, NaN where scale or norm is not finite. A warp a row.
template <typename Element>
__global__ void norm_kernel(const char* rows, int64_t count, int64_t k, int64_t stride, const float* scales,
                            float* factor) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= count) return;
  const auto* row = reinterpret_cast<const Element*>(rows + i * stride);
  double sum = 0.0;
  for (int64_t j = threadIdx.x % 32; j < k; j += 32) sum += square_of(row[j]);
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32) return;
  const float scale = scales ? scales[i] : 1.0f;
  const double norm = sqrt(sum);
  const double sign = isfinite(scale) && isfinite(norm) ? (scale > 0.0f) - (scale < 0.0f) : nan("");
  factor[i] = static_cast<float>(norm == 0.0 ? sign * 0.0 : sign / norm);
}

template <typename Sum, int kColumns>
void launch(const Launch& in, cudaStream_t stream) {
  auto* kernel = score_kernel<Sum, kColumns>;
  constexpr int bytes = Shape<kColumns>::kShared;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  const auto blocks = static_cast<unsigned>((in.row_count + kTileRows - 1) / kTileRows);
  kernel<<<blocks, kThreads, bytes, stream>>>(in);
  check(cudaGetLastError(), "score_kernel");
}

}  // namespace

std::string unavailable() {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    const std::string why = error != cudaSuccess ? cudaGetErrorString(error) : "no CUDA device";
    cudaGetLastError();  // forget it
    return why;
  }
  for (int device = 0; device < count; ++device) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 8)
      return "";
  }
  return "no CUDA device of compute capability 8.0 or later";
}

void score(int device, const Queries& queries, const Rows& rows, const Outputs& out, uintptr_t stream_handle) {
  if (rows.count == 0 || queries.count == 0) return;
  if (queries.k >= int64_t{1} << 29) throw std::invalid_argument("rows have 2^29 columns or more");
  const OnDevice guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const auto* data = static_cast<const char*>(rows.data);
  const int64_t itemsize = queries.integer ? 1 : 2;
  if (out.normalize) {
    const auto blocks = static_cast<unsigned>((rows.count + kWarps - 1) / kWarps);
    auto* kernel = queries.integer ? norm_kernel<int8_t> : norm_kernel<uint16_t>;
    kernel<<<blocks, kThreads, 0, stream>>>(data, rows.count, queries.k, rows.stride, rows.scales, out.row_factor);
    check(cudaGetLastError(), "norm_kernel");
  }
  Launch in{};
  in.row_count = rows.count;
  in.row_stride = rows.stride;
  in.row_factor = out.normalize ? out.row_factor : rows.scales;
  in.query_stride = queries.stride;
  in.query_count = static_cast<int>(queries.count);
  in.aligned = reinterpret_cast<uintptr_t>(data) % kGranule == 0 && rows.stride % kGranule == 0;
  in.out = out;
  const int64_t segment = queries.integer ? kIntegerColumns : kFloatColumns;
  for (int64_t t = 0; t < queries.terms; ++t) {
    for (int64_t at = 0; at == 0 || at < queries.k; at += segment) {
      const int64_t left = queries.k - at;
      in.rows = data + at * itemsize;
      in.queries = static_cast<const char*>(queries.data) + t * queries.count * queries.stride + at * itemsize;
      in.query_factor = queries.factor + t * queries.count;
      in.bytes = static_cast<int>((left < segment ? left : segment) * itemsize);
      if (queries.integer)
        queries.count <= kFewColumns ? launch<int, kFewColumns>(in, stream) : launch<int, kManyColumns>(in, stream);
      else
        queries.count <= kFewColumns ? launch<float, kFewColumns>(in, stream) : launch<float, kManyColumns>(in, stream);
      in.add = true;
    }
  }
}

}  // namespace influence_fast::cuda
