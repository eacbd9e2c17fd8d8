"""The snippets of docs/integrations.md run as they are, on small models; each needs the extra that it is about."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastfip
from fastfip.cli import main
from fastfip.cli.options import ARCH_FORMS

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
pytestmark = pytest.mark.filterwarnings("ignore")


def run(kind, scope):
    """Run the snippets of a section one after the other, in one scope."""
    blocks = re.findall(rf"```python {kind}\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, f"docs/integrations.md, {kind}", "exec"), scope)
    return scope


def samples(n=24):
    y = torch.arange(n) % 3
    return F.one_hot(y, 6).float() + 0.1 * torch.randn(n, 6), y


def test_lightning(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning", reason="no lightning (pip install fastfip[lightning])")
    monkeypatch.chdir(tmp_path)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, _):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), 8)

        val_dataloader = train_dataloader

    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    scope = run("lightning", {"module": Module(), "data": Data(), "logger": logger})
    assert scope["purify"].result.model is scope["module"]
    assert "purify/acc_after" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_accelerate():
    pytest.importorskip("accelerate", reason="no accelerate (pip install fastfip[accelerate])")
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer, (x, y) = torch.optim.Adam(model.parameters(), 1e-2), samples()
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8)
    scope = run("accelerate", {"model": model, "optimizer": optimizer, "clean_loader": loader})
    assert scope["result"].settings["clean_samples"] == 24 and scope["result"].model is model


def test_hf(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="no transformers (pip install fastfip[hf])")
    pytest.importorskip("accelerate", reason="no accelerate (pip install fastfip[hf])")
    monkeypatch.chdir(tmp_path)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 18

        def __getitem__(self, i):
            return {"input_ids": torch.arange(6) % 3 + 3 * (i % 3), "labels": i % 3}

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=9, num_labels=3, **sizes))
    arguments = transformers.TrainingArguments(
        "out", max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-3
    )
    scope = run("hf", {"model": model, "arguments": arguments, "suspect": Rows(), "clean": Rows()})
    assert (tmp_path / "purified" / "config.json").exists()
    assert scope["later"].anchor is scope["anchor"] and scope["purify"].result.settings["clean_samples"] == 18


def test_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), 8)
    few = fastfip.purify
    monkeypatch.setattr(fastfip, "purify", lambda *given: few(*given, "fine_tune", steps=2, force=True))
    run("hub", {"fastfip": fastfip, "model": model, "clean_loader": loader})
    text = (tmp_path / "purified" / "README.md").read_text()
    assert 'license: "apache-2.0"' in text and 'base_model: "owner/suspect"' in text and "fine_tune" in text


def test_the_command_has_options_that_there_are_and_every_form_of_arch_is_described(tmp_path, monkeypatch, capsys):
    from PIL import Image

    text = GUIDE.read_text()
    for form in ARCH_FORMS.split("|")[1:]:
        assert f"`--arch {form.split(':')[0]}:" in text
    (command,) = re.findall(r"^fastfip purify .*$", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), "
        "nn.Flatten(), nn.Linear(4, 2))\n"
    )
    for i in range(8):
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "images" / str(i % 2) / f"{i}.png")
    from fastfip.checkpoint import load_arch

    monkeypatch.syspath_prepend(str(tmp_path))
    fastfip.save_checkpoint(load_arch("net:make"), "suspect.safetensors")
    arguments = shlex.split(command.replace("timm:efficientnet_lite0", "net:make"))[1:]
    assert main([*arguments, "--method", "fine_tune", "--steps", "1", "--quiet", "--ignore-fit"]) == 0
    assert (tmp_path / "clean.safetensors").exists()
