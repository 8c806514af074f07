// Cache-line aligned scratch memory.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace influence_fast {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class E>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : size_(count) {
    const size_t wanted = static_cast<size_t>(count) * sizeof(E);
    const size_t align = wanted >= kHugePage ? kHugePage : 64;
    const size_t bytes = (wanted + 1 + align - 1) / align * align;
    data_.reset(static_cast<E*>(std::aligned_alloc(align, bytes)));
    if (!data_) throw std::bad_alloc();
#ifdef __linux__
    if (align == kHugePage) madvise(data_.get(), bytes, MADV_HUGEPAGE);  // a hint: fewer TLB misses in the panels
#endif
  }
  E* data() { return data_.get(); }
  const E* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  E& operator[](int64_t i) { return data_.get()[i]; }
  const E& operator[](int64_t i) const { return data_.get()[i]; }
  void zero() { std::memset(data_.get(), 0, static_cast<size_t>(size_) * sizeof(E)); }

 private:
  static constexpr size_t kHugePage = size_t{1} << 21;
  std::unique_ptr<E, Free> data_;
  int64_t size_;
};

}  // namespace influence_fast
