# The ninja job pool "nvcc": one CUDA translation unit takes up to 5 GB, so memory, not the number
# of cores alone, bounds how many run at once. A target joins with JOB_POOL_COMPILE nvcc.

cmake_host_system_information(RESULT memory_mb QUERY TOTAL_PHYSICAL_MEMORY)
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
if(EXISTS /sys/fs/cgroup/memory.max)  # a container's share
  file(READ /sys/fs/cgroup/memory.max limit)
  string(STRIP "${limit}" limit)
  if(limit MATCHES "^[0-9]+$")
    math(EXPR limit_mb "${limit} / 1048576")
    if(limit_mb LESS memory_mb)
      set(memory_mb ${limit_mb})
    endif()
  endif()
endif()
math(EXPR nvcc_jobs "${memory_mb} / 5000")
if(nvcc_jobs GREATER cores)
  set(nvcc_jobs ${cores})
elseif(nvcc_jobs LESS 1)
  set(nvcc_jobs 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS nvcc=${nvcc_jobs})
