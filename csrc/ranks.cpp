#include "ranks.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "buffer.h"

namespace influence_fast {
namespace {

constexpr int kBits = 11, kBuckets = 1 << kBits, kPasses = 3;  // 3 x 11 bits cover the 32 of a float

struct Pair {
  uint32_t key, row;
};

// Unsigned order = float order; -0 counts as +0.
inline uint32_t ordered(uint32_t bits) {
  if (bits == 0x80000000u) bits = 0;
  return bits ^ ((bits & 0x80000000u) ? 0xffffffffu : 0x80000000u);
}

class ColumnSort {
 public:
  explicit ColumnSort(int64_t rows) : rows_(rows), a_(rows), b_(rows), counts_(kPasses * kBuckets) {}

  void rank(float* column) {
    counts_.zero();
    for (int64_t i = 0; i < rows_; ++i) {
      const uint32_t key = at(column, i);
      for (int p = 0; p < kPasses; ++p) ++counts_[p * kBuckets + digit(key, p)];
    }
    const Pair* from = nullptr;  // the column itself, until a pass has moved something
    for (int p = 0; p < kPasses; ++p) {
      uint32_t* count = counts_.data() + p * kBuckets;
      if (rows_ > 0 && count[digit(at(column, 0), p)] == rows_) continue;  // one bucket holds all
      uint32_t place = 0;
      for (int b = 0; b < kBuckets; ++b) {
        const uint32_t n = count[b];
        count[b] = place;
        place += n;
      }
      Pair* to = from == a_.data() ? b_.data() : a_.data();
      if (!from)
        for (int64_t i = 0; i < rows_; ++i) {
          const uint32_t key = at(column, i);
          to[count[digit(key, p)]++] = Pair{key, static_cast<uint32_t>(i)};
        }
      else
        for (int64_t i = 0; i < rows_; ++i) to[count[digit(from[i].key, p)]++] = from[i];
      from = to;
    }
    if (!from) {  // all equal
      for (int64_t i = 0; i < rows_; ++i) put(column, i, static_cast<uint32_t>(rows_ + 1));
      return;
    }
    for (int64_t i = 0; i < rows_;) {
      int64_t end = i + 1;
      while (end < rows_ && from[end].key == from[i].key) ++end;
      const auto twice = static_cast<uint32_t>(i + 1 + end);
      for (; i < end; ++i) put(column, from[i].row, twice);
    }
  }

 private:
  static int digit(uint32_t key, int pass) { return static_cast<int>((key >> (pass * kBits)) & (kBuckets - 1)); }
  static uint32_t at(const float* column, int64_t i) {
    uint32_t bits;
    std::memcpy(&bits, column + i, 4);
    return ordered(bits);
  }
  static void put(float* column, int64_t i, uint32_t value) { std::memcpy(column + i, &value, 4); }

  int64_t rows_;
  Buffer<Pair> a_, b_;
  Buffer<uint32_t> counts_;
};

}  // namespace

bool rank_columns(float* columns, int64_t count, int64_t rows, int threads, const Poll& poll) {
  std::vector<std::unique_ptr<ColumnSort>> sorts(static_cast<size_t>(std::max(1, threads)));
  return parallel_blocks(count, threads, [&](int64_t column, int thread) {
    auto& sort = sorts[static_cast<size_t>(thread)];
    if (!sort) sort = std::make_unique<ColumnSort>(rows);
    sort->rank(columns + column * rows);
  }, poll);
}

bool add_ranks(const uint32_t* columns, int64_t rows, const Groups& groups, double* sums, int threads,
               const Poll& poll) {
  constexpr int64_t kBlock = 4096;
  return parallel_blocks((rows + kBlock - 1) / kBlock, threads, [&](int64_t block, int) {
    const int64_t first = block * kBlock, n = std::min(kBlock, rows - first);
    uint64_t total[kBlock];
    for (int64_t g = 0; g < groups.count; ++g) {
      std::fill_n(total, n, uint64_t{0});
      for (int64_t m = groups.begin[g]; m < groups.begin[g + 1]; ++m) {
        const uint32_t* column = columns + groups.query[m] * rows + first;
        for (int64_t i = 0; i < n; ++i) total[i] += column[i];
      }
      for (int64_t i = 0; i < n; ++i) sums[(first + i) * groups.count + g] += 0.5 * static_cast<double>(total[i]);
    }
  }, poll);
}

}  // namespace influence_fast
