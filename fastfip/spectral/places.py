"""Which weights of a model are linear maps, and as which matrices they are stored.

Known by their layer are Linear and convolution weights, packed attention projections, the gates of recurrent layers and
what torch's own weight_norm, spectral_norm and prune compute a weight from. Other parameters (the transposed Linear of
GPT-2, stacks of experts, bare parameters) are known by what a forward pass does with them: `seen_as_maps`.
A transposed matrix has the same singular directions, so how a map is applied does not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

__all__ = ["MapPlace", "may_be_map", "own_weights", "places_of", "seen_as_maps"]

#: Position of the weight among the arguments of functions that apply a matrix, and of those that apply a kernel.
_MATRICES: dict[str, tuple[int, ...]] = {
    "linear": (1,),
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv"), (0, 1)),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "addbmm", "addmv"), (1, 2)),
    **dict.fromkeys(("einsum", "tensordot", "_grouped_mm", "grouped_mm"), (0, 1, 2)),
}
_KERNELS = {f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)}
_GATES = {nn.LSTM: 4, nn.GRU: 3, nn.LSTMCell: 4, nn.GRUCell: 3}


class MapPlace(NamedTuple):
    """A parameter that is a map: where it is, and its form, G matrices of O rows each."""

    name: str
    module: nn.Module
    attribute: str
    groups: int
    rows: int


def own_weights(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a layer's parameters that are matrices by what the layer is."""
    if isinstance(module, (nn.Linear, _ConvNd)):
        # Of torch.nn.utils.weight_norm; of spectral_norm and prune.
        return ("weight", "weight_v", "weight_orig")
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return tuple(name for name in module._parameters if name.startswith(("weight_ih", "weight_hh", "weight_hr")))
    return ()


def places_of(model: nn.Module, frozen: Container[int], seen: Mapping[int, bool]) -> Iterator[MapPlace]:
    """Walk the places of all maps of a model that are real, not empty and not in `frozen`; tied ones at each place.

    Args:
        model: its modules are walked in their order.
        frozen: ids of parameters that stay.
        seen: what `seen_as_maps` found.
    """
    computed = {
        id(steps): layer
        for layer in model.modules()
        for name, steps in getattr(layer, "parametrizations", {}).items()
        if name == "weight" and isinstance(layer, (nn.Linear, _ConvNd))
    }
    for name, module in model.named_modules():
        layer = computed.get(id(module), module)
        own = own_weights(module) if layer is module else _originals(module, layer)
        for attribute, p in module._parameters.items():
            if p is None or not p.is_floating_point() or p.numel() == 0 or id(p) in frozen:
                continue
            if attribute in own:
                groups = _gates(module, attribute) if attribute.startswith(("weight_ih", "weight_hh")) else 0
                groups = groups or getattr(layer, "groups", 1)
                rows = p.shape[0] // groups
            elif id(p) in seen:
                groups, rows = _form(p, seen[id(p)])
            else:
                continue
            yield MapPlace(f"{name}.{attribute}" if name else attribute, module, attribute, groups, rows)


def _originals(steps: nn.Module, layer: nn.Module) -> tuple[str, ...]:
    """Names of what a parametrised weight is computed from, where it has the weight's shape."""
    assert isinstance(steps, ParametrizationList)
    shape = layer.weight.shape
    named = (("original1", "original0") if "original1" in steps._parameters else ("original",))[:1]
    return tuple(n for n in named if steps._parameters.get(n) is not None and steps._parameters[n].shape == shape)  # type: ignore[union-attr]


def _gates(module: nn.Module, attribute: str) -> int:
    return next((gates for kind, gates in _GATES.items() if isinstance(module, kind)), 1)


def _form(p: Tensor, kernel: bool) -> tuple[int, int]:
    """G and O of a parameter that is used as a matrix, as a stack of matrices or as the kernel of a convolution."""
    if kernel or p.dim() == 2:
        return 1, p.shape[0]
    return p.shape[:-2].numel(), p.shape[-2]


def may_be_map(model: nn.Module, frozen: Container[int] = ()) -> dict[str, nn.Parameter]:
    """Return the parameters, by name, that may be maps only a forward pass can tell: matrices no layer is known by."""
    known = {id(place.module._parameters[place.attribute]) for place in places_of(model, frozen, {})}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    return {
        name: p
        for name, p in model.named_parameters()
        if p.dim() >= 2 and p.is_floating_point() and not {id(p)} & (known | tables) and id(p) not in frozen
    }


@contextlib.contextmanager
def seen_as_maps(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[int, bool]]:
    """Watch what the forward passes of a block do with parameters.

    Yields:
        id of a parameter that is applied as a linear map -> whether as the kernel of a convolution; filled meanwhile.
    """
    with _Watch({id(p) for p in parameters.values()}) as watch:
        yield watch.seen


class _Watch(TorchFunctionMode):
    def __init__(self, wanted: set[int]) -> None:
        super().__init__()
        self.wanted = wanted
        self.seen: dict[int, bool] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _KERNELS:
            self.look([*args[1:2], kwargs.get("weight")], kernel=True)
        elif name in _MATRICES:
            given = [args[k] for k in _MATRICES[name] if k < len(args)]
            self.look([*given, *(kwargs.get(k) for k in ("weight", "mat2", "other"))], kernel=False)
        return func(*args, **kwargs)

    def look(self, values: list[Any], kernel: bool) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self.look(list(value), kernel)
            elif isinstance(value, Tensor):
                source = value if id(value) in self.wanted else value._base  # one expert of a stack is a view of it
                if source is not None and id(source) in self.wanted:
                    self.seen[id(source)] = kernel
