# Loops that measure what the processor's units can do: for the native benchmarks, and for the roofs of `dsv4 bench`.
find_package(Threads REQUIRED)
add_library(dsv4_peaks STATIC "${DSV4_CSRC}/common/peaks.cpp" "${DSV4_CSRC}/common/thread_pool.cpp")
target_link_libraries(dsv4_peaks PUBLIC dsv4_flags Threads::Threads)
if(DSV4_COMPILER_HAS_avx512 AND DSV4_COMPILER_HAS_amx)
  target_sources(dsv4_peaks PRIVATE "${DSV4_CSRC}/common/peaks_x86.cpp")
  set_source_files_properties("${DSV4_CSRC}/common/peaks_x86.cpp" PROPERTIES COMPILE_OPTIONS "${DSV4_AMX_FLAGS}")
  target_compile_definitions(dsv4_peaks PRIVATE DSV4_PEAKS_X86)
endif()
