"""The commands of `fastq`, a module each: `add` declares its arguments, `run` does it.

What a command needs is imported in `run`, so that `fastq --help` answers at once.
"""
