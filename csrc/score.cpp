#include "score.h"

#include <algorithm>
#include <cmath>
#include <mutex>

namespace influence_fast {
namespace {

// Rows taken at a time: 48 x 4 KiB of packed rows and 48 x 512 x 4 bytes of sums leave a 1 MiB L2 to the queries.
constexpr int64_t kRowBlock = 48;  // a multiple of every kernel's tile_rows (4, 6)
// int32 sums hold |row| <= 128 times |query| <= 127 over this many columns; longer rows go in segments.
constexpr int64_t kSegment = 65536;

// Rows that a dot prefetches ahead: without, 14 GB/s and not 23 GB/s on one core (k = 8192, int8, two queries).
constexpr int64_t kAhead = 2 * kDotRows;

int64_t stored_bytes(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::bf16 ? 2 : 1; }

// Scratch of one thread, and the work on one block of rows.
class Worker {
 public:
  Worker(const Queries& queries, const Rows& rows, const Outputs& out, int64_t block, int thread)
      : q_(queries), rows_(rows), out_(out), thread_(thread), integer_(q_.rows == DType::i8),
        sums_needed_(q_.kernel.panel == Panel::u8), packed_(q_.tiled ? block * kRowStrideBytes : 0),
        raw_(block * q_.padded), scores_(block * q_.columns), sum_(block), norm2_(block) {}

  void run(int64_t first, int64_t n, std::vector<int64_t>& bad) {
    first_ = first;
    n_ = n;
    std::fill_n(norm2_.data(), n, 0.0);
    const int64_t segment = integer_ ? kSegment : q_.k;
    for (int64_t at = 0; at < q_.k || at == 0; at += segment) {
      const int64_t length = std::min(segment, q_.k - at);
      raw_.zero();
      std::fill_n(sum_.data(), n, 0);
      q_.tiled ? tiles(at, length) : dots(at, length);
      collect(at == 0);
      if (q_.k == 0) break;
    }
    finish(bad);
  }

 private:
  const char* row(int64_t i, int64_t at) const {
    return rows_.data + (first_ + i) * rows_.stride + at * stored_bytes(rows_.dtype);
  }

  // Sum and squared norm of `n` rows (<= kDotRows) over part of k; squares are added up in double.
  void statistics(int64_t i, int64_t n, int64_t at, int64_t length) {
    if (!sums_needed_ && !out_.normalize) return;
    const void* pointer[kDotRows];
    int32_t sum[kDotRows] = {};
    alignas(4) char square[kDotRows * 4];
    for (int64_t r = 0; r < n; ++r) pointer[r] = row(i + r, at);
    q_.kernel.dot(pointer, static_cast<int>(n), nullptr, 0, length, nullptr, 0, sum, out_.normalize ? square : nullptr,
                  0);
    add_statistics(i, n, sum, square);
  }

  void add_statistics(int64_t i, int64_t n, const int32_t* sum, const char* square) {
    for (int64_t r = 0; r < n; ++r) {
      if (sums_needed_)
        sum_[i + r] = static_cast<int32_t>(static_cast<uint32_t>(sum_[i + r]) + static_cast<uint32_t>(sum[r]));
      if (!out_.normalize) continue;
      if (integer_) {
        int32_t value;
        std::memcpy(&value, square + r * 4, 4);
        norm2_[i + r] += value;
      } else {
        float value;
        std::memcpy(&value, square + r * 4, 4);
        norm2_[i + r] += value;
      }
    }
  }

  // Rows are read a chunk at a time, too short for the hardware's prefetch: ask for the next chunk meanwhile.
  void prefetch(int64_t i, int64_t n, int64_t at, int64_t length) const {
    for (int64_t r = i; r < i + n; ++r) {
      const char* from = row(r, at);
      for (int64_t b = 0; b < length * stored_bytes(rows_.dtype); b += 64) __builtin_prefetch(from + b, 0, 2);
    }
  }

