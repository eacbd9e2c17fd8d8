"""The backdoors of the network of a thousand classes: two triggers, two targets, a table of the rows. No ImageNet."""

import subprocess
import sys

import torch

from benchmarks import harness
from benchmarks.purification import bench_imagenet_backdoor as bench


def test_the_trigger_of_validation_is_another_one_with_another_target():
    x = torch.rand(4, 3, 128, 128)
    one, two = (bench.attack_of(name, 128) for name in ("patch", "blend"))
    shown = [each[0].trigger(x) - x for each in (one, two)]
    assert one[1] != two[1] and 0 < (shown[0] != 0).float().mean() < 0.03 < (shown[1] != 0).float().mean()


def test_images_become_what_the_network_was_trained_on():
    x = torch.tensor([0.0, 127 / 255, 1.0]).expand(1, 3, 1, 3)
    torch.testing.assert_close(bench.PIXELS.normalise(x)[0, 0, 0], torch.tensor([-127 / 128, 0.0, 1.0]))


def test_without_its_packages_or_images_it_is_skipped(tmp_path):
    command = [sys.executable, "-m", "benchmarks.purification.bench_imagenet_backdoor"]
    done = subprocess.run(
        command, cwd=harness.ROOT, env={"FASTFIP_DATA": str(tmp_path), "PATH": ""}, text=True, capture_output=True
    )
    assert done.returncode == 0 and done.stdout.startswith("skipped: "), done.stderr


def test_the_table_is_that_of_the_rows():
    assert bench.show() in (harness.DOCS / "results.md").read_text()
