"""Console entries of the jobs, whose own modules are imported when they run: --help and completion answer at once."""

import os
from functools import partial

from graincode.config.job import job_main

if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported; distributed/affinity.py says why
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

train_tokenizer = partial(job_main, "train_tokenizer")
extract_codes = partial(job_main, "extract_codes")
train_generator = partial(job_main, "train_generator")
sample = partial(job_main, "sample")
evaluate = partial(job_main, "evaluate")
