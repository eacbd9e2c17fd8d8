"""The Lightning callback, against the real package (extra `lightning`): `make zoo` installs it."""

import copy
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastfip
from fastfip.errors import ConfigError, DataError, ModelError
from fastfip.integrations import holding

lightning = pytest.importorskip("lightning.pytorch", reason="no lightning (pip install fastfip[lightning])")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")


def samples(n=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return TensorDataset(F.one_hot(y, 6).float() + 0.3 * torch.randn(n, 6, generator=generator), y)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 3))
        self.unused = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.1)


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(samples(), 16)

    def val_dataloader(self):
        return DataLoader(samples(seed=1), 16)

    def clean_dataloader(self):
        return DataLoader(samples(30, seed=2), 10)


class Logger(lightning.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.said = []

    def log_metrics(self, metrics, step=None):
        self.said.append((metrics, step))


def trained(callback, *, module=None, data=None, folder=None, **options):
    module = Module() if module is None else module
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=Logger(), callbacks=[callback], default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data() if data is None else data)
    return trainer, module


@pytest.fixture
def purified(monkeypatch):
    """What `purify` was called with, and the state of the model then."""
    from fastfip.integrations import holding

    calls = []
    real = holding.purify

    def watched(model, clean, method, **options):
        calls.append((copy.deepcopy(model.state_dict()), clean, method, options))
        return real(model, clean, method, **options)

    monkeypatch.setattr(holding, "purify", watched)
    return calls


def test_fit_ends_with_the_weights_that_purify_would_have_given(purified):
    callback = fastfip.lightning.Purify(method="fine_tune", steps=4, lr=0.05)
    trainer, module = trained(callback)
    ((state, clean, _, options),) = purified
    assert isinstance(clean, DataLoader) and len(clean.dataset) == 48 and options["inplace"] and not options["amp"]
    fresh = Module()
    fresh.load_state_dict(state)
    again = fastfip.purify(fresh, Data().val_dataloader(), "fine_tune", steps=4, lr=0.05, progress=False).state_dict()
    assert any(not torch.equal(value, state[name]) for name, value in module.state_dict().items())
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, again[name])
    assert callback.result.model is module and callback.result.settings["clean_samples"] == 48


def test_before_and_after_go_to_the_logger_of_the_trainer():
    callback = fastfip.lightning.Purify(method="fine_tune", steps=2, test_loader=DataLoader(samples(seed=5), 16))
    trainer, _ = trained(callback)
    (said,) = [said for said in trainer.logger.said if "purify/acc_before" in said[0]]
    assert said[0]["purify/acc_after"] == pytest.approx(callback.result.after.acc)
    assert said[0]["purify/acc_before"] == pytest.approx(callback.result.before.acc)
    assert said[1] == trainer.global_step == 6 and "purify/asr_after" not in said[0]


def test_flags_and_what_is_frozen_are_as_they_were_at_the_end_of_the_training():
    class Flags(lightning.Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.net[2].eval()
            self.seen = {name: m.training for name, m in pl_module.named_modules()}

    flags, module = Flags(), Module()
    frozen = copy.deepcopy(module.unused.state_dict())
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[flags, fastfip.lightning.Purify(method="fine_tune", steps=2)],
    )  # fmt: skip
    trainer.fit(module, datamodule=Data())
    assert {name: m.training for name, m in module.named_modules()} == flags.seen and module.training
    assert [p.requires_grad for p in module.unused.parameters()] == [False, False]
    assert all(torch.equal(value, frozen[name]) for name, value in module.unused.state_dict().items())


def test_a_submodule_alone_is_purified_where_it_is_named(purified):
    module = Module()
    module.head = nn.Linear(3, 3)
    callback = fastfip.lightning.Purify(method="fine_tune", steps=2, submodule="net")
    trained(callback, module=module)
    assert callback.result.model is module.net and set(purified[0][0]) == set(module.net.state_dict())
    with pytest.raises(ModelError, match="submodule='body': the module has net, unused"):
        trained(fastfip.lightning.Purify(submodule="body"))


def test_clean_samples_may_come_from_a_method_of_the_data_module_or_a_function():
    for clean in ("clean_dataloader", Data().clean_dataloader, Data().clean_dataloader()):
        callback = fastfip.lightning.Purify(clean, "fine_tune", steps=1)
        trained(callback)
        assert callback.result.settings["clean_samples"] == 30


def test_validation_data_are_taken_from_the_data_module_where_the_trainer_used_none():
    callback = fastfip.lightning.Purify(method="fine_tune", steps=1)
    trained(callback, limit_val_batches=0)
    assert callback.result.settings["clean_samples"] == 48


