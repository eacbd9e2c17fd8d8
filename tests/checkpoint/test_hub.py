"""The folder for the hub, and its upload against a stand-in of the hub's client."""

import json
import sys
import types
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import fastfip
from fastfip.errors import CheckpointError

yaml = pytest.importorskip("yaml")


def purified(model=None, data=None):
    torch.manual_seed(0)
    if model is None:
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        data = torch.randn(24, 5), torch.arange(24) % 3
    return fastfip.purify(model, data, "fine_tune", steps=2, progress=False, force=True)


def metadata(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_a_folder_has_weights_that_load_again_and_a_card(tmp_path):
    result = purified()
    folder = result.save_for_hub(tmp_path / "clean-net", license="mit", tags=["test"])
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]
    again = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    fastfip.load_checkpoint(folder / "model.safetensors", again)
    assert all(torch.equal(value, result.state_dict()[name]) for name, value in again.state_dict().items())
    assert metadata(folder) == {"license": "mit", "tags": ["fastfip", "backdoor-removal", "test"]}
    assert (folder / "README.md").read_text().count("# clean\\-net") == 1


def test_a_folder_that_is_not_empty_and_a_model_that_did_not_move_are_refused(tmp_path):
    result = purified()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="is not empty: give a new folder"):
        result.save_for_hub(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    result.unchanged = True
    with pytest.raises(CheckpointError, match="did not change the model"):
        result.save_for_hub(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_licence_of_the_source_is_kept(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "README.md").write_text("---\nlicense: cc-by-4.0\nbase_model: owner/first\n---\n# Net\n")
    folder = purified().save_for_hub(tmp_path / "a", source=tmp_path / "source")
    assert metadata(folder)["license"] == "cc-by-4.0" and metadata(folder)["base_model"] == "owner/first"
    folder = purified().save_for_hub(tmp_path / "b", source=tmp_path / "source", license="mit", base_model="x/y")
    assert metadata(folder)["license"] == "mit" and metadata(folder)["base_model"] == "x/y"


class Api:
    """What is used of huggingface_hub.HfApi."""

    calls: list = []

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, *, private, repo_type, exist_ok):
        self.calls.append(("create", repo_id, private, repo_type, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, repo_type, commit_message, revision, create_pr):
        from pathlib import Path

        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, files, commit_message, revision, create_pr))
        return SimpleNamespace(commit_url="https://hub.example/commit/1")


@pytest.fixture
def hub(monkeypatch):
    stand_in = types.ModuleType("huggingface_hub")
    stand_in.HfApi = Api
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    monkeypatch.setattr(Api, "calls", [])
    return Api


def test_what_is_pushed_is_that_folder(hub, tmp_path):
    result = purified()
    address = result.push_to_hub("me/clean", private=True, token="secret", license="mit", revision="try")
    assert address == "https://hub.example/commit/1"
    token, create, upload = hub.calls
    assert token == ("token", "secret") and create == ("create", "me/clean", True, "model", True)
    folder = result.save_for_hub(tmp_path / "clean", license="mit")
    assert upload[2] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert upload[3].startswith("Upload a model purified") and upload[4:] == ("try", False)
    assert b"secret" not in b"".join(upload[2].values())


def test_what_the_hub_refuses_is_one_line_and_leaves_nothing_behind(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def refuse(self, *args, **kwargs):
        raise RuntimeError("401 Unauthorized\nfor url")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(
        CheckpointError, match="me/clean: the hub refused the upload: RuntimeError: 401 Unauthorized for url$"
    ):
        purified().push_to_hub("me/clean")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="give owner/name"):
        purified().push_to_hub("clean")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install fastfip\[hf\]"):
        purified().push_to_hub("me/clean")


# ---------------------------------------------------------------------- the packages themselves, where `make zoo` runs


def test_the_calls_are_those_that_the_hubs_client_takes(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="no huggingface_hub (pip install fastfip[hf])")
    stand_in = mock.create_autospec(huggingface_hub.HfApi)
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in)
    purified().push_to_hub("me/clean", create_pr=True)
    assert stand_in.return_value.upload_folder.call_args.kwargs["repo_id"] == "me/clean"
    assert stand_in.return_value.create_repo.call_count == 1


def test_the_hubs_client_reads_the_card(tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="no huggingface_hub (pip install fastfip[hf])")
    folder = purified().save_for_hub(tmp_path / "a", license="mit", base_model="owner/name", tags=["x: y"])
    data = huggingface_hub.ModelCard.load(folder / "README.md").data
    assert (data.license, data.base_model, data.tags) == ("mit", "owner/name", ["fastfip", "backdoor-removal", "x: y"])


def test_a_model_of_transformers_is_loaded_again_by_name_with_config_and_processor(tmp_path):
    transformers = pytest.importorskip("transformers", reason="no transformers (pip install fastfip[hf])")
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "image_size": 8,
    }
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, patch_size=4, num_labels=3))
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "source")
    data = {"pixel_values": torch.randn(12, 3, 8, 8), "labels": torch.arange(12) % 3}
    result = purified(model, [data])
    folder = result.save_for_hub(tmp_path / "out")
    assert metadata(folder)["license"] == "apache-2.0" and metadata(folder)["library_name"] == "transformers"
    assert "base_model" not in metadata(folder)  # it came from a folder, which is no name of the hub's
    again = transformers.AutoModelForImageClassification.from_pretrained(folder)
    assert all(torch.equal(value, result.state_dict()[name]) for name, value in again.state_dict().items())
    assert "from transformers import ViTForImageClassification" in (folder / "README.md").read_text()
    model.config._name_or_path = "owner/vit"
    assert metadata(purified(model, [data]).save_for_hub(tmp_path / "b"))["base_model"] == "owner/vit"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]
