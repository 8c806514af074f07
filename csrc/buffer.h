// Cache-line aligned scratch memory.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace influence_fast {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class E>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : size_(count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(E) + 127) / 64 * 64;
    data_.reset(static_cast<E*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
  }
  E* data() { return data_.get(); }
  const E* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  E& operator[](int64_t i) { return data_.get()[i]; }
  const E& operator[](int64_t i) const { return data_.get()[i]; }
  void zero() { std::memset(data_.get(), 0, static_cast<size_t>(size_) * sizeof(E)); }

 private:
  std::unique_ptr<E, Free> data_;
  int64_t size_;
};

}  // namespace influence_fast
