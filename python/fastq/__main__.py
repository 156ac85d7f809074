"""`python -m fastq`, the same as the command `fastq`."""

from .cli import main

raise SystemExit(main())
