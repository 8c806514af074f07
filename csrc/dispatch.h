// Which instruction sets were compiled, which this machine has, and the kernels of each.
#pragma once
#include <string>
#include <vector>

#include "kernels/kernel.h"

namespace influence_fast {

std::vector<std::string> compiled_isas();

// Usable here, best first. "avx512" takes VNNI and BF16 where the machine has them, "avx512_base" never does.
const std::vector<Isa>& available_isas();

// The named one, or the best for "" (then the environment variable INFLUENCE_FAST_ISA may name it).
// Throws std::invalid_argument with the known names.
const Isa& find_isa(const std::string& name);

const Kernel& kernel_for(const Isa& isa, DType dtype);
const char* panel_name(Panel panel);

}  // namespace influence_fast
