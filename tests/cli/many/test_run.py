"""`fastfip purify-many`: every row once, whatever happens meanwhile."""

import csv
import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastfip
from fastfip.cli import main
from fastfip.cli.many import run as many
from fastfip.cli.many.pool import called
from fastfip.errors import ConfigError
from tests.support.command_line import ARCH, work  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[3]
HEAD = "checkpoint,arch,data,method,settings,ignore_fit,seed\n"


class Here:
    """Attempts one after the other in this process: what a worker does, without its start."""

    def __init__(self):
        self.ended = []

    def start(self, function, job):
        folder = Path.cwd()
        self.ended.append((len(self.ended), called(function, job)))
        many.os.chdir(folder)
        return self.ended[-1][0]

    def wait(self, handles, seconds):
        return [(handle, self.ended[handle][1]) for handle in handles]

    def stop(self, handle):
        pass


@pytest.fixture
def here(monkeypatch):
    place = Here()
    monkeypatch.setattr(many, "Processes", lambda *a, **k: place)
    return place


def checkpoints(count):
    scope = {}
    exec(ARCH, scope)
    for i in range(count):
        torch.manual_seed(i)
        torch.save(scope["net"]().state_dict(), f"in{i}.pth")


def manifest(count, *more):
    checkpoints(count)
    rows = [f"in{i}.pth,tiny_arch:net,data.npz,fine_tune,epochs=1,yes,0\n" for i in range(count)]
    Path("m.csv").write_text(HEAD + "".join([*rows, *more]))


