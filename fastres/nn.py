"""BatchNorm2d that also adds the residual and applies ReLU."""

import torch
from torch import nn
from torch.nn import functional as F


class EagerBatchNormReLU2d(nn.BatchNorm2d):
    """``relu(batch_norm(x) + residual)`` in plain torch: the baseline."""

    def __init__(self, num_features: int, *, relu: bool = True) -> None:
        super().__init__(num_features)
        self.relu = relu

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x)
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if self.relu else y


BatchNormReLU2d = EagerBatchNormReLU2d
