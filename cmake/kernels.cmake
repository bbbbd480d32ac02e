# The kernel libraries, free of torch: dsv4_cpu_kernels and dsv4_cuda_kernels. Each compiles the candidate lists of
# csrc/ops for itself, with the kernels of its own device; object libraries, so nothing is dropped at the link.
include(CheckCXXCompilerFlag)

set(DSV4_CSRC "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
file(GLOB DSV4_OPS_SOURCES CONFIGURE_DEPENDS "${DSV4_CSRC}/ops/*.cpp")
file(GLOB DSV4_SCALAR_SOURCES CONFIGURE_DEPENDS "${DSV4_CSRC}/cpu/scalar/*.cpp")

add_library(dsv4_flags INTERFACE)
target_include_directories(dsv4_flags INTERFACE "${DSV4_CSRC}")
target_compile_options(dsv4_flags INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-ffp-contract=off>")

add_library(dsv4_common OBJECT "${DSV4_CSRC}/common/status.cpp" "${DSV4_CSRC}/common/hardware.cpp")
target_link_libraries(dsv4_common PUBLIC dsv4_flags)

# One object library an instruction set, with its own flags; chosen at run time.
set(DSV4_CPU_SETS)
set(DSV4_CPU_OBJECTS)  # everything that a CPU program links
set(DSV4_ISA_OBJECTS)  # of that, what has the flags of an instruction set
set(DSV4_CPU_DEFINITIONS DSV4_WITH_CPU)
function(dsv4_add_cpu_set name)
  file(GLOB sources CONFIGURE_DEPENDS "${DSV4_CSRC}/cpu/${name}/*.cpp")
  string(REPLACE ";" " " flags "${ARGN}")
  check_cxx_compiler_flag("${flags}" DSV4_COMPILER_HAS_${name})
  if(NOT sources OR NOT DSV4_COMPILER_HAS_${name})
    return()
  endif()
  add_library(dsv4_${name} OBJECT ${sources})
  target_link_libraries(dsv4_${name} PUBLIC dsv4_flags)
  # GCC's own intrinsics headers read undefined registers on purpose, and GCC 12 warns of it.
  target_compile_options(dsv4_${name} PRIVATE ${ARGN} -Wno-uninitialized -Wno-maybe-uninitialized)
  string(TOUPPER ${name} upper)
  set(DSV4_CPU_SETS ${DSV4_CPU_SETS} ${name} PARENT_SCOPE)
  set(DSV4_CPU_OBJECTS ${DSV4_CPU_OBJECTS} $<TARGET_OBJECTS:dsv4_${name}> PARENT_SCOPE)
  set(DSV4_ISA_OBJECTS ${DSV4_ISA_OBJECTS} $<TARGET_OBJECTS:dsv4_${name}> PARENT_SCOPE)
  set(DSV4_CPU_DEFINITIONS ${DSV4_CPU_DEFINITIONS} DSV4_WITH_${upper} PARENT_SCOPE)
endfunction()
set(DSV4_AVX2_FLAGS -mavx2 -mfma)
set(DSV4_AVX512_FLAGS -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vnni -mavx512bf16 -mfma)
set(DSV4_AMX_FLAGS ${DSV4_AVX512_FLAGS} -mamx-tile -mamx-bf16 -mamx-int8)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  dsv4_add_cpu_set(avx2 ${DSV4_AVX2_FLAGS})
  dsv4_add_cpu_set(avx512 ${DSV4_AVX512_FLAGS})
  dsv4_add_cpu_set(amx ${DSV4_AMX_FLAGS})
endif()

add_library(dsv4_cpu_kernels OBJECT ${DSV4_OPS_SOURCES} ${DSV4_SCALAR_SOURCES})
target_compile_definitions(dsv4_cpu_kernels PRIVATE ${DSV4_CPU_DEFINITIONS})
target_link_libraries(dsv4_cpu_kernels PUBLIC dsv4_flags)
list(APPEND DSV4_CPU_OBJECTS $<TARGET_OBJECTS:dsv4_cpu_kernels> $<TARGET_OBJECTS:dsv4_common>)

if(DSV4_WITH_CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(DSV4_CUDA_OBJECTS)
  set(DSV4_CUDA_DEFINITIONS)
  set(DSV4_CUDA_BUILT_FOR)
  set(DSV4_PTX_ARCHITECTURES 80-virtual 90-virtual)  # of what every GPU from Ampere on runs
  function(dsv4_add_cuda_set name architectures ptx_architectures)
    file(GLOB_RECURSE sources CONFIGURE_DEPENDS "${DSV4_CSRC}/cuda/${name}/*.cu")
    if(NOT sources)
      return()
    endif()
    add_library(dsv4_${name} OBJECT ${sources})
    target_link_libraries(dsv4_${name} PUBLIC dsv4_flags)
    set_target_properties(dsv4_${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}")
    target_compile_options(dsv4_${name} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-lineinfo;-diag-suppress=20012>")
    # The same as PTX that can be read, for the machine that runs it (tests/cuda_host/machine); built where a test wants it.
    add_library(dsv4_${name}_ptx OBJECT EXCLUDE_FROM_ALL ${sources})
    target_link_libraries(dsv4_${name}_ptx PUBLIC dsv4_flags)
    set_target_properties(dsv4_${name}_ptx PROPERTIES CUDA_ARCHITECTURES "${ptx_architectures}")
    target_compile_options(dsv4_${name}_ptx PRIVATE
      "$<$<COMPILE_LANGUAGE:CUDA>:-lineinfo;-diag-suppress=20012;--no-compress>")
    string(TOUPPER ${name} upper)
    set(DSV4_CUDA_OBJECTS ${DSV4_CUDA_OBJECTS} $<TARGET_OBJECTS:dsv4_${name}> PARENT_SCOPE)
    set(DSV4_CUDA_DEFINITIONS ${DSV4_CUDA_DEFINITIONS} DSV4_WITH_${upper} PARENT_SCOPE)
    set(DSV4_CUDA_BUILT_FOR ${DSV4_CUDA_BUILT_FOR} ${architectures} PARENT_SCOPE)
  endfunction()
  # Tables of rotary positions have the CPU's bits (common/turns.h), which contracts nothing.
  set_source_files_properties("${DSV4_CSRC}/cuda/sm80/norm_rope.cu" PROPERTIES COMPILE_OPTIONS "-fmad=false")
  dsv4_add_cuda_set(sm80 "${DSV4_SM80_ARCHITECTURES}" "${DSV4_PTX_ARCHITECTURES}")
  dsv4_add_cuda_set(sm90 "${DSV4_SM90_ARCHITECTURES}" 90a-virtual)

  file(GLOB _cuda_common CONFIGURE_DEPENDS "${DSV4_CSRC}/cuda/common/*.cpp")
  add_library(dsv4_cuda_kernels OBJECT ${DSV4_OPS_SOURCES} ${_cuda_common})
  target_compile_definitions(dsv4_cuda_kernels PRIVATE ${DSV4_CUDA_DEFINITIONS})
  target_link_libraries(dsv4_cuda_kernels PUBLIC dsv4_flags PRIVATE CUDA::toolkit)
  list(APPEND DSV4_CUDA_OBJECTS $<TARGET_OBJECTS:dsv4_cuda_kernels> $<TARGET_OBJECTS:dsv4_common>)
endif()
