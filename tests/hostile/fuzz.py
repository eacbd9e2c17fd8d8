"""Mutate sound and hostile files, give them to every reader of files, and count what comes of it.

    python -m tests.hostile.fuzz --minutes 30

atheris chooses the mutations by what they reach, where it is installed (`pip install atheris`); else, and with
`--plain`, they are drawn at random. The corpus is made here and stored nowhere. A crash is any exception but a refusal,
text that would do something to a terminal, or more memory than 64 MB over the size of the file. Files that crash are
written to a temporary folder, which is named. The exit code is 1 where there was one.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import os
import random
import re
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from fastfip import backdoorbench
from fastfip.checkpoint import load_checkpoint, opcodes, scan
from fastfip.data.images import load, read_image
from fastfip.data.scaling import Pixels
from fastfip.errors import FastFIPError
from tests.hostile import generators
from tests.support.backdoorbench_files import attack_result, some_pictures
from tests.support.checkpoint_files import Net, small_state, torch_bytes, write_zip
from tests.support.peak_memory import LINUX, status

MORE = 64 * 2**20
#: Bytes in which sizes, counts and instructions of pickles go wrong.
WORDS = [b"\0", b"\xff", b"\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\x80\x02"]
WORDS += [
    b"R",
    b"b",
    b"t",
    b"(",
    b"]",
    b"}",
    b"\x85",
    b"\x86",
    b"\x87",
    b"q\0",
    b"h\0",
    b"s",
    b"u",
    b"a",
    b"e",
    b".",
    b"Q",
]
WORDS += [
    b"\x8c\1a",
    b"\x8f",
    b"\x90",
    b"\x91",
    b"\x93",
    b"\x94",
    b"\x95" + bytes(8),
    b"\x96\4" + bytes(7),
]  # later ones
WORDS += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"ccollections\nCounter\n"]


class Counted(opcodes.Budget):
    """A budget that keeps the largest count of instructions."""

    most = 0

    def step(self) -> None:
        super().step()
        Counted.most = max(Counted.most, self.steps)


class Figures:
    """What came of the files so far."""

    def __init__(self) -> None:
        self.files, self.read, self.memory = Counter[str](), Counter[str](), 0
        self.refusals, self.crashes = Counter[str](), Counter[str]()

    @functools.cached_property
    def folder(self) -> Path:
        """Where files that crash are kept, made for the first of them."""
        return Path(tempfile.mkdtemp(prefix="fuzz-"))

    def refuse(self, text: str) -> None:
        """Count a refusal by what it says, without names and numbers."""
        text = text.split(": ", 1)[-1]
        kind = re.sub(r"'[^']*'|\[[^]]*\]|\S*[\d?./_]\S*", "", text).split()
        self.refusals[" ".join(kind[:5])] += 1

    def crash(self, what: str, data: bytes) -> None:
        """Count a crash, and keep the first file of each kind."""
        self.crashes[what] += 1
        if self.crashes[what] == 1:
            path = self.folder / f"{len(self.crashes)}.bin"
            path.write_bytes(data)
            print(f"crash: {what} ({path})", flush=True)

    def show(self, seconds: float) -> None:
        """Print all of it."""
        total = sum(self.files.values())
        print(f"files: {total} in {seconds / 60:.1f} minutes", dict(self.files))
        print(f"read: {sum(self.read.values())}", dict(self.read))
        print(f"refused: {sum(self.refusals.values())}, of {len(self.refusals)} kinds")
        for kind, count in self.refusals.most_common(30):
            print(f"  {count:8d}  {kind}")
        print(f"crashes: {sum(self.crashes.values())}", dict(self.crashes))
        print(f"worst memory: {self.memory / 2**20:.1f} MB over the size of the file")
        print(f"worst instructions: {Counted.most} of {opcodes.MOST_INSTRUCTIONS}", flush=True)


class Fuzz:
    """The readers, and a corpus for each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.figures = folder, Figures()
        self.readers: dict[str, Callable[[bytes], None]] = {
            "checkpoint": self.checkpoint,
            "pickle": self.pickle,
            "backdoorbench": self.backdoorbench,
            "npz": self.npz,
            "image": self.image,
        }
        self.corpus = {name: list(make()) for name, make in MAKERS.items()}

    def one(self, name: str, data: bytes) -> None:
        """Give a file to a reader."""
        figures = self.figures
        figures.files[name] += 1
        if LINUX:
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
        try:
            self.readers[name](data)
        except FastFIPError as error:
            figures.refuse(str(error))
            if not str(error).isprintable() or len(str(error)) > 900:
                figures.crash(f"{name}: a text that is not one short line", data)
        except BaseException as error:
            figures.crash(f"{name}: {type(error).__name__}: {str(error)[:80]}", data)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
        else:
            figures.read[name] += 1
        if LINUX:
            over = status("VmHWM") - before - len(data)
            figures.memory = max(figures.memory, over)
            if over > MORE:
                figures.crash(f"{name}: more memory than 64 MB over the size of the file", data)

    def checkpoint(self, data: bytes) -> None:
        path = self.folder / "m.pth"
        path.write_bytes(data)
        for value in load_checkpoint(path).values():
            assert (
                not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.double().isfinite().all()
            )
        load_checkpoint(path, Net(), strict=False)

    def pickle(self, data: bytes) -> None:
        path = self.folder / "m.pth"
        write_zip(path, None, STORAGES, data=data)
        for value in load_checkpoint(path).values():
            value.sum()

    def backdoorbench(self, data: bytes) -> None:
        path = self.folder / "attack_result.pt"
        write_zip(path, None, STORAGES, data=data)
        result = backdoorbench.read(path)
        for name in ("bd_train", "bd_test"):
            found = result.poisoned(name)
            if found is not None and len(found) and found.is_there:
                found.images(Pixels(size=(8, 8))).batch([0])
        assert len(load_checkpoint(path, key="model")) <= len(result.shapes)

    def npz(self, data: bytes) -> None:
        path = self.folder / "a.npz"
        path.write_bytes(data)
        load(path).batch([0])

    def image(self, data: bytes) -> None:
        path = self.folder / "a.png"
        path.write_bytes(data)
        read_image(path)


