"""fastres: train CIFAR-scale ResNets and VGGs fast, and know honestly what it cost."""

import os
import sys
from contextlib import suppress

__version__ = "0.1.0"

_backend = os.environ.get("MPLBACKEND")
if _backend and "matplotlib" not in sys.modules:
    # a notebook's, where it is not installed, makes importing matplotlib an error, which torchmetrics does, too
    del os.environ["MPLBACKEND"]
    import matplotlib

    os.environ["MPLBACKEND"] = _backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend
