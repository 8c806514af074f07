#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace influence_fast {

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
#ifdef IF_HAVE_AVX512_VNNI
  names.push_back("avx512_vnni");
#endif
#ifdef IF_HAVE_AVX512_BF16
  names.push_back("avx512_bf16");
#endif
#ifdef IF_HAVE_AVX512
  names.push_back("avx512");
#endif
#ifdef IF_HAVE_AVX2
  names.push_back("avx2");
#endif
#ifdef IF_HAVE_NEON
  names.push_back("neon");
#endif
  names.push_back("portable");
  return names;
}

static std::vector<Isa> detect() {
  std::vector<Isa> found;
#if defined(IF_HAVE_AVX512) || defined(IF_HAVE_AVX2)
  __builtin_cpu_init();
#endif
#ifdef IF_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    Isa base{"avx512_base", {}, {}, {}};
    avx512_kernels(base);
    Isa best = base;
    best.name = "avx512";
#ifdef IF_HAVE_AVX512_VNNI
    if (__builtin_cpu_supports("avx512vnni")) avx512_vnni_kernels(best);
#endif
#ifdef IF_HAVE_AVX512_BF16
    if (__builtin_cpu_supports("avx512bf16")) avx512_bf16_kernels(best);
#endif
    found.push_back(best);
    found.push_back(base);
  }
#endif
#ifdef IF_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    Isa isa{"avx2", {}, {}, {}};
    avx2_kernels(isa);
    found.push_back(isa);
  }
#endif
#ifdef IF_HAVE_NEON
  Isa neon{"neon", {}, {}, {}};
  neon_kernels(neon);
  found.push_back(neon);
#endif
  Isa portable{"portable", {}, {}, {}};
  portable_kernels(portable);
  found.push_back(portable);
  return found;
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

const Isa& find_isa(const std::string& asked) {
  std::string name = asked;
  if (name.empty()) {
    const char* forced = std::getenv("INFLUENCE_FAST_ISA");
    if (forced) name = forced;
  }
  const auto& isas = available_isas();
  if (name.empty()) return isas.front();
  std::string known;
  for (const Isa& isa : isas) {
    if (name == isa.name) return isa;
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here; use one of: " + known);
}

const Kernel& kernel_for(const Isa& isa, DType dtype) {
  return dtype == DType::f32 ? isa.f32 : dtype == DType::bf16 ? isa.bf16 : isa.i8;
}

const char* panel_name(Panel panel) {
  switch (panel) {
    case Panel::f32: return "fp32 fma";
    case Panel::bf16: return "bf16 dot";
    case Panel::i16: return "int16 madd";
    default: return "int8 dot";
  }
}

}  // namespace influence_fast
