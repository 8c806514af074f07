// Plain C++ for any machine; the compiler vectorises the fixed-size loops with what the platform guarantees.
#include "tile.h"

namespace influence_fast {
namespace {

constexpr int kWidth = 4;  // lanes of 4 bytes: the 128-bit vectors that every 64-bit platform has

template <class E, int N>
struct Lanes {
  E v[N];
};

template <class SumType>
struct Sums {
  using Sum = SumType;
  using Acc = Lanes<Sum, kWidth>;
  static constexpr int kLanes = kWidth;
  static Acc zero() { return Acc{}; }
  static Acc load_sums(const Sum* p) {
    Acc a;
    std::memcpy(a.v, p, sizeof(a));
    return a;
  }
  static void store_sums(Sum* p, Acc a) { std::memcpy(p, a.v, sizeof(a)); }
  static Acc add(Acc a, Acc b) {
    for (int i = 0; i < kWidth; ++i) a.v[i] = plus(a.v[i], b.v[i]);
    return a;
  }
  static Sum reduce(Acc a) { return plus(plus(a.v[0], a.v[1]), plus(a.v[2], a.v[3])); }
  static float plus(float a, float b) { return a + b; }
  static int32_t plus(int32_t a, int32_t b) {  // wraps, as the vector instructions do
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  }
};

struct F32 : Sums<float> {
  using Element = float;
  using Vec = Lanes<float, kWidth>;
  static constexpr int kStep = kWidth;
  static constexpr bool kOffset = false;
  static Vec load(const void* p) {
    Vec x;
    std::memcpy(x.v, p, sizeof(x));
    return x;
  }
  static Vec bcast(const void* p) {
    float f;
    std::memcpy(&f, p, 4);
    return Vec{{f, f, f, f}};
  }
  static Acc fma(Acc a, Vec q, Vec x) {
    for (int i = 0; i < kWidth; ++i) a.v[i] += q.v[i] * x.v[i];
    return a;
  }
  static Vec load_row(const float* p) { return load(p); }
  static Vec load_row(const uint16_t* p) {
    Vec x;
    widen(p, kWidth, x.v);
    return x;
  }
  static Vec self(Vec x) { return x; }
  static Vec ones() { return Vec{}; }
};

struct I16 : Sums<int32_t> {
  using Element = int16_t;
  using Vec = Lanes<int16_t, 2 * kWidth>;
  static constexpr int kStep = 2 * kWidth;
  static constexpr bool kOffset = false;
  static Vec load(const void* p) {
    Vec x;
    std::memcpy(x.v, p, sizeof(x));
    return x;
  }
  static Vec bcast(const void* p) {
    int16_t e[2];
    std::memcpy(e, p, 4);
    return Vec{{e[0], e[1], e[0], e[1], e[0], e[1], e[0], e[1]}};
  }
  static Acc fma(Acc a, Vec q, Vec x) {
    for (int i = 0; i < kWidth; ++i)
      a.v[i] = plus(a.v[i], q.v[2 * i] * x.v[2 * i] + q.v[2 * i + 1] * x.v[2 * i + 1]);
    return a;
  }
  static Vec load_row(const int8_t* p) {
    Vec x;
    widen(p, kStep, x.v);
    return x;
  }
  static Vec self(Vec x) { return x; }
  static Vec ones() { return Vec{}; }
};

}  // namespace

void portable_kernels(Isa& isa) {
  isa.f32 = make_kernel<F32, float, 4, 2>(Panel::f32);
  isa.bf16 = make_kernel<F32, uint16_t, 4, 2>(Panel::f32);
  isa.i8 = make_kernel<I16, int8_t, 4, 2>(Panel::i16);
}

}  // namespace influence_fast
