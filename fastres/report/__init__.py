"""Tables, pictures and reports of what runs wrote."""

import os
import sys
from contextlib import suppress

# A notebook's MPLBACKEND makes importing matplotlib an error where that backend is not installed.
_backend = os.environ.get("MPLBACKEND")
if _backend and "matplotlib" not in sys.modules:
    del os.environ["MPLBACKEND"]
    import matplotlib

    os.environ["MPLBACKEND"] = _backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend
