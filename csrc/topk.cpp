#include "topk.h"

#include <algorithm>

namespace influence_fast {

TopK::TopK(int64_t queries, int64_t k, int threads) : queries_(queries), k_(k) {
  heaps_.resize(static_cast<size_t>(std::max(1, threads)));
  for (Heaps& heaps : heaps_) {
    heaps.floor.assign(static_cast<size_t>(queries), -std::numeric_limits<float>::infinity());
    heaps.entries.resize(static_cast<size_t>(queries));
  }
}

void TopK::push(Heaps& heaps, int64_t query, float score, int64_t row) {
  auto& heap = heaps.entries[static_cast<size_t>(query)];
  const Entry entry{score, row};
  if (static_cast<int64_t>(heap.size()) < k_) {
    heap.push_back(entry);
    std::push_heap(heap.begin(), heap.end(), better);
  } else if (better(entry, heap.front())) {
    std::pop_heap(heap.begin(), heap.end(), better);
    heap.back() = entry;
    std::push_heap(heap.begin(), heap.end(), better);
  }
  if (static_cast<int64_t>(heap.size()) == k_) heaps.floor[static_cast<size_t>(query)] = heap.front().score;
}

void TopK::result(float* values, int64_t* rows) const {
  std::vector<Entry> all;
  for (int64_t q = 0; q < queries_; ++q) {
    all.clear();
    for (const Heaps& heaps : heaps_) {
      const auto& heap = heaps.entries[static_cast<size_t>(q)];
      all.insert(all.end(), heap.begin(), heap.end());
    }
    std::sort(all.begin(), all.end(), better);
    for (int64_t i = 0; i < k_; ++i) {
      const bool filled = i < static_cast<int64_t>(all.size());
      values[q * k_ + i] =
          filled ? all[static_cast<size_t>(i)].score : -std::numeric_limits<float>::infinity();
      rows[q * k_ + i] = filled ? all[static_cast<size_t>(i)].row : -1;
    }
  }
}

}  // namespace influence_fast
