# The CUDA library: csrc/cuda/<op>.cu for the architectures named, or those of the GPUs present.
#
# INPAINTRT_CUDA and INPAINTRT_CUDA_ARCHS are cache variables; where they are left at their defaults, environment
# variables of the same names decide, because that is how somebody who runs pip can reach the build.

foreach(setting CUDA CUDA_ARCHS)
  string(TOUPPER "${INPAINTRT_${setting}}" INPAINTRT_WANTED_${setting})
  if(INPAINTRT_WANTED_${setting} MATCHES "^(AUTO)?$" AND NOT "$ENV{INPAINTRT_${setting}}" STREQUAL "")
    string(TOUPPER "$ENV{INPAINTRT_${setting}}" INPAINTRT_WANTED_${setting})
  endif()
endforeach()
string(REGEX REPLACE "[ ,]+" ";" INPAINTRT_WANTED_CUDA_ARCHS "${INPAINTRT_WANTED_CUDA_ARCHS}")

if(INPAINTRT_WANTED_CUDA MATCHES "^(1|YES|TRUE)$")
  set(INPAINTRT_WANTED_CUDA ON)
elseif(INPAINTRT_WANTED_CUDA MATCHES "^(0|NO|FALSE)$")
  set(INPAINTRT_WANTED_CUDA OFF)
elseif(NOT INPAINTRT_WANTED_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "INPAINTRT_CUDA is ${INPAINTRT_WANTED_CUDA}; accepted: AUTO, ON, OFF")
endif()
foreach(arch ${INPAINTRT_WANTED_CUDA_ARCHS})
  if(NOT arch MATCHES "^[0-9]+$" OR arch LESS 80)
    message(FATAL_ERROR "INPAINTRT_CUDA_ARCHS names ${arch}; accepted: numbers from 80 on, e.g. 80;90")
  endif()
endforeach()

set(INPAINTRT_NO_CUDA "") # why the library is not built
if(INPAINTRT_WANTED_CUDA STREQUAL OFF)
  set(INPAINTRT_NO_CUDA "INPAINTRT_CUDA=OFF")
endif()
if(NOT INPAINTRT_NO_CUDA AND NOT INPAINTRT_WANTED_CUDA_ARCHS)
  find_program(INPAINTRT_NVIDIA_SMI nvidia-smi)
  if(INPAINTRT_NVIDIA_SMI)
    execute_process(
      COMMAND ${INPAINTRT_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      RESULT_VARIABLE failed OUTPUT_VARIABLE found ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(NOT failed AND found MATCHES "^[0-9.\n]+$")
      string(REPLACE "." "" found "${found}")
      string(REPLACE "\n" ";" INPAINTRT_WANTED_CUDA_ARCHS "${found}")
      list(FILTER INPAINTRT_WANTED_CUDA_ARCHS EXCLUDE REGEX "^[5-7][0-9]$") # older than the kernels
    endif()
  endif()
  if(NOT INPAINTRT_WANTED_CUDA_ARCHS)
    set(INPAINTRT_NO_CUDA
        "nvidia-smi reports no GPU of sm 80 or newer; name architectures, e.g. INPAINTRT_CUDA_ARCHS=\"80;90\"")
  endif()
endif()
if(NOT INPAINTRT_NO_CUDA)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES OFF) # set on the target below
    enable_language(CUDA)
  else()
    set(INPAINTRT_NO_CUDA "nvcc was not found (PATH, CUDACXX)")
  endif()
endif()
if(INPAINTRT_NO_CUDA)
  if(INPAINTRT_WANTED_CUDA STREQUAL ON)
    message(FATAL_ERROR "INPAINTRT_CUDA=ON, but ${INPAINTRT_NO_CUDA}")
  endif()
  message(STATUS "Without CUDA kernels: ${INPAINTRT_NO_CUDA}")
endif()

function(add_cuda_library name ops)
  if(INPAINTRT_NO_CUDA)
    return()
  endif()
  set(archs ${INPAINTRT_WANTED_CUDA_ARCHS})
  list(SORT archs COMPARE NATURAL)
  list(REMOVE_DUPLICATES archs)
  list(JOIN archs ", " arch_list)
  # Machine code for each, and PTX of the newest for GPUs that come after it.
  list(GET archs -1 newest)
  list(TRANSFORM archs APPEND "-real" OUTPUT_VARIABLE codes)
  list(APPEND codes "${newest}-virtual")
  message(STATUS "CUDA kernels for sm ${arch_list} with ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION}")

  add_library(${name} SHARED csrc/cuda/library.cu)
  foreach(op ${ops})
    if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/${op}.cu)
      target_sources(${name} PRIVATE csrc/cuda/${op}.cu csrc/plan/${op}.cpp)
    endif()
  endforeach()
  target_include_directories(${name} PRIVATE csrc/include csrc csrc/cpu)
  target_compile_definitions(${name} PRIVATE INPAINTRT_CUDA_ARCH_LIST="${arch_list}" INPAINTRT_CUDA_PTX=${newest})
  set_target_properties(${name} PROPERTIES
    CUDA_ARCHITECTURES "${codes}" CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static
    CUDA_VISIBILITY_PRESET hidden)
  # The directory's options are meant for the C++ compiler; nvcc gets its own.
  get_target_property(options ${name} COMPILE_OPTIONS)
  set_target_properties(${name} PROPERTIES COMPILE_OPTIONS "$<$<COMPILE_LANGUAGE:CXX>:${options}>")
  target_compile_options(${name} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--threads=0>")
  if(INPAINTRT_WERROR)
    # ptxas -v prints registers, stack and spills of each kernel, which tests/test_cuda_build.py reads.
    target_compile_options(${name} PRIVATE
      "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:--Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror -Xptxas=-v>")
  endif()
  install(TARGETS ${name} LIBRARY DESTINATION inpaintrt)
endfunction()
