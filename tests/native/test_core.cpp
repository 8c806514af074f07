// The C++ core against plain double arithmetic, every instruction set of this machine, over ragged shapes. Inputs lie
// in buffers of exactly their size, so that a sanitizer build sees any access past an end.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "dispatch.h"
#include "quantize.h"
#include "ranks.h"
#include "score.h"

using namespace influence_fast;

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);      \
      std::exit(1);                                                             \
    }                                                                           \
  } while (0)

namespace {

std::mt19937 random_bits(7);

std::vector<float> normal(int64_t n) {
  std::normal_distribution<float> draw;
  std::vector<float> out(static_cast<size_t>(n));
  for (float& x : out) x = draw(random_bits);
  return out;
}

struct Matrix {  // rows of one dtype, and their values
  std::vector<char> bytes;
  std::vector<float> scales;
  std::vector<double> values;
};

Matrix stored(DType dtype, int64_t n, int64_t k) {
  const std::vector<float> x = normal(n * k);
  Matrix m;
  m.values.resize(x.size());
  if (dtype == DType::f32) {
    m.bytes.resize(x.size() * 4);
    if (!x.empty()) std::memcpy(m.bytes.data(), x.data(), m.bytes.size());
    std::copy(x.begin(), x.end(), m.values.begin());
  } else if (dtype == DType::bf16) {
    std::vector<uint16_t> bits(x.size());
    CHECK(convert_bf16(x.data(), n, k, k, bits.data(), 2, {}));
    m.bytes.resize(x.size() * 2);
    if (!x.empty()) std::memcpy(m.bytes.data(), bits.data(), m.bytes.size());
    for (size_t i = 0; i < x.size(); ++i) m.values[i] = from_bf16(bits[i]);
  } else {
    m.bytes.resize(x.size());
    m.scales.resize(static_cast<size_t>(n));
    bool complete = false;
    const auto bad = quantize_rows(x.data(), n, k, k, {}, reinterpret_cast<int8_t*>(m.bytes.data()), m.scales.data(), 2,
                                   {}, complete);
    CHECK(complete && bad.empty());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) {
        const auto at = static_cast<size_t>(i * k + j);
        m.values[at] = static_cast<double>(m.scales[static_cast<size_t>(i)]) * static_cast<int8_t>(m.bytes[at]);
        CHECK(std::fabs(m.values[at] - x[at]) <= 0.5001 * m.scales[static_cast<size_t>(i)]);
      }
  }
  return m;
}

