"""Small nets sharded over the processes of a group, in each of the ways that are worked on."""

import torch._dynamo  # before processes are forked: each would import it again
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
from torch import nn

__all__ = ["SHARDINGS", "OfParts", "sharded", "whole"]

#: Ways to shard a net, with the processes that they need at least.
SHARDINGS = {"fsdp": 2, "a part of it": 2, "tensor parallel": 2, "16 bits": 2, "hybrid": 4, "both": 4}


class OfParts(nn.Module):
    """Code that knows how wide its part is, as much that is written for tensor parallelism does (a number of heads)."""

    def __init__(self, inputs, classes):
        super().__init__()
        self.a, self.b = nn.Linear(inputs, 6), nn.Linear(6, classes)

    def forward(self, x):
        a = torch.relu(self.a(x.flatten(1)))
        return self.b(a / a.shape[1])

    def parallelised(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        return parallelize_module(
            self, init_device_mesh("cpu", (2,)), {"a": ColwiseParallel(), "b": RowwiseParallel()}
        ).eval()


def sharded(net, how):
    """Shard a sequential net that ends in two linear layers around a ReLU, in place; return it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    first, last = str(len(net) - 3), str(len(net) - 1)
    plan = {first: ColwiseParallel(), last: RowwiseParallel()}
    if how == "tensor parallel":
        return parallelize_module(net, init_device_mesh("cpu", (2,)), plan)
    if how == "both":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(net, mesh["tensor"], plan)
        return fully_shard(net, mesh=mesh["data"])
    two = {"mesh_shape": (2, 2), "mesh_dim_names": ("copies", "parts")}
    mesh = init_device_mesh("cpu", **(two if how == "hybrid" else {"mesh_shape": (2,)}))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if how == "16 bits" else None)
    fully_shard(net[0], mesh=mesh, mp_policy=policy)
    return net if how == "a part of it" else fully_shard(net, mesh=mesh, mp_policy=policy)


def whole(state):
    """Return the values of all processes of a mapping of tensors, some of them DTensors."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}