  // raw_[i, c] over [at, at + length) by tiles: chunk by chunk of k, the rows packed once a chunk.
  void tiles(int64_t at, int64_t length) {
    const Kernel& kernel = q_.kernel;
    const int64_t per_unit = 4 / q_.element_bytes(), chunk = q_.chunk();
    const int64_t tile_rows = (n_ + kernel.tile_rows - 1) / kernel.tile_rows * kernel.tile_rows;
    for (int64_t i = n_; i < tile_rows; ++i)
      std::memset(packed_.data() + i * kRowStrideBytes, 0, kChunkBytes);
    for (int64_t c = 0; c < length; c += chunk) {
      const int64_t part = std::min(chunk, length - c);
      for (int64_t i = 0; i < n_; i += kDotRows) {
        const int64_t n = std::min<int64_t>(kDotRows, n_ - i);
        statistics(i, n, at + c, part);
        for (int64_t r = i; r < i + n; ++r)
          kernel.pack(row(r, at + c), part, packed_.data() + r * kRowStrideBytes);
        if (c + part < length) prefetch(i, n, at + c + part, std::min(chunk, length - c - part));
      }
      const int64_t units = (part + per_unit - 1) / per_unit, first_unit = (at + c) / per_unit;
      for (int64_t column = 0, p = 0; column < q_.padded; column += q_.panel_columns(), ++p) {
        const int64_t width = std::min(q_.panel_columns(), q_.padded - column);
        const char* panel = q_.panel(p) + first_unit * width * 4;
        for (int64_t i = 0; i < tile_rows; i += kernel.tile_rows)
          kernel.tile(packed_.data() + i * kRowStrideBytes, panel, units, static_cast<int>(width / kernel.lanes),
                      raw_.data() + i * q_.padded + column, q_.padded);
      }
    }
  }

  // The same for few columns: each row is read once, straight from where it lies.
  void dots(int64_t at, int64_t length) {
    for (int64_t i = 0; i < n_; i += kDotRows) {
      const int64_t n = std::min<int64_t>(kDotRows, n_ - i);
      const void* pointer[kDotRows];
      for (int64_t r = 0; r < n; ++r) pointer[r] = row(i + r, at);
      for (int64_t c = 0; c < q_.columns; c += kDotQueries) {
        const int64_t nq = std::min<int64_t>(kDotQueries, q_.columns - c);
        const void* query[kDotQueries];
        for (int64_t s = 0; s < nq; ++s) query[s] = q_.row(c + s) + at * q_.element_bytes();
        int32_t sum[kDotRows] = {};
        alignas(4) char square[kDotRows * 4];
        const bool first = c == 0;
        q_.kernel.dot(pointer, static_cast<int>(n), query, static_cast<int>(nq), length,
                      raw_.data() + i * q_.padded + c, q_.padded, sum, first && out_.normalize ? square : nullptr,
                      first ? kAhead * rows_.stride : 0);
        if (first) add_statistics(i, n, sum, square);
      }
    }
  }

  // scores_[i, c] (+)= raw_, the +128 of u8 queries taken off.
  void collect(bool first) {
    for (int64_t i = 0; i < n_; ++i) {
      float* to = scores_.data() + i * q_.columns;
      const uint32_t* raw = raw_.data() + i * q_.padded;
      if (!integer_) {  // one segment only
        std::memcpy(to, raw, static_cast<size_t>(q_.columns) * 4);
        continue;
      }
      const uint32_t offset = sums_needed_ ? 128u * static_cast<uint32_t>(sum_[i]) : 0u;
      if (first)
        for (int64_t c = 0; c < q_.columns; ++c) to[c] = static_cast<float>(static_cast<int32_t>(raw[c] - offset));
      else
        for (int64_t c = 0; c < q_.columns; ++c) to[c] += static_cast<float>(static_cast<int32_t>(raw[c] - offset));
    }
  }

  // fp32 squares may overflow or vanish where the norm itself does not: then once more in double.
  double exact_norm2(int64_t i) const {
    double total = 0;
    for (int64_t j = 0; j < q_.k; ++j) {
      double x;
      if (rows_.dtype == DType::f32) {
        x = reinterpret_cast<const float*>(row(i, 0))[j];
      } else if (rows_.dtype == DType::bf16) {
        x = from_bf16(reinterpret_cast<const uint16_t*>(row(i, 0))[j]);
      } else {
        x = reinterpret_cast<const int8_t*>(row(i, 0))[j];
      }
      total += x * x;
    }
    return total;
  }

  float row_factor(int64_t i) {
    const float scale = rows_.scales ? rows_.scales[first_ + i] : 1.f;
    if (!out_.normalize) return scale;
    double norm2 = norm2_[i];
    if (!(norm2 > 1e-30 && norm2 < 1e37)) norm2 = exact_norm2(i);
    if (!std::isfinite(scale) || !std::isfinite(norm2)) return std::nanf("");
    if (norm2 == 0 || scale == 0) return 0.f;
    return static_cast<float>(std::copysign(1.0, scale) / std::sqrt(norm2));  // a positive scale cancels
  }

