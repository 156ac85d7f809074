# Whether the CUDA backend is built, and for which GPUs; the decision itself is cuda_plan.py's.
#
# In:  FASTQ_CUDA, FASTQ_CUDA_ARCHS, CMAKE_CUDA_COMPILER
# Out: FASTQ_WITH_CUDA                ON or OFF
#      FASTQ_CUDA_ARCHS               the names, such as 80;90a
#      FASTQ_CUDA_SM80_ARCHITECTURES  CUDA_ARCHITECTURES of the sm_80-style kernels: every name, 90
#                                     included, plus PTX of the oldest name without a suffix (code
#                                     for 90a runs on nothing newer, so a 90a-only build has none)
#      FASTQ_CUDA_SM90_ARCHITECTURES  90a-real, or empty
# To be included before enable_language(CUDA), which reads CMAKE_CUDA_ARCHITECTURES.

foreach(name FASTQ_CUDA FASTQ_CUDA_ARCHS)
  # The environment counts at the first configure only: a later reconfigure keeps its answer.
  set(${name} "$ENV{${name}}" CACHE STRING "See third_party/cuda_plan.py")
endforeach()

set(FASTQ_WITH_CUDA OFF)
if(FASTQ_CUDA STREQUAL "OFF")
  # Needs no Python.
  message(STATUS "fastq: CUDA backend OFF (FASTQ_CUDA=OFF)")
  return()
endif()

find_package(Python 3.10 COMPONENTS Interpreter REQUIRED)
string(REPLACE ";" "," archs_argument "${FASTQ_CUDA_ARCHS}")
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/cuda_plan.py"
          "FASTQ_CUDA=${FASTQ_CUDA}" "FASTQ_CUDA_ARCHS=${archs_argument}"
          "CMAKE_CUDA_COMPILER=${CMAKE_CUDA_COMPILER}"
  OUTPUT_VARIABLE plan ERROR_VARIABLE plan_error RESULT_VARIABLE plan_result)
if(NOT plan_result EQUAL 0)
  message(FATAL_ERROR "fastq: ${plan_error}")
endif()
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
             "${CMAKE_CURRENT_LIST_DIR}/cuda_plan.py")

string(JSON FASTQ_WITH_CUDA GET "${plan}" cuda)
string(JSON plan_reason GET "${plan}" reason)
string(JSON plan_archs GET "${plan}" archs)
if(NOT FASTQ_WITH_CUDA)
  message(STATUS "fastq: CUDA backend OFF (${plan_reason})")
  return()
endif()
message(STATUS "fastq: CUDA backend ON for ${plan_archs} (${plan_reason})")

set(FASTQ_CUDA_ARCHS "${plan_archs}")
string(JSON CMAKE_CUDA_COMPILER GET "${plan}" compiler)

set(FASTQ_CUDA_SM80_ARCHITECTURES "")
set(FASTQ_CUDA_SM90_ARCHITECTURES "")
set(ptx_arch "")
foreach(arch IN LISTS FASTQ_CUDA_ARCHS)
  if(arch STREQUAL "90a")
    set(FASTQ_CUDA_SM90_ARCHITECTURES "90a-real")
  endif()
  string(REGEX REPLACE "[af]$" "" plain "${arch}")
  list(APPEND FASTQ_CUDA_SM80_ARCHITECTURES "${plain}-real")
  if(arch STREQUAL plain AND (ptx_arch STREQUAL "" OR arch LESS ptx_arch))
    set(ptx_arch "${arch}")
  endif()
endforeach()
list(REMOVE_DUPLICATES FASTQ_CUDA_SM80_ARCHITECTURES)
if(ptx_arch)
  list(APPEND FASTQ_CUDA_SM80_ARCHITECTURES "${ptx_arch}-virtual")
endif()
set(CMAKE_CUDA_ARCHITECTURES "${FASTQ_CUDA_SM80_ARCHITECTURES}")
