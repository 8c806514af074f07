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

// One query as panel elements, term by term, with their factors; returns the squared norm of what was kept.
static double round_query(const float* q, int64_t k, DType rows, Panel panel, int terms, bool high, char* const* term,
                          float* const* factor) {
  double square = 0;
  if (rows == DType::i8) {
    float peak = 0;
    for (int64_t i = 0; i < k; ++i) peak = std::max(peak, std::fabs(q[i]));
    const float scale = peak / 127.f;
    *factor[0] = scale;
    if (terms == 2) *factor[1] = scale / 254.f;
    for (int64_t i = 0; i < k; ++i) {
      const float t = scale > 0 ? q[i] / scale : 0.f;
      int v[2] = {static_cast<int>(std::lrintf(std::min(127.f, std::max(-127.f, t)))), 0};
      if (terms == 2)
        v[1] = static_cast<int>(
            std::lrintf(std::min(127.f, std::max(-127.f, (t - static_cast<float>(v[0])) * 254.f))));
      for (int s = 0; s < terms; ++s) {
        if (panel == Panel::u8)
          reinterpret_cast<uint8_t*>(term[s])[i] = static_cast<uint8_t>(v[s] + 128);
        else
          reinterpret_cast<int16_t*>(term[s])[i] = static_cast<int16_t>(v[s]);
      }
      const double kept = (v[0] + v[1] / 254.0) * scale;
      square += kept * kept;
    }
    return square;
  }
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
  return square;
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

  const int64_t scratch = row_bytes_;
  std::vector<Buffer<char>> buffers;
  for (int t = 0; t < std::max(1, threads); ++t) buffers.emplace_back(terms * scratch);
  complete = parallel_blocks(count, threads, [&](int64_t q, int thread) {
    char* term[2] = {};
    float* scale[2] = {};
    for (int s = 0; s < terms; ++s) {
      term[s] = buffers[static_cast<size_t>(thread)].data() + s * scratch;
      std::memset(term[s], kernel.panel == Panel::u8 ? 128 : 0, static_cast<size_t>(scratch));
      scale[s] = &factor[static_cast<size_t>(s * count + q)];
    }
    norm[static_cast<size_t>(q)] =
        std::sqrt(round_query(values + q * stride, k, rows, kernel.panel, terms, high, term, scale));
    for (int s = 0; s < terms; ++s) {
      const int64_t column = s * count + q;
      if (!tiled) {
        std::memcpy(packed_.data() + column * row_bytes_, term[s], static_cast<size_t>(row_bytes_));
        continue;
      }
      const int64_t index = column / panel_columns(), in_panel = column % panel_columns();
      const int64_t width = std::min(panel_columns(), padded - index * panel_columns());
      char* to = packed_.data() + index * panel_columns() * units_ * 4 + in_panel * 4;
      for (int64_t u = 0; u < units_; ++u) std::memcpy(to + u * width * 4, term[s] + u * 4, 4);
    }
  }, poll);
}

}  // namespace influence_fast
