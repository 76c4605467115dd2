"""fastres: train CIFAR-scale ResNets and VGGs fast, and know honestly what it cost."""

import os
import sys

__version__ = "0.1.0"

# Started in this very folder, Python would find profile.py in it when a library imports the standard library's profile.
_here = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != _here]