  void finish(std::vector<int64_t>& bad) {
    if (factor_.empty()) {
      factor_ = q_.factor;
      if (out_.normalize)
        for (int64_t c = 0; c < q_.columns; ++c) {
          const double norm = q_.norm[static_cast<size_t>(c % q_.count)];
          auto& f = factor_[static_cast<size_t>(c)];
          f = norm > 0 ? static_cast<float>(f / norm) : 0.f;
        }
    }
    for (int64_t i = 0; i < n_; ++i) {
      float* s = scores_.data() + i * q_.columns;
      const float by_row = row_factor(i);
      if (q_.terms == 1)
        for (int64_t c = 0; c < q_.count; ++c) s[c] = s[c] * factor_[static_cast<size_t>(c)] * by_row;
      else
        for (int64_t c = 0; c < q_.count; ++c)
          s[c] = (s[c] * factor_[static_cast<size_t>(c)] +
                  s[c + q_.count] * factor_[static_cast<size_t>(c + q_.count)]) * by_row;
      int infinite = 0;
      for (int64_t c = 0; c < q_.count; ++c) infinite |= !(std::fabs(s[c]) <= std::numeric_limits<float>::max());
      if (infinite) bad.push_back(rows_.start + first_ + i);
      if (out_.scores)
        std::memcpy(out_.scores + (first_ + i) * out_.scores_stride, s, static_cast<size_t>(q_.count) * 4);
      for (int64_t g = 0; g < out_.groups.count; ++g) {
        double sum = 0;
        for (int64_t m = out_.groups.begin[g]; m < out_.groups.begin[g + 1]; ++m) sum += s[out_.groups.query[m]];
        out_.group_sums[(first_ + i) * out_.group_stride + g] += sum;
      }
      if (out_.topk && !infinite) out_.topk->offer(thread_, rows_.start + first_ + i, s);
    }
    if (out_.columns) transpose();
  }

  // Into columns, 16 x 16 at a time: written row by row, each store would touch another page.
  void transpose() {
    const int64_t ld = q_.columns, base = rows_.start + first_;
    for (int64_t c0 = 0; c0 < q_.count; c0 += 16) {
      const int64_t c1 = std::min(q_.count, c0 + 16);
      for (int64_t i0 = 0; i0 < n_; i0 += 16) {
        const int64_t i1 = std::min(n_, i0 + 16);
        for (int64_t c = c0; c < c1; ++c)
          for (int64_t i = i0; i < i1; ++i) out_.columns[c * out_.columns_stride + base + i] = scores_[i * ld + c];
      }
    }
  }

  const Queries& q_;
  const Rows& rows_;
  const Outputs& out_;
  const int thread_;
  const bool integer_, sums_needed_;
  Buffer<char> packed_;
  Buffer<uint32_t> raw_;   // [block, padded] 4-byte sums
  Buffer<float> scores_;   // [block, columns]
  Buffer<int32_t> sum_;
  Buffer<double> norm2_;
  std::vector<float> factor_;
  int64_t first_ = 0, n_ = 0;
};

}  // namespace

std::vector<int64_t> score_rows(const Queries& queries, const Rows& rows, const Outputs& outputs, int threads,
                                const Poll& poll, bool& complete) {
  complete = true;
  std::vector<int64_t> bad;
  if (rows.count == 0 || queries.count == 0) return bad;
  threads = std::max(1, threads);
  const int64_t tile = queries.kernel.tile_rows;
  int64_t block = (rows.count + 2 * threads - 1) / (2 * threads);
  block = std::min(kRowBlock, (block + tile - 1) / tile * tile);
  std::vector<std::unique_ptr<Worker>> workers(static_cast<size_t>(threads));
  std::mutex lock;
  complete = parallel_blocks((rows.count + block - 1) / block, threads, [&](int64_t index, int thread) {
    auto& worker = workers[static_cast<size_t>(thread)];
    if (!worker) worker = std::make_unique<Worker>(queries, rows, outputs, block, thread);
    std::vector<int64_t> here;
    worker->run(index * block, std::min(block, rows.count - index * block), here);
    if (!here.empty()) {
      const std::lock_guard<std::mutex> hold(lock);
      bad.insert(bad.end(), here.begin(), here.end());
    }
  }, poll);
  std::sort(bad.begin(), bad.end());
  return bad;
}

}  // namespace influence_fast
