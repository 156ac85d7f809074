# CUTLASS 4.2.0: the target fastq_cutlass (headers only), and FASTQ_CUTLASS_LICENSE.
#
# From CUTLASS_DIR (a checkout of its repository), else from the nvidia-cutlass wheel of the Python
# that builds. The package is located, not imported: importing it needs its whole list of needs.

set(FASTQ_CUTLASS_VERSION 4.2.0)
set(CUTLASS_DIR "$ENV{CUTLASS_DIR}" CACHE PATH "A CUTLASS checkout; empty: the nvidia-cutlass wheel")

set(cutlass_root "${CUTLASS_DIR}")
set(FASTQ_CUTLASS_LICENSE "${CUTLASS_DIR}/LICENSE.txt")
if(NOT CUTLASS_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/locate_distribution.py"
            nvidia-cutlass cutlass_library
    OUTPUT_VARIABLE located RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR
      "fastq: the CUDA backend needs CUTLASS ${FASTQ_CUTLASS_VERSION}. Install its wheel "
      "(${Python_EXECUTABLE} -m pip install --no-deps nvidia-cutlass==4.2.0.0) or set CUTLASS_DIR "
      "to a checkout.")
  endif()
  string(JSON cutlass_root GET "${located}" package)
  string(APPEND cutlass_root "/source")
  string(JSON FASTQ_CUTLASS_LICENSE GET "${located}" license)
endif()

set(version_header "${cutlass_root}/include/cutlass/version.h")
foreach(file IN ITEMS "${version_header}" "${FASTQ_CUTLASS_LICENSE}")
  if(NOT EXISTS "${file}")
    message(FATAL_ERROR "fastq: no CUTLASS in ${cutlass_root}: ${file} does not exist")
  endif()
endforeach()
file(STRINGS "${version_header}" version_lines REGEX "^#define CUTLASS_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE "[^0-9;]" "" cutlass_version "${version_lines}")
list(JOIN cutlass_version "." cutlass_version)
if(NOT cutlass_version VERSION_EQUAL FASTQ_CUTLASS_VERSION)
  message(FATAL_ERROR "fastq: CUTLASS ${FASTQ_CUTLASS_VERSION} is needed, "
                      "${cutlass_root} holds ${cutlass_version}")
endif()
message(STATUS "fastq: CUTLASS ${cutlass_version} in ${cutlass_root}")

add_library(fastq_cutlass INTERFACE)
target_include_directories(fastq_cutlass SYSTEM INTERFACE "${cutlass_root}/include"
                                                          "${cutlass_root}/tools/util/include")
