// Whether this thread's calls may take every weight that is promised constant for one that no
// unfinished work writes: fastq_set_settled_weights.
#pragma once

namespace fastq {

inline thread_local bool weights_are_settled = false;

}  // namespace fastq
