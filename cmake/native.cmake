# What native tests and benchmarks share: the thread pool, and flags with the sanitizers.
find_package(Threads REQUIRED)

add_library(dsv4_native_flags INTERFACE)
target_link_libraries(dsv4_native_flags INTERFACE dsv4_flags)
if(DSV4_SANITIZE)
  # The kernels too: the preset builds no op library, so their objects serve the native programs alone.
  foreach(_target dsv4_common dsv4_cpu_kernels)
    target_compile_options(${_target} PRIVATE -fsanitize=${DSV4_SANITIZE} -fno-sanitize-recover=all -g)
  endforeach()
  foreach(_set ${DSV4_CPU_SETS})
    target_compile_options(dsv4_${_set} PRIVATE -fsanitize=${DSV4_SANITIZE} -fno-sanitize-recover=all -g)
  endforeach()
  target_compile_options(dsv4_native_flags INTERFACE -fsanitize=${DSV4_SANITIZE} -fno-sanitize-recover=all -g)
  target_link_options(dsv4_native_flags INTERFACE -fsanitize=${DSV4_SANITIZE})
endif()

add_library(dsv4_threads STATIC "${DSV4_CSRC}/common/thread_pool.cpp")
target_link_libraries(dsv4_threads PUBLIC dsv4_native_flags Threads::Threads)
