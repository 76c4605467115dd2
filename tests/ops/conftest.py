import pytest
import torch


@pytest.fixture(autouse=True)
def nan_filled_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new memory with NaN, so that an element which a kernel forgets to write is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