void check_scores(const Isa& isa, DType dtype, int64_t n, int64_t q, int64_t k, bool high, bool normalize) {
  const Matrix rows = stored(dtype, n, k);
  const std::vector<float> x = normal(q * k);
  const Queries queries(x.data(), q, k, k, dtype, high, kernel_for(isa, dtype), 2, {});
  const int64_t size = dtype == DType::f32 ? 4 : dtype == DType::bf16 ? 2 : 1;
  const Rows in{rows.bytes.data(), n, k, k * size, dtype, rows.scales.empty() ? nullptr : rows.scales.data(), 0};
  std::vector<float> scores(static_cast<size_t>(n * q)), columns(static_cast<size_t>(n * q));
  std::vector<double> sums(static_cast<size_t>(n));
  std::vector<int64_t> begin{0, q}, all(static_cast<size_t>(q));
  for (int64_t i = 0; i < q; ++i) all[static_cast<size_t>(i)] = i;
  Outputs out;
  out.normalize = normalize;
  out.scores = scores.data();
  out.scores_stride = q;
  out.columns = columns.data();
  out.columns_stride = n;
  out.group_sums = sums.data();
  out.group_stride = 1;
  out.groups = Groups{1, begin.data(), all.data()};
  TopK top(q, std::min<int64_t>(n, 3), 2);
  out.topk = &top;
  bool complete = false;
  CHECK(score_rows(queries, in, out, 2, {}, complete).empty() && complete);

  double error = 0, size2 = 0;
  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (int64_t c = 0; c < q; ++c) {
      double want = 0, rr = 0, qq = 0;
      for (int64_t j = 0; j < k; ++j) {
        const double a = rows.values[static_cast<size_t>(i * k + j)], b = x[static_cast<size_t>(c * k + j)];
        want += a * b;
        rr += a * a;
        qq += b * b;
      }
      if (normalize) want = rr > 0 && qq > 0 ? want / std::sqrt(rr * qq) : 0;
      const float got = scores[static_cast<size_t>(i * q + c)];
      CHECK(got == columns[static_cast<size_t>(c * n + i)]);
      error += (got - want) * (got - want);
      size2 += normalize ? 1 : rr * qq;
      total += got;
    }
    CHECK(std::fabs(total - sums[static_cast<size_t>(i)]) <= 1e-9 * (1 + std::fabs(total)));
  }
  // Relative to |row| |query|: fp32 sums; a bf16 query is off by at most 2^-8 of its norm, an int8 one by
  // max / (254 rms) < 0.02; the second terms take that down by 2^8 and 254.
  const double bound = dtype == DType::f32 ? 1e-6 : high ? 1e-4 : dtype == DType::bf16 ? 4e-3 : 2e-2;
  CHECK(std::sqrt(error) <= bound * std::sqrt(size2) + 1e-30);

  std::vector<float> values(static_cast<size_t>(q * top.k()));
  std::vector<int64_t> places(values.size());
  top.result(values.data(), places.data());
  for (int64_t c = 0; c < q; ++c) {
    std::vector<float> column(columns.begin() + c * n, columns.begin() + (c + 1) * n);
    std::sort(column.begin(), column.end(), std::greater<float>());
    for (int64_t i = 0; i < top.k(); ++i) CHECK(values[static_cast<size_t>(c * top.k() + i)] == column[static_cast<size_t>(i)]);
  }
}

void check_long_rows(const Isa& isa) {  // the extreme of int32 sums, and past one segment
  for (const int64_t k : {int64_t{65536}, int64_t{200003}}) {
    const std::vector<int8_t> row(static_cast<size_t>(k), -128);
    const std::vector<float> x(static_cast<size_t>(9 * k), -3.f), scale{1.f};
    for (const int64_t q : {int64_t{1}, int64_t{9}}) {
      const Queries queries(x.data(), q, k, k, DType::i8, false, kernel_for(isa, DType::i8), 1, {});
      const Rows in{reinterpret_cast<const char*>(row.data()), 1, k, k, DType::i8, scale.data(), 0};
      for (const bool normalize : {false, true}) {
        std::vector<float> scores(static_cast<size_t>(q));
        Outputs out;
        out.normalize = normalize;
        out.scores = scores.data();
        out.scores_stride = q;
        bool complete = false;
        CHECK(score_rows(queries, in, out, 1, {}, complete).empty());
        for (const float s : scores) CHECK(std::fabs(s - (normalize ? 1.0 : 384.0 * k)) <= 1e-5 * (normalize ? 1.0 : 384.0 * k));
      }
    }
  }
}