def lines(folder="out"):
    with open(Path(folder) / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def whole(folder="out"):
    """Whether each row that is done has the file that its line says."""
    return all(
        hashlib.sha256((Path(folder) / line["out"]).read_bytes()).hexdigest() == line["sha256"]
        for line in lines(folder)
    )


def test_rows_that_are_done_are_passed_over_and_failed_ones_tried_when_asked(work, here, capsys):  # noqa: F811
    manifest(2, "in0.pth,tiny_arch:nothing,data.npz,fine_tune,,yes,0\n")
    assert main(["purify-many", "m.csv", "--out", "out", "--quiet"]) == 8
    out, err = capsys.readouterr()
    assert err == "fastfip: 1 of 3 rows failed, e.g. arch 'tiny_arch:nothing' returned a NoneType, not an nn.Module\n"
    assert "2 of 3 rows done, 1 failed" in out
    assert [line["status"] for line in lines()] == ["done", "done", "failed"] and len(here.ended) == 3
    assert sorted(path.name for path in Path("out").glob("*.pth")) == [lines()[0]["out"], "in1.pth"]
    assert Path("out/report.md").read_text().count("| done |") == 2
    before = lines()
    assert main(["purify-many", "m.csv", "--out", "out"]) == 8
    assert lines() == before and len(here.ended) == 3
    assert main(["purify-many", "m.csv", "--out", "out", "--retry-failed"]) == 8
    assert len(here.ended) == 4 and [line["key"] for line in lines()] == [line["key"] for line in before]


def test_the_same_rows_from_python_and_what_comes_of_them(work, here):  # noqa: F811
    checkpoints(2)
    rows = [
        fastfip.ManyRow(checkpoint="in0.pth", arch="tiny_arch:net", data="data.npz", test_data="data.npz",
                        attack="badnets:size=2,margin=1", target="1", method="fine_tune", epochs=1, ignore_fit=True),
        {"checkpoint": "in1.pth", "arch": "tiny_arch:net", "input_shape": "3,6,6", "settings": "u=0.3", "method": "clp",
         "out": "named.safetensors"},
    ]  # fmt: skip
    said = []
    result = fastfip.purify_many(rows, "out", progress=said.append)
    first, second = result.done
    assert (first["method"], second["method"], second["out"]) == ("fine_tune", "clp", "named.safetensors")
    assert first["asr_before"] != "" and first["clean_samples"] == "60" and first["checkpoint"] == "in0.pth"
    assert said[0].startswith("1 of 2: in0.pth to in0.pth, ACC ")
    expected = subprocess_free_purify()
    purified = fastfip.load_checkpoint("out/in0.pth")
    assert all(torch.equal(purified[name], expected[name]) for name in expected)


def subprocess_free_purify():
    """The weights that the command makes of the first row."""
    arguments = "purify in0.pth alone.pth --arch tiny_arch:net --data data.npz --method fine_tune --epochs 1".split()
    assert main([*arguments, "--ignore-fit", "--quiet", "--test-data", "data.npz"]) == 0
    return fastfip.load_checkpoint("alone.pth")


def test_names_of_what_is_written_do_not_clash(work, here):  # noqa: F811
    checkpoints(1)
    row = {"checkpoint": "in0.pth", "arch": "tiny_arch:net", "data": "data.npz", "method": "fine_tune", "epochs": 1}
    result = fastfip.purify_many([{**row, "seed": seed} for seed in range(2)], "out")
    assert len({line["out"] for line in result.rows}) == 2 and not Path("out/in0.pth").exists()
    with pytest.raises(ConfigError, match="rows 1 and 2 are the same"):
        fastfip.purify_many([row, row], "out")
    with pytest.raises(ConfigError, match="another row writes it"):
        fastfip.purify_many([{**row, "seed": seed, "out": "x.pth"} for seed in (7, 8)], "out")
    Path("out/mine.pth").write_text("mine")
    with pytest.raises(ConfigError, match="it exists already"):
        fastfip.purify_many([{**row, "seed": 9, "out": "mine.pth"}], "out")
    assert len(lines()) == 2 and Path("out/mine.pth").read_text() == "mine"


def test_a_file_that_is_called_as_in_every_folder_has_the_name_of_its_folder():
    names = ["a/attack_result.pt", "b/model.safetensors", "c/net.pth", "model.pth", "d/folder"]
    found = [many._default(fastfip.ManyRow(checkpoint=name)) for name in names]
    assert found == ["a.pt", "b.safetensors", "net.pth", "model.pth", "folder.safetensors"]


def test_a_failed_row_whose_name_is_taken_does_not_stop_the_others(work, here):  # noqa: F811
    checkpoints(2)
    row = {"arch": "tiny_arch:net", "data": "data.npz", "method": "fine_tune", "epochs": 1, "ignore_fit": True}
    first, second = ({**row, "checkpoint": f"in{i}.pth"} for i in range(2))
    fastfip.purify_many([{**first, "arch": "tiny_arch:nothing", "out": "x.pth"}], "out")
    Path("out/x.pth").write_text("mine")
    result = fastfip.purify_many([{**first, "arch": "tiny_arch:nothing", "out": "x.pth"}, second], "out")
    assert [line["status"] for line in result.rows] == ["failed", "done"]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"method": "fine_tun"}, r"row 1 \(in0.pth\): no method 'fine_tun': did you mean 'fine_tune'"),
        ({"method": "fine_tune", "settings": "lrr=1"}, "lrr"),
        ({"checkpoint": "none.pth"}, "there is no such file"),
        ({"epochs": 1, "steps": 1}, "epochs and steps"),
    ],
)
def test_wrong_rows_are_refused_before_anything_is_done(work, here, row, words):  # noqa: F811
    checkpoints(1)
    with pytest.raises(ConfigError, match=words):
        fastfip.purify_many([{"checkpoint": "in0.pth", "arch": "tiny_arch:net", "data": "data.npz", **row}], "out")
    assert here.ended == [] and not Path("out").exists()


def test_an_untrusted_checkpoint_is_a_failed_row(work, here):  # noqa: F811
    checkpoints(1)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (Path("ran"),))

    torch.save({"w": Evil()}, "evil.pth")
    rows = [{"checkpoint": name, "arch": "tiny_arch:net", "data": "data.npz", "method": "fine_tune", "epochs": 1}
            for name in ("evil.pth", "in0.pth")]  # fmt: skip
    result = fastfip.purify_many(rows, "out")
    assert [line["status"] for line in result.rows] == ["failed", "done"] and not Path("ran").exists()
    assert "evil.pth" in result.failed[0]["error"] and not Path("out/evil.pth").exists()


@pytest.mark.parametrize("where", [[], ["--ray"]], ids=["processes", "ray"])
def test_killed_half_way_and_resumed(work, where):  # noqa: F811
    if where:
        pytest.importorskip("ray", reason="needs the extra ray")
    manifest(4)
    command = [sys.executable, "-m", "fastfip", "purify-many", "m.csv", "--out", "out", "--workers", "2", *where]
    environment = {**many.os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not (Path("out/results.csv").exists() and lines()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = lines()
    assert 0 < len(there) < 4
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 rows done" in done.stdout
    assert lines()[: len(there)] == there and len({line["key"] for line in lines()}) == len(lines()) == 4
    assert whole() and sorted(p.name for p in Path("out").glob("*.pth")) == [f"in{i}.pth" for i in range(4)]
    assert list(Path("out/work").iterdir()) == []
