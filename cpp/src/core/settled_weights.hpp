// Whether no unfinished work writes what this thread's calls read of weights that are promised
// constant, of lengths, and of a cache's tokens but the newest: fastq_set_settled_weights.
#pragma once

namespace fastq {

inline thread_local bool weights_are_settled = false;

}  // namespace fastq
