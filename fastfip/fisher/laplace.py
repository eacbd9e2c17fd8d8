"""A backend for laplace-torch (`pip install laplace-torch`): its diagonal Gauss-Newton curvature by `fisher_diagonal`.

    from laplace import Laplace
    from fastfip.fisher.laplace import FisherGGN

    la = Laplace(model, "classification", hessian_structure="diag", backend=FisherGGN)

laplace-torch is imported when `FisherGGN` is first asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfip.fisher.diagonal import fisher_diagonal
from fastfip.fisher.labels import Kind


def __getattr__(name: str) -> Any:
    if name != "FisherGGN":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = _backend()
    return value


def _backend() -> type:
    try:
        from laplace.curvature import GGNInterface
    except ImportError as error:
        raise ImportError(f"FisherGGN needs laplace-torch (pip install laplace-torch): {error}") from error

    class FisherGGN(GGNInterface):
        """The diagonal of the generalised Gauss-Newton matrix, exact for every parameter; for DiagLaplace and its kin.

        With `stochastic=True` labels are drawn from the model, `num_samples` times, by torch's own random numbers.
        Parts of the model's weights (last layer, subnetworks) are as laplace-torch asks for them.
        """

        def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Return the loss of a batch, and the diagonal summed over its samples, [P].

            Args:
                x: inputs, as the model takes them.
                y: labels [N], or targets [N, K] for regression.
                kwargs: the number of all samples, which is not needed.
            """
            likelihood = "gaussian" if self.likelihood == "regression" else "categorical"
            kind: Kind = "mc" if self.stochastic else "exact"
            times = self.num_samples if self.stochastic else 1
            total: Any = 0
            for _ in range(times):
                seed = int(torch.randint(1 << 31, ())) if self.stochastic else 0
                diagonal = fisher_diagonal(
                    self.model,
                    [(x, y)],
                    kind,
                    likelihood=likelihood,
                    forward=_outputs,
                    params=self.params_dict,
                    seed=seed,
                )
                total = diagonal.to_vector() * (diagonal.n / times) + total
            with torch.no_grad():
                loss = self.factor * self.lossfunc(self.model(x), y)
            return loss, total if self.subnetwork_indices is None else total[self.subnetwork_indices]

    FisherGGN.__qualname__ = "FisherGGN"  # where it is found: laplace-torch writes it into its own checkpoints
    return FisherGGN


def _outputs(model: torch.nn.Module, batch: Any) -> Tensor:
    out: Tensor = model(batch[0])
    return out
