"""The command line: what it writes, what it prints, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fastfip.purification.purify
from fastfip.checkpoint import load_checkpoint
from fastfip.cli import app, main
from fastfip.cli.errors import CODES
from fastfip.errors import BackendError
from tests.support.command_line import NET, PURIFY, TRIGGER, fails, work

__all__ = ["work"]

ROOT = Path(__file__).resolve().parents[2]

# ---------------------------------------------------------------- purify


def test_purify(work, capsys):
    before = (work / "in.pth").read_bytes()
    more = ["--test-data", "data.npz", *TRIGGER, "--epochs", "8", "--set", "lr=0.05", "--report", "r.json"]
    assert main([*PURIFY, *more]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out and "─" not in out  # no bar, no colour, no frame
    lines = out.splitlines()
    assert lines[0] == "fine_tune on 60 clean samples" and lines[1].split() == ["before", "after"]
    assert {"ACC", "ASR", "RA"} <= {line.split()[0] for line in lines[2:]}
    assert "not written to out.pth, because they belong to the old weights: optimizer" in out
    assert (work / "in.pth").read_bytes() == before
    old, new = load_checkpoint("in.pth"), load_checkpoint("out.pth")
    assert new.nesting == ("net",) and new.extras["acc"] == 0.5 and list(old) == list(new)
    assert not torch.equal(old["4.weight"], new["4.weight"])
    report = json.loads((work / "r.json").read_text())
    assert report["after"]["acc"] > max(0.9, report["before"]["acc"])
    assert report["settings"]["config"]["lr"] == 0.05 and len(report["history"]) == 8
    assert sorted(set(os.listdir()) - {"__pycache__"}) == ["data.npz", "in.pth", "out.pth", "r.json", "tiny_arch.py"]


def test_purify_without_images(work, capsys):
    shape = ["--input-shape", "3,6,6", "--test-data", "data.npz"]
    state = torch.load("in.pth")["net"]
    state["0.weight"][3] *= 50  # a channel that stands out
    torch.save({"net": state}, "in.pth")
    assert main(["purify", "in.pth", "out.pth", *NET, *shape, "--method", "clp", "--set", "u=2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "clp" and "images" not in report["settings"]
    assert report["alerts"][0].startswith("WITHOUT DATA, 64 drawn images 3x6x6")
    assert (load_checkpoint("out.pth")["1.weight"] == 0).nonzero().flatten().tolist() == [3]
    assert list(load_checkpoint("out.pth")) == list(load_checkpoint("in.pth"))
    assert main(["purify", "in.pth", "drawn.pth", *NET, *shape, "--method", "fine_tune", "--steps", "3"]) == 0
    assert not torch.equal(load_checkpoint("drawn.pth")["4.weight"], load_checkpoint("in.pth")["4.weight"])


def test_purify_is_reproducible_and_picks_images_by_the_seed(work, capsys):
    def weights(name, *more):
        arguments = ["purify", "in.pth", name, *PURIFY[3:], "--steps", "2", *more]
        assert main([*arguments, "--json"]) == 0
        return load_checkpoint(name)["4.weight"], json.loads(capsys.readouterr().out)

    a, figures = weights("a.safetensors", "--per-class", "4")
    assert figures["settings"]["clean_samples"] == 12 and figures["settings"]["steps"] == 2
    assert torch.equal(a, weights("b.pth", "--per-class", "4")[0])
    assert not torch.equal(a, weights("c.pth", "--per-class", "4", "--seed", "1")[0])
    assert weights("d.pth", "--limit", "5")[1]["settings"]["clean_samples"] == 5


def test_settings_from_a_file_and_one_by_one(work, capsys):
    (work / "c.json").write_text('{"lr": 0.3, "epochs": 3, "momentum": 0.5}')
    (work / "c.yaml").write_text("lr: 3e-1\nmomentum: 0.5\nepochs: 3\n")
    for name in ("c.json", "c.yaml"):
        arguments = ["--config", name, "--set", "steps=4", "--set", "momentum=0.25", "--json", "--force"]
        assert main([*PURIFY, *arguments]) == 0
        config = json.loads(capsys.readouterr().out)["settings"]["config"]
        assert (config["lr"], config["momentum"], config["steps"], config["epochs"]) == (0.3, 0.25, 4, None)


def test_images_are_prepared_as_asked(work, monkeypatch):
    seen = {}

    def spy(model, loader, *args, **kwargs):
        seen["clean"], seen["test"] = next(iter(loader)), next(iter(kwargs["test_loader"]))
        seen["asr"] = next(iter(kwargs["asr_loader"]))
        raise BackendError("seen enough")

    monkeypatch.setattr(fastfip.purification.purify, "purify", spy)
    more = ["--mean", "0.5,0.25,0", "--std", "0.5", "--batch-size", "7", "--test-data", "data.npz", *TRIGGER]
    assert main([*PURIFY, *more]) == 6
    raw = torch.from_numpy(np.load("data.npz")["clean_x"][:7]).permute(0, 3, 1, 2).float() / 255
    want = (raw - torch.tensor([0.5, 0.25, 0]).view(3, 1, 1)) / 0.5
    torch.testing.assert_close(seen["clean"][0], want)
    assert len(seen["test"][0]) == 7
    x, attack, true = seen["asr"]
    assert set(attack.tolist()) == {1} and 1 not in true.tolist()
    torch.testing.assert_close(
        x[:, :, 3:5, 3:5], ((1 - torch.tensor([0.5, 0.25, 0])) / 0.5).view(3, 1, 1).expand(7, 3, 2, 2)
    )


def interrupt(monkeypatch, epoch):
    real = fastfip.purification.purify.purify

    def stop(run, record):
        if record["epoch"] == epoch:
            raise KeyboardInterrupt

    def purify(*args, **kwargs):
        return real(*args, **kwargs, callbacks=[stop])

    monkeypatch.setattr(fastfip.purification.purify, "purify", purify)


def test_ctrl_c_writes_the_last_good_state(work, capsys, monkeypatch):
    interrupt(monkeypatch, 2)
    assert main([*PURIFY, "--epochs", "9"]) == 130
    out, err = capsys.readouterr()
    assert err == "fastfip: interrupted: out.pth holds the last good state\n" and "interrupted in epoch 2 of 9" in out
    assert not torch.equal(load_checkpoint("out.pth")["4.weight"], load_checkpoint("in.pth")["4.weight"])


def test_ctrl_c_before_anything_is_good_writes_nothing(work, capsys, monkeypatch):
    def purify(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastfip.purification.purify, "purify", purify)
    assert fails(capsys, 130, *PURIFY) == "fastfip: interrupted\n"
    monkeypatch.undo()
    assert not (work / "out.pth").exists()


def test_outputs_are_checked_before_the_work(work, capsys, monkeypatch):
    monkeypatch.setattr(fastfip.purification.purify, "purify", lambda *a, **k: pytest.fail("worked first"))
    (work / "old.pth").write_bytes(b"old")
    (work / "link.pth").symlink_to("in.pth")
    os.link("in.pth", "hard.pth")
    rest = [*NET, "--data", "data.npz"]
    for out, match in [
        ("old.pth", "exists: --force"),
        ("in.pth", "is the same file as IN"),
        ("./../" + work.name + "/in.pth", "is the same file as IN"),
        ("link.pth", "is the same file as IN"),
        ("hard.pth", "is the same file as IN"),
        ("no/out.pth", "folder .*no does not exist"),
    ]:
        assert __import__("re").search(match, fails(capsys, 2, "purify", "in.pth", out, *rest)), out
    assert "is the same file as IN" in fails(capsys, 2, "purify", "in.pth", "in.pth", *rest, "--force")
    assert "is the same file as IN" in fails(
        capsys, 2, "purify", "in.pth", "o.pth", *rest, "--report", "in.pth", "--force"
    )
    assert "both" in fails(capsys, 2, "purify", "in.pth", "o.pth", *rest, "--report", "o.pth")
    assert "suffix" in fails(capsys, 4, "purify", "in.pth", "out.txt", *rest)
    assert (work / "old.pth").read_bytes() == b"old"


def test_force_replaces(work, capsys):
    (work / "out.pth").write_bytes(b"old")
    assert main([*PURIFY, "--steps", "1", "--force"]) == 0
    assert load_checkpoint("out.pth").nesting == ("net",)


def test_a_failure_leaves_the_output_alone(work, capsys):
    (work / "out.pth").write_bytes(b"old")
    fails(capsys, 5, *PURIFY, "--force", "--set", "lr=1e30", "--set", "epochs=30", "--set", "bn_mode=eval")
    assert (work / "out.pth").read_bytes() == b"old"


# ---------------------------------------------------------------- evaluate, sharpness


def test_evaluate(work, capsys):
    assert main(["evaluate", "in.pth", *NET, "--test-data", "data.npz", *TRIGGER]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["in.pth"] and [row[0] for row in lines[2:]] == ["ACC", "ASR", "RA", "loss"]
    assert lines[2][-1] == "30" and lines[3][-1] == "20"
    assert main(["evaluate", "in.pth", *NET, "--test-data", "data.npz", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["asr"] is None and f"{100 * figures['acc']:.2f}" == lines[2][1]


@pytest.mark.parametrize(
    "command", [["evaluate", "--test-data"], ["sharpness", "--data"], ["fisher", "f.pth", "--data"]], ids=lambda c: c[0]
)
def test_images_of_a_size_that_the_model_does_not_take(work, capsys, command):
    name, *more = command
    arguments = [name, "in.pth", *more, "data.npz", *NET, "--size", "64"]
    said = fails(capsys, 5, *arguments)
    assert "the model fails on a batch of images 3x64x64" in said and "see --size" in said and "inspect" in said


def test_a_size_that_the_model_does_not_take_in_the_other_commands(work, capsys):
    rest = [*NET, "--data", "data.npz", "--size", "64", "--test-data", "data.npz"]
    assert "the model fails on a batch of" in fails(capsys, 5, "purify", "in.pth", "o.pth", *rest)
    assert "the model fails on a batch of test_loader" in fails(capsys, 5, "compare", "in.pth", *rest)
    assert "the model fails on a batch of" in fails(capsys, 5, "audit", "in.pth", *rest[:-2])


def test_a_softmax_inside_the_net_is_taken_out_of_the_loss(work, capsys):
    pair = []
    for arch in ("tiny_arch:net", "tiny_arch:probabilities"):
        arguments = ["in.pth", "--arch", arch, "--json"]
        assert main(["evaluate", *arguments, "--test-data", "data.npz", "--batch-size", "8"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert main(["sharpness", *arguments, "--data", "data.npz", "--limit", "20"]) == 0
        sharp = json.loads(capsys.readouterr().out)
        said = any("softmax" in note for note in figures["notes"]) and "softmax" in str(sharp["notes"])
        assert said == (arch != "tiny_arch:net")
        pair.append([figures["loss"], figures["acc"], sharp["trace_fisher"], sharp["lambda_max"]])
    np.testing.assert_allclose(*pair, rtol=1e-3)


def test_triggered_images_from_a_file(work, capsys):
    """Given as files they give what the same trigger gives on the test images."""
    with np.load("data.npz") as data:
        x, y = data["test_x"].copy(), data["test_y"]
    x[:, 3:5, 3:5] = 255
    np.savez("a.npz", x=x, y=y)
    np.savez("b.npz", asr_x=x, asr_y=y, attack_y=np.ones(30, int))
    np.savez("c.npz", x=x[y != 1], y=np.ones(20, int))
    got = []
    for more in (
        ["--test-data", "data.npz", *TRIGGER],
        ["--asr-data", "a.npz", "--target", "1"],
        ["--asr-data", "b.npz"],
        ["--asr-data", "c.npz"],
    ):
        assert main(["evaluate", "in.pth", *NET, *more, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        got.append((figures["asr"], figures["n_triggered"]))
        assert (figures["ra"] is None) == (more[-1] == "c.npz")
    assert len(set(got)) == 1 and got[0][1] == 20
    assert "give --target" in fails(capsys, 3, "evaluate", "in.pth", *NET, "--asr-data", "a.npz")
    assert main(["evaluate", "in.pth", *NET, "--asr-data", "a.npz", "--target", "next"]) == 0


def test_sharpness(work, capsys):
    pytest.importorskip("fastfip.fisher.sharpness")
    assert main(["sharpness", "in.pth", *NET, "--data", "data.npz", "--limit", "20", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["lambda_max"] > 0 and figures["checkpoint"] == "in.pth"
    assert main(["sharpness", "in.pth", *NET, "--data", "data.npz", "--limit", "20"]) == 0
    assert "lambda_max" in capsys.readouterr().out


# ---------------------------------------------------------------- methods, env, demo


def test_methods(capsys):
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    for name, summary in json.loads(capsys.readouterr().out).items():
        assert f"{name} " in table and summary in " ".join(table.split())
        assert main(["methods", name, "--json"]) == 0
        defaults = json.loads(capsys.readouterr().out)
        assert main(["methods", name]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines()[2:] if not line.startswith(" ")]
        assert [line.split()[0] for line in lines] == list(defaults)
    assert "did you mean 'fine_tune'" in fails(capsys, 5, "methods", "fine_tuna")
    assert "did you mean 'fip'?" in fails(capsys, 5, "methods", "FIP")


def test_env(capsys):
    assert main(["env", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["torch"] == torch.__version__ and values["native"]
    assert main(["env"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["fastfip", values["fastfip"]]


def test_env_without_torch():
    code = "import sys; sys.modules['torch'] = None; from fastfip.cli import main; sys.exit(main(['env', '--json']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["torch"] == "not installed: pip install torch" and values["native"] is None and values["python"]


def test_env_where_torch_does_not_load(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open\\nshared object file')")
    code = "import sys; from fastfip.cli import main; sys.exit(main(['env', '--json']))"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["torch"]
    assert said == "does not load: OSError: libtorch.so: cannot open shared object file"


def test_completion_of_a_shell():
    asked = {"_FASTFIP_COMPLETE": "complete_bash", "COMP_WORDS": "fastfip ins", "COMP_CWORD": "1"}
    environment = {**os.environ, **asked, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "fastfip"], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["inspect"]
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output


def test_demo_without_its_extra(work, capsys, monkeypatch):
    pytest.importorskip("fastfip.cli.demonstration")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install scikit-learn matplotlib" in fails(capsys, 6, "demo")


# ---------------------------------------------------------------- how it ends


def test_every_error_has_its_code_and_one_line(work, capsys):
    (work / "bad.pth").write_bytes(b"<html>")
    (work / "c.json").write_text('{"lr": -1}')
    np.savez("empty.npz", x=np.zeros((0, 3, 6, 6), np.uint8), y=np.zeros(0, int))
    np.savez("far.npz", x=np.zeros((4, 3, 6, 6), np.uint8), y=np.arange(4) * 9)
    torch.save(torch.nn.Linear(2, 2), "module.pth")
    data = ["--data", "data.npz"]
    for code, arguments, text in [
        (2, ["purify"], "Missing argument 'IN'"),
        (2, ["purify", "in.pth", "o.pth", *NET], "--data is missing"),
        (2, ["purify", "in.pth", "o.pth", *NET, "--input-shape", "3,6"], "give channels, height and width"),
        (2, ["purify", "in.pth", "o.pth", *NET, "--input-shape", "3,6,6", "--limit", "5"], "--limit needs --data"),
        (2, [*PURIFY, "--input-shape", "3,6,6"], "images have a shape"),
        (2, ["nothing"], "No such command 'nothing'"),
        (2, ["methods", "--nothing"], "--nothing"),
        (2, [*PURIFY, "--epochs", "x"], "--epochs"),
        (2, [*PURIFY, "--epochs", "1", "--steps", "1"], "give only one of them"),
        (5, [*PURIFY, "--micro-batch", "0"], "micro_batch=0: give a number of samples"),
        (5, [*PURIFY, "--memory", "much"], "memory='much': give a number of bytes"),
        (2, [*PURIFY, "--set", "lr"], "KEY=VALUE"),
        (2, [*PURIFY, "--amp", "fp8"], "--amp"),
        (2, [*PURIFY, "--mean", "a"], "--mean=a"),
        (2, [*PURIFY, "--size", "1,2,3"], "--size"),
        (2, [*PURIFY, "--arch-args", "{"], "--arch-args is not JSON"),
        (2, [*PURIFY, "--target", "1"], "--target needs"),
        (2, [*PURIFY, *TRIGGER], "give --test-data"),
        (2, [*PURIFY, "--test-data", "data.npz", *TRIGGER[:2]], "needs --target"),
        (2, [*PURIFY, "--test-data", "data.npz", *TRIGGER[:2], "--target", "x"], "--target=x"),
        (2, ["evaluate", "in.pth", *NET], "nothing to measure"),
        (3, [*PURIFY, "--data", "none"], "none: there is no such"),
        (3, [*PURIFY, "--data", "empty.npz"], "no images"),
        (3, [*PURIFY, "--data", "far.npz"], "0 to 27, outside 0..2"),
        (3, [*PURIFY, "--mean", "1,2"], "2 numbers for mean"),
        (4, ["purify", "bad.pth", "o.pth", *NET, *data], "bad.pth: is an HTML"),
        (4, ["purify", "none.pth", "o.pth", *NET, *data], "none.pth: does not exist"),
        (4, ["purify", "module.pth", "o.pth", *NET, *data], "pickled module"),
        (4, [*PURIFY, "--arch-args", '{"classes": 4}'], "[3, 128] in the file and [4, 128] in the model"),
        (4, [*PURIFY, "--key", "model"], "no entry 'model', only net, acc, optimizer"),
        (5, [*PURIFY, "--arch", "tiny_arch:none"], "has no none"),
        (5, [*PURIFY, "--arch", "tiny_arch"], "module:factory"),
        (5, [*PURIFY, "--arch", "tiny_arch:nothing"], "returned a NoneType"),
        (5, [*PURIFY, "--arch-args", '{"klasses": 4}'], "klasses"),
        (5, [*PURIFY, "--method", "fastfip"], "did you mean"),
        (5, [*PURIFY, "--set", "momemtum=0.1"], "did you mean 'momentum'"),
        (5, [*PURIFY, "--set", "lr=fast"], "lr"),
        (5, [*PURIFY, "--config", "c.json"], "lr"),
        (5, [*PURIFY, "--config", "none.json"], "cannot be read"),
        (5, [*PURIFY, "--device", "gpu"], "device='gpu'"),
        (5, [*PURIFY, "--limit", "0"], "limit=0"),
        (5, [*PURIFY, "--std", "0"], "std must not be 0"),
        (5, [*PURIFY, "--test-data", "data.npz", "--attack", "badnets:sice=2", "--target", "1"], "sice=2"),
        (5, [*PURIFY, "--test-data", "data.npz", "--attack", "badnet", "--target", "1"], "did you mean 'badnets'"),
    ]:
        assert text in fails(capsys, code, *arguments), arguments
    assert not {"o.pth", "out.pth"} & set(os.listdir())


def test_a_device_that_is_not_here(work, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "cannot be used here" in fails(capsys, 6, *PURIFY, "--device", "cuda")


def test_unexpected_errors(work, capsys, monkeypatch):
    def purify(*args, **kwargs):
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(fastfip.purification.purify, "purify", purify)
    text = fails(capsys, 1, *PURIFY)
    assert text == "fastfip: unexpected ZeroDivisionError: by zero (--debug shows where)\n"
    assert main([*PURIFY, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("FASTFIP_DEBUG", "1")
    assert main(PURIFY) == 1
    assert "Traceback" in capsys.readouterr().err


def test_exit_codes_are_documented():
    text = (ROOT / "docs" / "cli.md").read_text()
    for code, meaning in CODES.items():
        assert f"| {code} | {meaning} |" in text


def test_help_names_every_option_with_a_default():
    runner = CliRunner()
    for command in ("inspect", "purify", "evaluate", "sharpness", "fisher", "methods", "env", "demo"):
        shown = runner.invoke(app, [command, "--help"])
        assert shown.exit_code == 0 and f"{command} " in shown.output
    assert "[default: auto]" in runner.invoke(app, ["purify", "--help"]).output
    assert main([]) == 0 and main(["--version"]) == 0


def test_tables_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["methods"]) == 0
    assert "─" in capsys.readouterr().out


def test_as_a_process(work):
    """Quick to help, quiet, and the same codes; nothing heavy is imported for the help."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    heavy = "import sys; from fastfip.cli import main; main(['--help']); print([m for m in sys.modules if m in HEAVY])"
    code = heavy.replace("HEAVY", "('torch', 'numpy', 'safetensors', 'matplotlib')")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    run = [sys.executable, "-m", "fastfip"]
    done = subprocess.run(
        [*run, *PURIFY, "--steps", "1", "--ignore-fit"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("fine_tune on 60 clean samples")
    done = subprocess.run([*run, *PURIFY], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("fastfip: OUT out.pth exists")
