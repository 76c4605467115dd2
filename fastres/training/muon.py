"""The optimizer Muon."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

# (a, b, c) of the polynomials a x + b x^3 + c x^5 of three steps, which map singular values in [0.01, 1] to
# [0.73, 1.27]. Each is the best approximation of 1 on the interval that the step before it maps to, which makes the
# three together optimal (Amsel et al. 2025, arXiv:2505.16932, theorem 3.1).
COEFFICIENTS = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


def orthogonalized(matrices: Tensor) -> Tensor:
    """U V^T, roughly, of each of the bfloat16 ``[B, rows, columns]`` with singular value decomposition U S V^T.

    Newton-Schulz iteration. Singular values below a hundredth of the Frobenius norm stay below 0.73. Where that takes
    less arithmetic the steps are multiplied with each other, by products of Gram matrices (Zhang et al. 2026,
    https://dao-lab.ai/blog/2026/gram-newton-schulz). Rounding errors may then leave small
    singular values of a matrix with nearly parallel rows at up to about 4.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.squeeze(0)  # a CPU multiplies a single matrix faster than a batch of one
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if max(x.shape[-2:]) >= 2 * min(x.shape[-2:]):
        factor = product_of_steps(x.mT @ x if tall else x @ x.mT, COEFFICIENTS)
        return (x @ factor if tall else factor @ x).view_as(matrices)
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in COEFFICIENTS:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, x, polynomial, beta=a) if tall else add_product(x, polynomial, x, beta=a)
    return x.view_as(matrices)


def product_of_steps(gram: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """The matrix by which the steps multiply a matrix whose Gram matrix is ``gram``."""
    (a, b, c), *later = steps
    add_product = torch.addmm if gram.ndim == 2 else torch.baddbmm
    polynomial = add_product(gram, gram, gram, beta=b, alpha=c)  # this step multiplies by a I + polynomial
    if not later:
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        return polynomial
    half = add_product(gram, polynomial, gram, beta=a)
    product = product_of_steps(add_product(half, half, polynomial, beta=a), later)
    return add_product(product, product, polynomial, beta=a)


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
        directions = torch._foreach_lerp(gradients, averages, group["momentum"])
        by_shape: dict[torch.Size, list[int]] = {}
        for i, parameter in enumerate(parameters):
            by_shape.setdefault(parameter.shape, []).append(i)
        for (rows, inputs, *kernel), indices in by_shape.items():
            columns = inputs * kernel[0] * kernel[1]
            matrices = directions[0].new_empty(len(indices), rows, columns, dtype=torch.bfloat16)
            as_weights = matrices.unflatten(2, (*kernel, inputs)).movedim(-1, 2)  # [B, O, I, H, W]
            torch._foreach_copy_(as_weights.unbind(), [directions[i] for i in indices])
            updates = orthogonalized(matrices) * (-group["lr"] * max(1, rows / columns) ** 0.5)
            for i, update in zip(indices, updates.unflatten(2, (*kernel, inputs)).movedim(-1, 2).unbind(), strict=True):
                parameters[i].mul_(1 - group["lr"] * group["weight_decay"]).add_(update)
