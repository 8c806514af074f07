// The k highest scores of each query, kept while rows stream past in any order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace influence_fast {

// Ordered by (score descending, row ascending): a total order, so the result does not depend on the threads.
class TopK {
 public:
  TopK(int64_t queries, int64_t k, int threads);

  // Offers scores[0 .. queries) of one row; only thread `thread` may call with that number.
  void offer(int thread, int64_t row, const float* scores) {
    Heaps& heaps = heaps_[static_cast<size_t>(thread)];
    for (int64_t q = 0; q < queries_; ++q)
      if (scores[q] >= heaps.floor[static_cast<size_t>(q)]) push(heaps, q, scores[q], row);
  }
  // Merged over threads into values [queries, k], rows [queries, k]; unfilled places get -inf and -1.
  void result(float* values, int64_t* rows) const;

  int64_t queries() const { return queries_; }
  int64_t k() const { return k_; }
  int threads() const { return static_cast<int>(heaps_.size()); }

 private:
  struct Entry {
    float score;
    int64_t row;
  };
  struct Heaps {
    std::vector<float> floor;                // [queries] worst score kept once full, else -inf
    std::vector<std::vector<Entry>> entries;  // [queries][<= k], worst on top
  };
  static bool better(const Entry& a, const Entry& b) {
    return a.score > b.score || (a.score == b.score && a.row < b.row);
  }
  void push(Heaps& heaps, int64_t query, float score, int64_t row);

  int64_t queries_, k_;
  std::vector<Heaps> heaps_;
};

}  // namespace influence_fast