STORAGES = {str(i): struct.pack("<12f", *range(12)) for i in range(3)}


def checkpoints():
    yield from generators.SOUND.values()
    yield generators.sound_safetensors()
    yield torch_bytes(generators.weights_with_numpy())
    yield torch_bytes(generators.weights_with_numpy(), legacy=True)
    yield torch_bytes({"state_dict": {f"net.{name}": value for name, value in small_state().items()}})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.pth")
        for hostile in generators.SLOW:
            if hostile.name in SEEDS:
                hostile.write(path)
                yield path.read_bytes()


def pickles():
    """The pickles of files all of whose blocks have 48 bytes, like those of `STORAGES`."""
    state = {"fc.weight": torch.ones(3, 4), "fc.bias": torch.ones(12), "n": torch.arange(6)}
    beside = {name: value for name, value in generators.weights_with_numpy().items() if name != "net"}
    values = [state, {"net": state, **beside}, {"w": torch.nn.Parameter(torch.ones(12)), "v": torch.ones(4, 3).t()}]
    values += [{"net": state, "args": argparse.Namespace(lr=1), "seen": {1: (2, [3, "x"])}}]
    later = [(value, protocol) for value in values[:2] for protocol in (3, 4, 5)]
    for value, protocol in [*((value, 2) for value in values), *later]:
        with zipfile.ZipFile(io.BytesIO(torch_bytes(value, protocol=protocol))) as archive:
            yield from (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def results():
    """The pickles of results of BackdoorBench in both modes, under both names of NumPy."""
    with tempfile.TemporaryDirectory() as folder:
        for disk, numpy in itertools.product((False, True), (1, 2)):
            weights = {"fc.weight": torch.ones(4, 3), "fc.bias": torch.ones(12)}
            path = attack_result(Path(folder, "x"), weights, disk, numpy, pictures=some_pictures(6, 20))
            with zipfile.ZipFile(path) as archive:
                yield from (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def arrays():
    yield generators.sound_npz()
    yield generators.sound_npz(compressed=False)


def images():
    from PIL import Image

    picture = Image.radial_gradient("L").resize((16, 16))
    for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM", "TIFF"):
        out = io.BytesIO()
        picture.convert("RGB").save(out, form)
        yield out.getvalue()


MAKERS = {
    "checkpoint": checkpoints,
    "pickle": pickles,
    "backdoorbench": results,
    "npz": arrays,
    "image": images,
}


def mutated(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Return a file with one to eight changes."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
        if not out:
            break
        at = draw.randrange(len(out))
        match draw.randrange(8):
            case 0 | 1:
                out[at] = draw.randrange(256)
            case 2:
                out[at] ^= 1 << draw.randrange(8)
            case 3:
                word = draw.choice(WORDS)
                out[at : at + len(word)] = word
            case 4:
                out[at:at] = draw.choice(WORDS) * draw.choice((1, 1, 2, 100))
            case 5:
                del out[at : at + draw.choice((1, 1, 4, 64))]
            case 6:
                length = draw.choice((4, 16, 64, 256))
                out[at:at] = out[max(0, at - length) : at] * draw.choice((1, 1, 3, 200))
            case 7:
                other = draw.choice(others)
                start = draw.randrange(len(other) or 1)
                out[at:at] = other[start : start + draw.choice((4, 32, 256))]
        del out[2**22 :]
    return bytes(out)


def plain(fuzz: Fuzz, end: float, seed: int) -> None:
    """Draw files and changes at random until the time is up."""
    draw = random.Random(seed)
    names = ["checkpoint", "pickle", "pickle", "pickle", "backdoorbench", "npz", "image"]
    for name, corpus in fuzz.corpus.items():
        for data in corpus:
            fuzz.one(name, data)
    while time.monotonic() < end:
        name = draw.choice(names)
        corpus = fuzz.corpus[name]
        fuzz.one(name, mutated(draw.choice(corpus), corpus, draw))


def guided(fuzz: Fuzz, start: float, end: float, seed: int) -> None:
    """Let atheris choose; it never returns, so the figures are printed from within."""
    import atheris

    names = list(fuzz.readers)
    corpus = Path(tempfile.mkdtemp(prefix="fuzz-corpus-"))
    for i, name in enumerate(names):
        for j, data in enumerate(fuzz.corpus[name]):
            (corpus / f"{i}-{j}").write_bytes(bytes([i]) + data)

    def one(data: bytes) -> None:
        if data:
            fuzz.one(names[data[0] % len(names)], data[1:])
        if time.monotonic() > end:
            fuzz.figures.show(time.monotonic() - start)
            os._exit(bool(fuzz.figures.crashes))

    atheris.Setup([sys.argv[0], str(corpus), f"-seed={seed}", "-max_len=200000", "-verbosity=0", "-timeout=60"], one)
    atheris.Fuzz()


def instrumented() -> bool:
    """Let atheris see what the readers reach; False where it is not installed."""
    try:
        import atheris
    except ImportError:
        return False
    for module in [module for name, module in list(sys.modules.items()) if name.startswith(READERS)]:
        for value in list(vars(module).values()):
            if getattr(value, "__module__", None) == module.__name__:
                for function in [*vars(value).values()] if isinstance(value, type) else [value]:
                    if hasattr(function, "__code__"):
                        atheris.instrument_func(function)  # in place
    return True


#: Hostile files that are short once they are made.
SEEDS = (
    "nested rebuilds",
    "sides without end",
    "tensors of many sides",
    "packed",
    "dtype that is a list",
    "long number",
)
READERS = ("fastfip.checkpoint.", "fastfip.backdoorbench.", "fastfip.data.npz")


def main() -> int:
    """Run for a time; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--plain", action="store_true", help="draw mutations at random even where atheris is installed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    scan.Budget = Counted  # type: ignore[misc]
    start = time.monotonic()
    end = start + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        if not options.plain and instrumented():
            print("mutations are chosen by atheris", flush=True)
            guided(fuzz, start, end, options.seed + 1)
        print("mutations are drawn at random", flush=True)
        plain(fuzz, end, options.seed)
    fuzz.figures.show(time.monotonic() - start)
    return int(bool(fuzz.figures.crashes))


if __name__ == "__main__":
    sys.exit(main())
