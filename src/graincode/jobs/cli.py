"""Console entries of the jobs, whose own modules are imported when they run: --help and completion answer at once."""

from functools import partial

from graincode.config.job import job_main

train_tokenizer = partial(job_main, "train_tokenizer")
extract_codes = partial(job_main, "extract_codes")
train_generator = partial(job_main, "train_generator")
sample = partial(job_main, "sample")
evaluate = partial(job_main, "evaluate")
