"""fastres: train CIFAR-scale ResNets and VGGs fast, and know honestly what it cost."""

__version__ = "0.1.0"
