"""Fused operators, registered with torch.library under the name `fastres`."""

from fastres.ops.batch_norm_relu import batch_norm_relu

__all__ = ["batch_norm_relu"]
