"""Models inside DistributedDataParallel, DataParallel or torch.compile, sharded ones, and gradient checkpointing."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastfip
from fastfip.errors import ConfigError, ModelError
from tests.support.small_nets import conv_net, data, same, values

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.usefixtures("short_search"),
]


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled_inside(model):
    model[0] = torch.compile(model[0], backend="aot_eager")
    return model


def compiled_in_place(model):
    model.compile(backend="aot_eager")
    return model


WRAPPERS = {
    "data_parallel": (nn.DataParallel, "module."),
    "ddp": (nn.parallel.DistributedDataParallel, "module."),
    "compiled": (lambda model: torch.compile(model, backend="aot_eager"), "_orig_mod."),
    "compiled_in_place": (compiled_in_place, ""),
    "compiled_inside": (compiled_inside, None),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("method", ["fine_tune", "fast_wfip", "fip"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_module_inside_is_purified_and_the_wrapper_handed_back(group, kind, method, inplace):
    wrap, prefix = WRAPPERS[kind]
    torch.manual_seed(0)
    plain = conv_net().eval()
    model = wrap(copy.deepcopy(plain)).eval()
    x = data(4)[0]
    model(x)
    before = values(model)
    result = fastfip.purify(model, data(24), method, steps=3, inplace=inplace, progress=False)
    assert type(result.model) is type(model) and (result.model is model) == inplace
    assert list(result.state_dict()) == list(before) and not same(result.state_dict(), before)
    assert inplace or same(values(model), before)
    expected = fastfip.purify(plain, data(24), method, steps=3, progress=False)
    if prefix is not None:
        assert list(result.state_dict()) == [prefix + name for name in expected.state_dict()]
    for got, right in zip(result.state_dict().values(), expected.state_dict().values()):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.model(x), expected.model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_is_compiled_in_place_stays_compiled(inplace):
    model = compiled_in_place(conv_net())
    fastfip.purify(model, data(24), "fast_wfip", steps=2, inplace=inplace, progress=False)
    assert model._compiled_call_impl is not None


def test_a_sharded_model_is_purified_in_place_only(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = conv_net()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ConfigError, match="cannot be copied: purify it with inplace=True on every rank, or take it"):
        fastfip.purify(model, data(24), "fine_tune", steps=1)
    with pytest.raises(ModelError, match="sharded over processes: take it as it was before fully_shard"):
        fastfip.audit(model, data(24), steps=1)
    assert fastfip.purify_(model, data(24), "fine_tune", steps=1).model is model  # a group of one process


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.net, self.reentrant = conv_net(), reentrant

    def forward(self, x):
        return self.net[6](self.net[5](checkpoint(self.net[:5], x, use_reentrant=self.reentrant)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_works(reentrant, inplace):
    model = Checkpointed(reentrant)
    assert fastfip.purify(model, data(24), "fast_wfip", steps=2, inplace=inplace, progress=False).coverage.tuned
    assert fastfip.purify(model, data(24), "fine_tune", steps=2, inplace=inplace, progress=False).coverage.tuned
