import gc
import sys

if sys.argv[:1] == ["-m"]:  # python -m tests.training.tiny_job, a process like fastres.train's
    gc.disable()
