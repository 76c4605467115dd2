"""Builds the C++ extension where there is a C++ compiler; everything else is in pyproject.toml."""

import os
import shutil
from pathlib import Path

from setuptools import setup

compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")
if os.environ.get("FASTRES_NO_EXTENSION", "0") not in ("", "0"):
    reason = "FASTRES_NO_EXTENSION is set"
elif not compiler:
    reason = "no C++ compiler found: CXX is not set, and there is no c++, g++ or clang++"
else:
    reason = ""

if reason:
    print(f"fastres: the C++ extension is left out ({reason})")
    setup()
else:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    os.environ["CXX"] = compiler  # otherwise torch compiles with c++, and setuptools links with Python's own compiler
    setup(
        ext_modules=[
            CppExtension(
                "fastres._C",
                sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
                depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
                # ninja compiles again when the command changes, that is for another torch, too
                extra_compile_args=["-O3", "-fopenmp", f"-DBUILT_FOR_TORCH={torch.__version__}"],
                extra_link_args=["-fopenmp"],
            )
        ],
        cmdclass={"build_ext": BuildExtension},
    )