def test_no_clean_samples_or_several_are_one_line_that_says_so():
    class NoValidation(lightning.LightningDataModule):
        train_dataloader = Data.train_dataloader

    class Two(Data):
        def val_dataloader(self):
            return [DataLoader(samples(), 16), DataLoader(samples(), 16)]

    class TwoSteps(Module):
        def validation_step(self, batch, _, dataloader_idx=0):
            pass

    with pytest.raises(DataError, match="no validation data to purify with: pass clean="):
        trained(fastfip.lightning.Purify(), data=NoValidation())
    with pytest.raises(DataError, match="2 validation loaders: pass the clean one"):
        trained(fastfip.lightning.Purify(), module=TwoSteps(), data=Two())
    with pytest.raises(DataError, match="clean='cleen': neither the data module nor the module"):
        trained(fastfip.lightning.Purify("cleen"))
    with pytest.raises(ConfigError, match="inplace: leave it out"):
        fastfip.lightning.Purify(inplace=True)


@pytest.mark.parametrize("group", [None, "data"])
def test_a_group_for_a_model_that_is_sharded_is_refused(group, monkeypatch):
    monkeypatch.setattr(holding, "is_sharded", lambda model: True)
    with pytest.raises(ConfigError, match="group: leave it out, the model is sharded"):
        trained(fastfip.lightning.Purify(group=group))


def test_hooks_that_change_batches_on_their_way_to_the_model_are_applied_as_in_validation(purified):
    class Scaled(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert not (self.trainer.training and self.seen_training)
            return batch[0] * 10, batch[1]

        seen_training = False

    class Watching(fastfip.lightning.Purify):
        def run(self, trainer, pl_module):
            trainer.datamodule.seen_training = True
            out = super().run(trainer, pl_module)
            assert trainer.training  # the trainer is back in the stage that it was in
            return out

    trained(Watching(method="fine_tune", steps=1), data=Scaled())
    clean = purified[0][1]
    torch.testing.assert_close(clean[0][0], samples(seed=1).tensors[0][:16] * 10)
    assert sum(len(batch[1]) for batch in clean) == 48


def test_the_precision_of_the_trainer_is_that_of_the_clean_loss(purified):
    trained(fastfip.lightning.Purify(method="fine_tune", steps=1), precision="bf16-mixed")
    trained(fastfip.lightning.Purify(method="fine_tune", steps=1, amp=False), precision="bf16-mixed")
    assert [call[3]["amp"] for call in purified] == ["bf16", False]


def test_on_demand_it_runs_when_it_is_called_and_not_before(tmp_path):
    path = tmp_path / "clean.ckpt"
    callback = fastfip.lightning.Purify(method="fine_tune", steps=3, at_end=False, save_to=path)
    trainer, module = trained(callback)
    before = copy.deepcopy(module.state_dict())
    assert callback.result is None and not path.exists()
    callback.run(trainer, module)
    assert not torch.equal(module.state_dict()["net.4.weight"], before["net.4.weight"])
    written = torch.load(path, weights_only=False)["state_dict"]
    assert all(torch.equal(value, written[name]) for name, value in module.state_dict().items())


def test_strategies_that_spread_the_weights_are_refused(monkeypatch):
    trainer, module = trained(fastfip.lightning.Purify(at_end=False))
    monkeypatch.setattr(type(trainer), "strategy", type("FSDPStrategy", (), {})())
    with pytest.raises(ModelError, match="FSDPStrategy gives each process a part"):
        fastfip.lightning.Purify().run(trainer, module)


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(tmp_path):
    """DistributedDataParallel, each process with its own part of the validation data."""
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not set(first["part"]) & set(second["part"])
    assert all(torch.equal(first["after"][name], second["after"][name]) for name in first["after"])
    assert not torch.equal(first["before"]["net.4.weight"], first["after"]["net.4.weight"])
    assert all(torch.equal(first["before"][name], second["before"][name]) for name in ("net.0.weight", "net.4.weight"))


def _one_of_two(rank, folder):
    import os

    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getppid() % 2000)}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "RANK": str(rank)}
    torch.manual_seed(0)
    torch.set_num_threads(1)

    class Kept(lightning.Callback):
        def on_train_end(self, trainer, pl_module):
            self.before = copy.deepcopy(pl_module.state_dict())
            # Each process alone, on its own part of the data, would come to weights of its own.
            self.part = [int(i) for i in trainer.val_dataloaders.sampler]

    kept = Kept()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        callbacks=[kept, fastfip.lightning.Purify(method="fine_tune", steps=3, force=True)],
    )  # fmt: skip
    module = Module()
    trainer.fit(module, datamodule=Data())
    torch.save({"before": kept.before, "after": module.state_dict(), "part": kept.part}, f"{folder}/{rank}.pt")
