# Enables the CUDA language where nvcc works; IF_CUDA, IF_CUDA_WHY and IF_CUDA_COMPILER say how that went.
# CMake looks for nvcc in CUDACXX, CUDA_PATH and PATH; where it is in none, the customary place is tried too. A wrapper
# script is fine: CMake asks nvcc itself (`nvcc -v`) where its toolkit lies.
if(NOT INFLUENCE_FAST_CUDA)
  set(IF_CUDA_WHY "it was turned off (INFLUENCE_FAST_CUDA=OFF)")
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(IF_NVCC nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda /opt/cuda PATH_SUFFIXES bin)
  mark_as_advanced(IF_NVCC)
  if(IF_NVCC)
    set(ENV{CUDACXX} "${IF_NVCC}")
  endif()
endif()

check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  set(IF_CUDA_WHY "no nvcc that works with this C++ compiler was found when the package was installed")
  return()
endif()
enable_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 11.2)
  set(IF_CUDA_WHY "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION} is not nvcc 11.2 or later")
  return()
endif()
set(IF_CUDA "built")
set(IF_CUDA_WHY "")
set(IF_CUDA_COMPILER "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
