// The CUDA part of influence_fast._native: its functions, and what build_config() says of it.
#pragma once
#include <pybind11/pybind11.h>

namespace influence_fast::cuda {

void bind(pybind11::module_& m);
pybind11::dict config();

}  // namespace influence_fast::cuda
