"""`fastfip purify` as torchrun starts it, and the file of a broken run."""

import os
import sys

import pytest
import torch
import torch.distributed as dist

from fastfip.checkpoint import load_checkpoint
from fastfip.cli import main
from fastfip.purification.loop import _Loop
from tests.support.command_line import PURIFY, fails, work
from tests.support.processes import in_processes

__all__ = ["work"]

needs_gloo = pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork")


@needs_gloo
def test_the_first_process_writes_and_the_others_are_silent(work, capfd):
    command = [*PURIFY, "--steps", "3", "--report", "r.json"]
    assert main([*command[:2], "alone.pth", *command[3:-2]]) == 0
    capfd.readouterr()

    def both(rank):
        code = main(command)
        sys.stdout.flush()
        return code

    assert in_processes(2, work, both, group=False) == [0, 0]
    out, _ = capfd.readouterr()
    assert out.count("fine_tune on 60 clean samples") == 1
    alone, shared = load_checkpoint("alone.pth"), load_checkpoint("out.pth")
    assert all(torch.allclose(alone[name].float(), shared[name].float(), atol=1e-5) for name in alone)
    assert '"world": 2' in (work / "r.json").read_text()


@needs_gloo
def test_nothing_is_written_where_a_process_dies(work, capfd, monkeypatch):
    step = _Loop.step

    def dies(self, batch):
        if os.environ.get("RANK") == "1" and self.run.step == 2:
            os._exit(9)
        return step(self, batch)

    monkeypatch.setattr(_Loop, "step", dies)
    assert in_processes(2, work, lambda rank: main([*PURIFY, "--steps", "9"]), group=False) == [6, None]
    assert "a process of the group is gone" in capfd.readouterr().err
    assert not (work / "out.pth").exists()


def test_a_killed_command_goes_on(work, capsys, monkeypatch):
    command = [*PURIFY, "--steps", "5", "--quiet", "--resume", "a.resume", "--resume-every", "0"]
    assert main([*command[:2], "whole.pth", *command[3:-4]]) == 0
    step = _Loop.step

    def dies(self, batch):
        if self.run.step == 3:
            raise RuntimeError("killed")
        return step(self, batch)

    monkeypatch.setattr(_Loop, "step", dies)
    assert main(command) == 1 and (work / "a.resume").exists() and not (work / "out.pth").exists()
    monkeypatch.setattr(_Loop, "step", step)
    capsys.readouterr()
    assert "seed differ" in fails(capsys, 4, *command, "--seed", "1")
    assert main(command) == 0 and not (work / "a.resume").exists()
    whole, out = load_checkpoint("whole.pth"), load_checkpoint("out.pth")
    assert all(torch.equal(whole[name], out[name]) for name in whole)
    capsys.readouterr()
    assert "OUT and --resume are both" in fails(capsys, 2, *command[:-3], "out.pth", "--force")
