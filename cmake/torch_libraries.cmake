# The op libraries: torch bindings on the LibTorch stable ABI, free of libpython, so that one build serves every torch
# from DSV4_TORCH_FLOOR on and every Python. The pybind11 module beside them only reports; nothing needs it.
include(GNUInstallDirs)

# torch loads its own libraries privately; naming libtorch.so as a dependency makes their symbols visible to ours.
file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/stub/empty.cpp" "")
add_library(dsv4_libtorch_stub SHARED "${CMAKE_CURRENT_BINARY_DIR}/stub/empty.cpp")
set_target_properties(dsv4_libtorch_stub PROPERTIES OUTPUT_NAME torch
  LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stub")

file(GLOB DSV4_BINDINGS CONFIGURE_DEPENDS "${DSV4_CSRC}/torch/*.cpp")
set(DSV4_EXPORTS "${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map")

# Not installed: tests/cuda_host has one of its own.
function(dsv4_add_torch_library name architectures)
  add_library(${name} MODULE ${DSV4_BINDINGS} ${ARGN})
  target_link_libraries(${name} PRIVATE dsv4_flags -Wl,--no-as-needed dsv4_libtorch_stub -Wl,--as-needed)
  target_link_options(${name} PRIVATE "LINKER:--version-script=${DSV4_EXPORTS}")
  target_include_directories(${name} SYSTEM PRIVATE "${DSV4_TORCH_INCLUDE}")
  target_compile_definitions(${name} PRIVATE TORCH_TARGET_VERSION=0x020b000000000000
    DSV4_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}" DSV4_ARCHITECTURES="${architectures}")
  set_target_properties(${name} PROPERTIES LINK_DEPENDS "${DSV4_EXPORTS}" SKIP_BUILD_RPATH ON PREFIX "lib"
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/lib")
endfunction()

function(dsv4_add_op_library name architectures)
  dsv4_add_torch_library(${name} "${architectures}" ${ARGN})
  install(TARGETS ${name} LIBRARY DESTINATION dsv4)
endfunction()

string(REPLACE ";" " " _cpu_names "scalar;${DSV4_CPU_SETS}")
dsv4_add_op_library(dsv4_cpu "${_cpu_names}" ${DSV4_CPU_OBJECTS})

if(DSV4_WITH_CUDA)
  string(REPLACE ";" " " _cuda_names "${DSV4_CUDA_BUILT_FOR}")
  dsv4_add_op_library(dsv4_cuda "${_cuda_names}" ${DSV4_CUDA_OBJECTS})
  target_link_libraries(dsv4_cuda PRIVATE CUDA::cudart_static)
  set_target_properties(dsv4_cuda PROPERTIES LINKER_LANGUAGE CXX)
  target_compile_definitions(dsv4_cuda PRIVATE DSV4_TORCH_CUDA USE_CUDA)
endif()

find_package(pybind11 CONFIG QUIET)
if(NOT pybind11_FOUND)
  execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_DIR ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_package(pybind11 CONFIG QUIET)
endif()
if(pybind11_FOUND)
  pybind11_add_module(dsv4_module "${DSV4_CSRC}/module.cpp" $<TARGET_OBJECTS:dsv4_common>)
  target_link_libraries(dsv4_module PRIVATE dsv4_peaks)
  target_compile_definitions(dsv4_module PRIVATE DSV4_VERSION="${PROJECT_VERSION}"
    DSV4_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}" DSV4_CPU_SETS="${_cpu_names}"
    DSV4_TORCH_VERSION="${DSV4_TORCH_VERSION}" DSV4_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}")
  set_target_properties(dsv4_module PROPERTIES OUTPUT_NAME _native
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/lib")
  install(TARGETS dsv4_module LIBRARY DESTINATION dsv4)
else()
  message(STATUS "dsv4: pybind11 not found, so no dsv4._native module (build information only)")
endif()
