# The core without Python: sources in IF_CORE, definitions in IF_DEFINITIONS, one translation unit an instruction set
# with its own flags. What the compiler knows is compiled; what the machine has is chosen when the module is loaded
# (dispatch.cpp), never here. Included by the module (CMakeLists.txt) and by the sanitizer build of tests/native.
include(CheckCXXCompilerFlag)
find_package(Threads REQUIRED)

set(IF_CORE)
set(IF_DEFINITIONS)
foreach(name dispatch quantize queries ranks score topk)
  list(APPEND IF_CORE "${CMAKE_CURRENT_LIST_DIR}/${name}.cpp")
endforeach()
# Sums must come out the same on every path: no contraction beyond the FMAs that are written out.
set(IF_OPTIONS -ffp-contract=off -Wall -Wextra)

# GCC's partial redundancy elimination copies every accumulator of a tile twice a step: 2.5 x slower (GCC 12).
set(IF_KERNEL_OPTIONS)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(IF_KERNEL_OPTIONS -fno-tree-pre -Wno-uninitialized -Wno-maybe-uninitialized)  # in GCC 12's own intrinsics
endif()

macro(add_kernels file definition)
  set(source "${IF_KERNELS_DIR}/${file}.cpp")
  list(APPEND IF_CORE "${source}")
  list(APPEND IF_DEFINITIONS ${definition})
  set_property(SOURCE "${source}" APPEND PROPERTY COMPILE_OPTIONS ${IF_KERNEL_OPTIONS} ${ARGN})
endmacro()

macro(add_kernels_if_known file definition)
  string(JOIN " " flags ${ARGN})
  set(CMAKE_REQUIRED_QUIET ON)
  check_cxx_compiler_flag("${flags}" COMPILER_KNOWS_${definition})
  if(COMPILER_KNOWS_${definition})
    add_kernels(${file} ${definition} ${ARGN})
  endif()
endmacro()

set(IF_KERNELS_DIR "${CMAKE_CURRENT_LIST_DIR}/kernels")
add_kernels(portable IF_HAVE_PORTABLE)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma)
  add_kernels_if_known(avx2 IF_HAVE_AVX2 -mavx2 -mfma)
  add_kernels_if_known(avx512 IF_HAVE_AVX512 ${avx512})
  add_kernels_if_known(avx512_vnni IF_HAVE_AVX512_VNNI ${avx512} -mavx512vnni)
  add_kernels_if_known(avx512_bf16 IF_HAVE_AVX512_BF16 ${avx512} -mavx512bf16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  add_kernels(neon IF_HAVE_NEON)
endif()
