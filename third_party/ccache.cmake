# Compiles through ccache where there is one; a launcher set by the caller stays.

find_program(FASTQ_CCACHE ccache)
mark_as_advanced(FASTQ_CCACHE)
if(FASTQ_CCACHE)
  foreach(language C CXX CUDA)
    if(NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
      set(CMAKE_${language}_COMPILER_LAUNCHER "${FASTQ_CCACHE}")
    endif()
  endforeach()
endif()
