#include "queries.h"

#include <algorithm>
#include <cmath>

namespace influence_fast {

// Up to this many columns a row is read once against all of them (dots); beyond, tiles win. Measured at k = 8192.
static constexpr int64_t kDotColumns = 8;

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float from_bf16(uint16_t high) {
  const uint32_t bits = static_cast<uint32_t>(high) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

int64_t Queries::element_bytes() const {
  switch (kernel.panel) {
    case Panel::f32: return 4;
    case Panel::u8: return 1;
    default: return 2;
  }
}

static float clamp127(float t) { return std::min(127.f, std::max(-127.f, t)); }

static float round_even(float t) {  // |t| < 2^22; vectorises where a call of rint would not
  constexpr float kMagic = 12582912.f;
  return (t + kMagic) - kMagic;
}

// int8 terms of one query: t = q / factor in [-127, 127], first round(t), then round(254 (t - round(t))).
// Returns the norm of what was kept; sums of squares are exact integers.
template <class E>
static double round_int8(const float* q, int64_t k, int offset, int terms, E* const* term, float* const* factor) {
  float peak = 0;
  for (int64_t i = 0; i < k; ++i) peak = std::max(peak, std::fabs(q[i]));
  const float scale = peak / 127.f, divisor = scale > 0 ? scale : 1.f;
  *factor[0] = scale;
  int64_t square = 0;
  if (terms == 1) {
    for (int64_t i = 0; i < k; ++i) {
      const int v = static_cast<int>(round_even(clamp127(q[i] / divisor)));
      term[0][i] = static_cast<E>(v + offset);
      square += v * v;
    }
    return scale * std::sqrt(static_cast<double>(square));
  }
  *factor[1] = scale / 254.f;
  for (int64_t i = 0; i < k; ++i) {
    const float t = clamp127(q[i] / divisor), high = round_even(t);
    const int v0 = static_cast<int>(high), v1 = static_cast<int>(round_even((t - high) * 254.f));
    term[0][i] = static_cast<E>(v0 + offset);
    term[1][i] = static_cast<E>(v1 + offset);
    const int v = 254 * v0 + v1;
    square += static_cast<int64_t>(v) * v;
  }
  return scale / 254.0 * std::sqrt(static_cast<double>(square));
}

// One query as panel elements, term by term, with their factors; returns the norm of what was kept.
static double round_query(const float* q, int64_t k, DType rows, Panel panel, int terms, bool high, char* const* term,
                          float* const* factor) {
  if (panel == Panel::u8) {
    uint8_t* const to[2] = {reinterpret_cast<uint8_t*>(term[0]), reinterpret_cast<uint8_t*>(term[1])};
    return round_int8(q, k, 128, terms, to, factor);
  }
  if (panel == Panel::i16) {
    int16_t* const to[2] = {reinterpret_cast<int16_t*>(term[0]), reinterpret_cast<int16_t*>(term[1])};
    return round_int8(q, k, 0, terms, to, factor);
  }
  double square = 0;
  for (int s = 0; s < terms; ++s) *factor[s] = 1.f;
  for (int64_t i = 0; i < k; ++i) {
    double kept = q[i];
    if (panel == Panel::bf16) {
      uint16_t v = to_bf16(q[i]);
      reinterpret_cast<uint16_t*>(term[0])[i] = v;
      kept = from_bf16(v);
      if (terms == 2) {
        v = to_bf16(q[i] - static_cast<float>(kept));
        reinterpret_cast<uint16_t*>(term[1])[i] = v;
        kept += from_bf16(v);
      }
    } else {
      if (rows == DType::bf16 && !high) kept = from_bf16(to_bf16(q[i]));
      reinterpret_cast<float*>(term[0])[i] = static_cast<float>(kept);
    }
    square += kept * kept;
  }
  return std::sqrt(square);
}

Queries::Queries(const float* values, int64_t count_, int64_t k_, int64_t stride, DType rows_, bool high,
                 const Kernel& kernel_, int threads, const Poll& poll)
    : count(count_), k(k_), rows(rows_), kernel(kernel_) {
  terms = high && kernel.panel != Panel::f32 ? 2 : 1;
  columns = count * terms;
  tiled = columns > kDotColumns;
  padded = (columns + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
  factor.assign(static_cast<size_t>(columns), 0.f);
  norm.assign(static_cast<size_t>(count), 0.0);
  const int64_t bytes = element_bytes();
  const int64_t per_unit = 4 / bytes;
  units_ = (k + per_unit - 1) / per_unit;
  row_bytes_ = std::max<int64_t>(1, (k + kernel.dot_step - 1) / kernel.dot_step) * kernel.dot_step * bytes;
  const int64_t stored = tiled ? padded * units_ * 4 : columns * row_bytes_;
  packed_ = Buffer<char>(stored);
  // The padding of a u8 query is 0 + 128; it meets the zero padding of a row, so any value would do.
  std::memset(packed_.data(), kernel.panel == Panel::u8 ? 128 : 0, static_cast<size_t>(stored));

  // Queries are taken a vector at a time, so that threads write whole cache lines of a panel.
  const int64_t together = kernel.lanes;
  std::vector<Buffer<char>> buffers;
  for (int t = 0; t < std::max(1, threads); ++t) buffers.emplace_back(tiled ? terms * together * row_bytes_ : 0);
  complete = parallel_blocks((count + together - 1) / together, threads, [&](int64_t block, int thread) {
    const int64_t first = block * together, n = std::min(together, count - first);
    char* const scratch = buffers[static_cast<size_t>(thread)].data();
    if (tiled) std::memset(scratch, kernel.panel == Panel::u8 ? 128 : 0, static_cast<size_t>(terms * n * row_bytes_));
    for (int64_t q = first; q < first + n; ++q) {
      char* term[2] = {};
      float* scale[2] = {};
      for (int s = 0; s < terms; ++s) {
        const int64_t column = s * count + q;
        term[s] = tiled ? scratch + (s * n + q - first) * row_bytes_ : packed_.data() + column * row_bytes_;
        scale[s] = &factor[static_cast<size_t>(column)];
      }
      norm[static_cast<size_t>(q)] = round_query(values + q * stride, k, rows, kernel.panel, terms, high, term, scale);
    }
    if (!tiled) return;
    for (int s = 0; s < terms; ++s) {
      char* to[64];  // where column s * count + first + i starts in its panel, and the bytes to its next unit
      int64_t step[64];
      for (int64_t i = 0; i < n; ++i) {
        const int64_t column = s * count + first + i, index = column / panel_columns();
        step[i] = std::min(panel_columns(), padded - index * panel_columns()) * 4;
        to[i] = packed_.data() + index * panel_columns() * units_ * 4 + column % panel_columns() * 4;
      }
      for (int64_t u = 0; u < units_; ++u)
        for (int64_t i = 0; i < n; ++i)
          std::memcpy(to[i] + u * step[i], scratch + (s * n + i) * row_bytes_ + u * 4, 4);
    }
  }, poll);
}

}  // namespace influence_fast
