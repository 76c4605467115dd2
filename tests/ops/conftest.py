from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_filled_buffers() -> Iterator[None]:
    """Fills new memory with NaN, so that an element which a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
