# Finds the headers of the torch that will run the op libraries, without find_package(Torch), which demands the whole
# CUDA toolkit of a CUDA build. `python -I` sees the environment's torch even inside pip's isolated build.
# Sets DSV4_TORCH_INCLUDE and DSV4_TORCH_VERSION, or stops with the line that mends it.
set(_query [=[
import importlib.metadata, importlib.util, pathlib
spec = importlib.util.find_spec("torch")
if spec:
    print(pathlib.Path(spec.origin).parent / "include", importlib.metadata.version("torch"), sep=";")
]=])
execute_process(COMMAND "${Python_EXECUTABLE}" -I -c "${_query}"
  OUTPUT_VARIABLE _answer ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT _answer)
  # A leading blank keeps CMake from breaking the line.
  message(FATAL_ERROR " dsv4 needs torch >= ${DSV4_TORCH_FLOOR} where it is installed; "
    "first run: ${Python_EXECUTABLE} -m pip install -c constraints.txt torch")
endif()
list(GET _answer 0 DSV4_TORCH_INCLUDE)
list(GET _answer 1 DSV4_TORCH_VERSION)
if(DSV4_TORCH_VERSION VERSION_LESS DSV4_TORCH_FLOOR)
  message(FATAL_ERROR " dsv4 needs torch >= ${DSV4_TORCH_FLOOR}, found ${DSV4_TORCH_VERSION}; "
    "first run: ${Python_EXECUTABLE} -m pip install -c constraints.txt --upgrade torch")
endif()
message(STATUS "dsv4: torch ${DSV4_TORCH_VERSION} headers in ${DSV4_TORCH_INCLUDE}")
