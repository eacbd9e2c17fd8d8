"""Where the perturbations of all classes are: at a thousand classes and large images they are most of the memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LARGE_BYTES", "DeltaStore", "row_norms"]

#: A whole that would need more than this in float32 is kept in float16.
LARGE_BYTES = 256 << 20


@dataclass
class DeltaStore:
    """One tensor of the inputs' shape for each class, read and written by rows.

    Attributes:
        values: [C, *input], float32; or float16 in units of `scale`, where the whole is large.
        scale: None in float32. The standard deviation of the inputs, so that float16 serves inputs of any scaling.
    """

    values: Tensor
    scale: float | None = None

    @classmethod
    def noise(cls, like: Tensor, classes: int, generator: torch.Generator, length: float, scale: float) -> DeltaStore:
        """Draw noise of one L2 norm for each class.

        Args:
            like: inputs [N, ...], for the shape and the device.
            classes: C.
            generator: on the CPU.
            length: of each row.
            scale: the standard deviation of the inputs.
        """
        shape = like.shape[1:]
        if classes * shape.numel() * 4 <= LARGE_BYTES:
            values = torch.randn(classes, *shape, generator=generator, device="cpu", dtype=torch.float32).to(
                like.device
            )
            values *= length / row_norms(values)
            return cls(values)
        values = torch.empty(classes, *shape, dtype=torch.float16, device=like.device)
        for row in values:  # one at a time: the whole in float32 is what must not be there
            noise = torch.randn(1, *shape, generator=generator, device="cpu", dtype=torch.float32)
            row.copy_((noise * (length / scale / row_norms(noise)))[0])
        return cls(values, scale)

    @property
    def exact(self) -> bool:
        """Return whether what is written is what is read: float32."""
        return self.scale is None

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows `index` [K] as a copy in float32, [K, *input]."""
        rows = self.values[index]
        return rows if self.scale is None else rows.float().mul_(self.scale)

    def put(self, index: Tensor, rows: Tensor) -> None:
        """Write float32 rows [K, *input] to the places `index` [K], each named once; `rows` may be changed."""
        self.values[index] = rows if self.scale is None else rows.div_(self.scale).to(self.values.dtype)


def row_norms(rows: Tensor) -> Tensor:
    """L2 norm of each row, [K, 1, ...]."""
    return torch.linalg.vector_norm(rows, dim=tuple(range(1, rows.dim())), keepdim=True)
