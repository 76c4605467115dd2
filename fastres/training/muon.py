"""The optimizer Muon."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

COEFFICIENTS = 3.4445, -4.7750, 2.0315
STEPS = 5


def orthogonalized(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """U V^T, roughly, of each ``[B, rows, columns]`` with singular value decomposition U S V^T, in bfloat16.

    Newton-Schulz iteration of fifth order, whose coefficients (Jordan et al. 2024) bring singular values to between 0.7
    and 1.2 in a few steps, not to 1.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7).view(-1, 1, 1)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(SGD):
    """Momentum whose update is orthogonalised, for convolutions; SGD for all other parameters.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with Nesterov momentum that averages the gradients,
    updates scaled by sqrt(max(1, rows / columns)) and decoupled weight decay. Of a convolution's weight
    ``[O, I, H, W]`` the matrix is ``[O, H * W * I]``, a view if it is channels-last.

    Args:
        convolutions: parameters ``[O, I, H, W]`` that are updated by Muon.
        others: param groups of SGD.
        lr, momentum, weight_decay: Muon's; ``lr`` may be a scalar tensor.
        sgd: the other groups' options.
    """

    def __init__(
        self,
        convolutions: Iterable[Tensor],
        others: Iterable[dict[str, Any]],
        *,
        lr: Any,
        momentum: float,
        weight_decay: float,
        **sgd: Any,
    ) -> None:
        super().__init__(others, **sgd)
        self.add_param_group(
            {"params": list(convolutions), "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "muon": True}
        )
        self._step_supports_amp_scaling = False  # as fused SGD does, but the average needs true gradients

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """As ``torch.optim.Optimizer.step``."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._muon_step(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        directions = list(torch._foreach_lerp(gradients, averages, group["momentum"]))
        by_shape: dict[torch.Size, list[int]] = {}
        for i, direction in enumerate(directions):
            directions[i] = direction.movedim(1, -1).flatten(1)
            by_shape.setdefault(direction.shape, []).append(i)
        for (rows, inputs, *kernel), indices in by_shape.items():
            matrices = orthogonalized(torch.stack([directions[i] for i in indices]))
            scale = max(1, rows / matrices.size(2)) ** 0.5
            updates = (matrices.float() * (-scale * group["lr"])).unflatten(2, (*kernel, inputs)).movedim(-1, 2)
            for i, update in zip(indices, updates.unbind(), strict=True):
                parameters[i].mul_(1 - group["lr"] * group["weight_decay"]).add_(update)
