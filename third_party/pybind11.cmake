# pybind11: its CMake package, and FASTQ_PYBIND11_LICENSE. pyproject.toml pins the wheel that
# `pip install` takes it from; a plain CMake build asks the Python that it builds for.

find_package(Python 3.10 COMPONENTS Interpreter Development.Module REQUIRED)
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/locate_distribution.py"
          pybind11 pybind11
  OUTPUT_VARIABLE located RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "fastq: the Python module needs pybind11: "
                      "${Python_EXECUTABLE} -m pip install 'pybind11>=3.0,<4'")
endif()
string(JSON pybind11_package GET "${located}" package)
string(JSON FASTQ_PYBIND11_LICENSE GET "${located}" license)
find_package(pybind11 3.0 CONFIG REQUIRED HINTS "${pybind11_package}/share/cmake/pybind11")