void check_ranks() {
  for (const int64_t n : {0, 1, 2, 7, 4095, 5000}) {
    const int64_t q = 3;
    std::vector<float> columns(static_cast<size_t>(q * n));
    for (float& x : columns) x = static_cast<float>(static_cast<int>(random_bits() % 41) - 20) / 8.f;  // many ties
    for (int64_t i = 0; i < n; ++i) columns[static_cast<size_t>(i)] = 2.5f;                              // all equal
    if (n > 1) columns[static_cast<size_t>(n)] = -0.f, columns[static_cast<size_t>(n + 1)] = 0.f;
    const std::vector<float> before = columns;
    CHECK(rank_columns(columns.data(), q, n, 2, {}));
    std::vector<uint32_t> twice(columns.size());
    if (n) std::memcpy(twice.data(), columns.data(), columns.size() * 4);
    for (int64_t c = 0; c < q; ++c) {
      std::vector<float> sorted(before.begin() + c * n, before.begin() + (c + 1) * n);
      std::sort(sorted.begin(), sorted.end());
      for (int64_t i = 0; i < n; ++i) {
        const auto range = std::equal_range(sorted.begin(), sorted.end(), before[static_cast<size_t>(c * n + i)]);
        CHECK(twice[static_cast<size_t>(c * n + i)] ==
              static_cast<uint32_t>((range.first - sorted.begin()) + 1 + (range.second - sorted.begin())));
      }
    }
    const std::vector<int64_t> begin{0, 2, 3}, query{0, 2, 2};
    std::vector<double> sums(static_cast<size_t>(2 * n), 1.0);
    CHECK(add_ranks(twice.data(), n, Groups{2, begin.data(), query.data()}, sums.data(), 2, {}));
    for (int64_t i = 0; i < n; ++i)
      CHECK(sums[static_cast<size_t>(2 * i)] ==
            1 + 0.5 * (double(twice[static_cast<size_t>(i)]) + twice[static_cast<size_t>(2 * n + i)]));
  }
}

void check_non_finite(const Isa& isa) {
  const int64_t n = 200, k = 37;
  for (const int64_t q : {int64_t{2}, int64_t{40}}) {
    std::vector<float> rows = normal(n * k);
    const std::vector<float> x = normal(q * k);
    rows[3 * k + 36] = std::numeric_limits<float>::quiet_NaN();
    rows[199 * k] = -std::numeric_limits<float>::infinity();
    const Queries queries(x.data(), q, k, k, DType::f32, false, isa.f32, 1, {});
    bool complete = false;
    for (const bool normalize : {false, true}) {
      Outputs out;
      out.normalize = normalize;
      const Rows in{reinterpret_cast<const char*>(rows.data()), n, k, k * 4, DType::f32, nullptr, 1000};
      CHECK(score_rows(queries, in, out, 2, {}, complete) == (std::vector<int64_t>{1003, 1199}));
    }
  }
}

void check_stop_and_errors() {
  int calls = 0;
  CHECK(!parallel_blocks(100, 2, [](int64_t, int) {}, [&] { return ++calls == 1; }) || calls == 0);
  bool thrown = false;
  try {
    parallel_blocks(100, 2, [](int64_t i, int) { if (i == 50) throw std::runtime_error("block 50"); }, {});
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  CHECK(thrown);
  thrown = false;
  try {
    find_isa("abacus");
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  CHECK(thrown);
}

void check_philox() {  // known answers of Random123
  const uint32_t zero[4] = {}, key0[2] = {}, ones[4] = {~0u, ~0u, ~0u, ~0u}, key1[2] = {~0u, ~0u};
  uint32_t out[4];
  philox4x32_10(zero, key0, out);
  CHECK(out[0] == 0x6627e8d5 && out[1] == 0xe169c58d && out[2] == 0xbc57ac4c && out[3] == 0x9b00dbd8);
  philox4x32_10(ones, key1, out);
  CHECK(out[0] == 0x408f276d && out[1] == 0x41c83b0e && out[2] == 0xa20bc7c6 && out[3] == 0x6d5451fd);
}

}  // namespace

int main() {
  check_philox();
  check_ranks();
  check_stop_and_errors();
  for (const Isa& isa : available_isas()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::i8})
      for (const int64_t n : {1, 7, 97})
        for (const int64_t q : {1, 5, 8, 17, 67})
          for (const int64_t k : {1, 63, 64, 65, 257, 1031})
            for (const bool high : {false, true}) check_scores(isa, dtype, n, q, k, high, (n + q + k) % 2 == 0);
    for (const int64_t k : {2047, 4096, 4099})
      for (const DType dtype : {DType::f32, DType::bf16, DType::i8}) check_scores(isa, dtype, 5, 19, k, true, true);
    check_long_rows(isa);
    check_non_finite(isa);
    std::printf("%s: ok\n", isa.name);
  }
  return 0;
}
