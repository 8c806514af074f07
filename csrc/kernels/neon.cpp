// aarch64 NEON (always there on aarch64): 32 registers of 4 lanes, tiles of 6 x 16.
#include <arm_neon.h>

#include "tile.h"

namespace influence_fast {
namespace {

struct F32 {
  using Element = float;
  using Sum = float;
  using Vec = float32x4_t;
  using Acc = float32x4_t;
  static constexpr int kLanes = 4, kStep = 4;
  static constexpr bool kOffset = false;
  static Acc zero() { return vdupq_n_f32(0.f); }
  static Vec load(const void* p) { return vld1q_f32(static_cast<const float*>(p)); }
  static Vec bcast(const void* p) { return vld1q_dup_f32(static_cast<const float*>(p)); }
  static Acc fma(Acc a, Vec q, Vec x) { return vfmaq_f32(a, q, x); }
  static Acc load_sums(const float* p) { return vld1q_f32(p); }
  static void store_sums(float* p, Acc a) { vst1q_f32(p, a); }
  static Acc add(Acc a, Acc b) { return vaddq_f32(a, b); }
  static float reduce(Acc a) { return vaddvq_f32(a); }
  static Vec load_row(const float* p) { return vld1q_f32(p); }
  static Vec load_row(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static Vec self(Vec x) { return x; }
  static Vec ones() { return zero(); }
};

struct I16 {
  using Element = int16_t;
  using Sum = int32_t;
  using Vec = int16x8_t;
  using Acc = int32x4_t;
  static constexpr int kLanes = 4, kStep = 8;
  static constexpr bool kOffset = false;
  static Acc zero() { return vdupq_n_s32(0); }
  static Vec load(const void* p) { return vld1q_s16(static_cast<const int16_t*>(p)); }
  static Vec bcast(const void* p) {
    int32_t unit;
    std::memcpy(&unit, p, 4);
    return vreinterpretq_s16_s32(vdupq_n_s32(unit));
  }
  static Acc fma(Acc a, Vec q, Vec x) {
    const int32x4_t low = vmull_s16(vget_low_s16(q), vget_low_s16(x));
    return vaddq_s32(a, vpaddq_s32(low, vmull_high_s16(q, x)));
  }
  static Acc load_sums(const int32_t* p) { return vld1q_s32(p); }
  static void store_sums(int32_t* p, Acc a) { vst1q_s32(p, a); }
  static Acc add(Acc a, Acc b) { return vaddq_s32(a, b); }
  static int32_t reduce(Acc a) { return vaddvq_s32(a); }
  static Vec load_row(const int8_t* p) { return vmovl_s8(vld1_s8(p)); }
  static Vec self(Vec x) { return x; }
  static Vec ones() { return vdupq_n_s16(0); }
};

}  // namespace

void neon_kernels(Isa& isa) {
  isa.f32 = make_kernel<F32, float, 6, 4>(Panel::f32);
  isa.bf16 = make_kernel<F32, uint16_t, 6, 4>(Panel::f32);
  isa.i8 = make_kernel<I16, int8_t, 6, 4>(Panel::i16);
}

}  // namespace influence_fast
