#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include "queries.h"

namespace influence_fast {

void philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]}, k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
                              static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    std::memcpy(c, next, sizeof(c));
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  std::memcpy(out, c, sizeof(c));
}

namespace {

void round_nearest(const float* x, int64_t k, float scale, int8_t* q) {
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, half to even
  for (int64_t j = 0; j < k; ++j) {
    const float t = std::min(127.f, std::max(-127.f, x[j] / scale));
    q[j] = static_cast<int8_t>(static_cast<int>((t + kMagic) - kMagic));
  }
}

void round_stochastic(const float* x, int64_t k, float scale, const Rounding& rounding, int64_t row, int8_t* q) {
  for (int64_t j = 0; j < k; j += 4) {
    const uint32_t counter[4] = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(row),
                                 static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), 2};
    uint32_t words[4];
    philox4x32_10(counter, rounding.key, words);
    for (int64_t e = 0; e < 4 && j + e < k; ++e) {
      const float t = std::min(127.f, std::max(-127.f, x[j + e] / scale)), low = std::floor(t);
      const float u = static_cast<float>(words[e] >> 8) * 0x1p-24f;
      q[j + e] = static_cast<int8_t>(static_cast<int>(low) + (u < t - low ? 1 : 0));
    }
  }
}

}  // namespace

std::vector<int64_t> quantize_rows(const float* rows, int64_t count, int64_t k, int64_t stride, const Rounding& rounding,
                                   int8_t* quantized, float* scales, int threads, const Poll& poll, bool& complete) {
  std::vector<int64_t> bad;
  std::mutex lock;
  constexpr int64_t kBlock = 16;
  complete = parallel_blocks((count + kBlock - 1) / kBlock, threads, [&](int64_t block, int) {
    for (int64_t i = block * kBlock; i < std::min(count, (block + 1) * kBlock); ++i) {
      const float* x = rows + i * stride;
      int8_t* q = quantized + i * k;
      uint32_t peak_bits = 0;  // |x| as an integer keeps the order and puts inf and NaN on top
      for (int64_t j = 0; j < k; ++j) {
        uint32_t bits;
        std::memcpy(&bits, x + j, 4);
        peak_bits = std::max(peak_bits, bits & 0x7fffffffu);
      }
      float peak;
      std::memcpy(&peak, &peak_bits, 4);
      const float scale = peak / 127.f;
      // A scale below the normal range could not hold seven bits of the row; it is a row of zeros.
      if (!std::isfinite(peak) || scale < std::numeric_limits<float>::min()) {
        std::fill_n(q, k, int8_t{0});
        scales[i] = 0.f;
        if (!std::isfinite(peak)) {
          const std::lock_guard<std::mutex> hold(lock);
          bad.push_back(i);
        }
        continue;
      }
      scales[i] = scale;
      if (rounding.stochastic)
        round_stochastic(x, k, scale, rounding, rounding.first_row + i, q);
      else
        round_nearest(x, k, scale, q);
    }
  }, poll);
  std::sort(bad.begin(), bad.end());
  return bad;
}

bool convert_bf16(const float* in, int64_t count, int64_t k, int64_t stride, uint16_t* out, int threads,
                  const Poll& poll) {
  return parallel_blocks(count, threads, [&](int64_t i, int) {
    for (int64_t j = 0; j < k; ++j) out[i * k + j] = to_bf16(in[i * stride + j]);
  }, poll);
}

}  // namespace influence_fast
