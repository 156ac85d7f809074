"""The shipped model, how it was trained, and `fastq demo`."""
