"""A purified model for Hugging Face's hub: a folder with weights, config and model card, and its upload (extra `hf`).

result = fastfip.purify(model, clean_loader)
result.save_for_hub("purified")                     # look at purified/README.md
result.push_to_hub("me/purified", private=True)
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastfip.checkpoint.save import save_checkpoint
from fastfip.errors import CheckpointError, printable, reason
from fastfip.reporting.card import card, front_matter

if TYPE_CHECKING:
    from torch import nn

__all__ = ["push_to_hub", "save_for_hub"]

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
#: Characters of a README.md in which its metadata have to end.
_HEAD = 100_000


class _Purified(Protocol):
    """What is needed of a PurifyResult."""

    model: Any
    unchanged: bool

    def to_dict(self) -> dict[str, Any]: ...
    def rows(self) -> list[tuple[str, str, str]]: ...


def save_for_hub(
    result: _Purified,
    folder: str | os.PathLike[str],
    *,
    license: str | None = None,
    base_model: str | None = None,
    source: str | os.PathLike[str] | None = None,
    tags: Sequence[str] = (),
    pipeline_tag: str | None = None,
    processor: Any = None,
    name: str | None = None,
    extra: str = "",
) -> Path:
    """Write a folder that can be uploaded: weights as safetensors, the config where the model has one, a model card.

    A model of transformers or peft is written by its own `save_pretrained`, one of timm by timm, so that they load it
    again by name; others as `model.safetensors`.

    Args:
        result: of a purification.
        folder: is made; it has to be empty if it is there.
        license: identifier of the licence of the weights that were purified, e.g. "apache-2.0". None: what the
            README.md of `source` says; else the card says that it is not known.
        base_model: what was purified, as the hub names it. None: what a model of transformers was loaded from, where
            that is such a name.
        source: folder that the model was loaded from. None: the one that a model of transformers names.
        tags: of the card, beside "fastfip" and "backdoor-removal".
        pipeline_tag: what the model is for, as the hub names it, e.g. "image-classification".
        processor: a tokenizer or image processor, or several: what has a `save_pretrained` of its own.
        name: title of the card; None: the name of the folder.
        extra: Markdown that is put below the card as it is.

    Returns:
        the folder.

    Raises:
        CheckpointError: the folder is not empty or cannot be written, or no parameter has moved.
    """
    where = Path(folder)
    if result.unchanged:
        raise CheckpointError("the purification did not change the model: there is nothing to publish")
    try:
        where.mkdir(parents=True, exist_ok=True)
        if any(where.iterdir()):
            raise CheckpointError(f"{where}: is not empty: give a new folder")
        library = _write_model(result.model, where)
        for one in processor if isinstance(processor, (list, tuple)) else [processor] if processor is not None else []:
            one.save_pretrained(where)
        said, origin = _of_source(result.model, source)
        text = card(
            result.to_dict(),
            result.rows(),
            name=where.resolve().name if name is None else name,
            load=_loading(result.model, library),
            license=license or said,
            base_model=base_model or origin,
            tags=tags,
            library=library,
            pipeline_tag=pipeline_tag,
            extra=extra,
        )
        (where / "README.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be written: {error.strerror or reason(error)}") from None
    return where


def push_to_hub(
    result: _Purified,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a model purified by fastfip",
    **card_options: Any,
) -> str:
    """Write the folder of `save_for_hub` to a temporary place and upload it to Hugging Face's hub.

    Args:
        result: of a purification.
        repo_id: "owner/name"; the repository is made if it is not there.
        private: whether a new repository is private; None: as the owner's settings say.
        token: of the hub; None: the one that `hf auth login` has stored.
        revision: branch.
        create_pr: open a pull request instead of a commit.
        commit_message: its subject.
        **card_options: of `save_for_hub`.

    Returns:
        the address of the commit.

    Raises:
        CheckpointError: no such form of repo_id, `save_for_hub` refuses, or the hub does.
        ImportError: huggingface_hub is not installed.
    """
    if not _REPO.fullmatch(repo_id):
        raise CheckpointError(f"repo_id={printable(repo_id)!r}: give owner/name")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("push_to_hub needs huggingface_hub: pip install fastfip[hf]") from error
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_for_hub(result, Path(temporary) / "model", **{"name": repo_id.partition("/")[2], **card_options})
        api = huggingface_hub.HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=str(folder),
                repo_type="model",
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        except Exception as error:  # errors of the network, of the hub, and of what it thinks of the token
            said = f"{type(error).__name__}: {reason(error)}"
            raise CheckpointError(f"{repo_id}: the hub refused the upload: {said}") from error
    return str(getattr(commit, "commit_url", commit))


def _write_model(model: nn.Module, folder: Path) -> str | None:
    """Write weights and config; return whose library the model is of."""
    save: Any = getattr(model, "save_pretrained", None)
    if callable(save):
        save(folder)
        return "peft" if hasattr(model, "peft_config") else "transformers"
    if _is_timm(model):
        from timm.models import save_for_hf  # the model is of that package

        save_for_hf(model, str(folder), safe_serialization=True)
        return "timm"
    save_checkpoint(model, folder / "model.safetensors")
    return None


def _is_timm(model: nn.Module) -> bool:
    return type(model).__module__.partition(".")[0] == "timm" and hasattr(model, "pretrained_cfg")


def _of_source(model: nn.Module, source: str | os.PathLike[str] | None) -> tuple[str | None, str | None]:
    """Return the licence that the model's source states, and the name that the hub has for it; None: not known."""
    named = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    folder = Path(named if source is None else source)
    readme = folder / "README.md"
    said: dict[str, str] = {}
    if str(folder) != "." and readme.is_file():
        with readme.open(encoding="utf-8", errors="replace") as file:
            said = front_matter(file.read(_HEAD))
    is_name = _REPO.fullmatch(str(named)) is not None and not Path(named).exists()
    base = str(named) if is_name else said.get("base_model")
    return said.get("license"), base if base is None or _REPO.fullmatch(base) else None


def _loading(model: nn.Module, library: str | None) -> str:
    if library == "timm":
        return 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)'
    if library is not None:
        kind = "AutoPeftModel" if library == "peft" else type(model).__name__
        kind = kind if kind.isidentifier() else "AutoModel"
        return f'from {library} import {kind}\n\nmodel = {kind}.from_pretrained("FOLDER")'
    return (
        "import fastfip\n\nmodel = ...  # the architecture, as it was before\n"
        'fastfip.load_checkpoint("FOLDER/model.safetensors", model)'
    )
