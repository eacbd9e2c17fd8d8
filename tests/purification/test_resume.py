"""A run that is killed goes on from its file, and ends with the weights of a run that nobody killed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import fastfip
from fastfip.errors import CheckpointError, ConfigError
from fastfip.methods import _gentle
from fastfip.purification.resume import Resume
from fastfip.testing.nets import PointNet
from tests.support.small_nets import conv_net, data

pytestmark = pytest.mark.usefixtures("short_search")

#: Where each method is killed: while it unlearns, and after samples were left out.
KILLED = {
    "fine_tune": (4,),
    "ft_sam": (4,),
    "fip": (3,),
    "fast_fip": (3,),
    "wfip": (7,),
    "fast_wfip": (3, 8),
    "fisher_steps": (2, 8),
}


class Killed(Exception):
    pass


class Kill(fastfip.Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, run, values):
        if run.step == self.step:
            raise Killed


class Noisy(Dataset):
    """Samples that are others each time, drawn from the global generator."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i] + 0.05 * torch.rand_like(self.x[i]), int(self.y[i])


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    model, (x, y) = conv_net(), data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), (x, y)


def purified(given, method="fine_tune", clean=None, **options):
    model, samples = given
    options = {"steps": 10, "batch_size": 12, "progress": False, "force": True, **options}
    return fastfip.purify(model, samples if clean is None else clean, method, **options)


def killed(given, path, step, method="fine_tune", **options):
    with pytest.raises(Killed):
        purified(given, method, callbacks=[Kill(step)], resume=path, resume_every=0, **options)


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def course(result):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in result.history]


@pytest.mark.parametrize("live", [False, True], ids=["in memory", "read anew"])
@pytest.mark.parametrize("method", KILLED)
def test_a_killed_run_ends_with_the_same_weights(method, live, given, tmp_path):
    clean = DataLoader(Noisy(*given[1]), 12) if live else None
    whole = purified(given, method, clean)
    for step in KILLED[method][-1:] if live else KILLED[method]:
        path = tmp_path / f"{step}.resume"
        killed(given, path, step, method, clean=clean)
        went_on = purified(given, method, clean, resume=path)
        assert same(whole, went_on) and course(whole) == course(went_on)
        assert went_on.settings["steps"] == 10 and f"went on from step {step - 1} of a broken run" in went_on.notes
        assert went_on.seconds["total"] >= sum(v for name, v in went_on.seconds.items() if name != "total") - 1e-9
        assert not path.exists()


# Of more than 20 classes, phrases have their turns in a drawn order.
@pytest.mark.parametrize(("classes", "hold"), [(2, 0.0), (22, 0.0), (2, 4.0)])
def test_a_killed_run_on_texts_ends_with_the_same_weights(classes, hold, tmp_path, monkeypatch):
    monkeypatch.setattr("fastfip.worst_case.phrases.SHARPNESS", 0.0)  # each phrase is used, whether it works or not
    torch.manual_seed(0)
    ids = torch.randint(1, 30, (48, 6))
    text = nn.Sequential(nn.Embedding(30, 6), nn.Flatten(), nn.Linear(36, classes)).eval(), (ids, ids[:, 0] % classes)
    monkeypatch.setattr("fastfip.worst_case.phrases.FOUND", 0.0)  # with `hold`, each is written again later
    whole = purified(text, "fisher_steps", hold=hold)
    assert any("reached" in record for record in whole.history)
    assert any("divergence" in record for record in whole.history) == (hold > 0)
    for step in (2, 5):
        path = tmp_path / f"{step}.resume"
        killed(text, path, step, "fisher_steps", hold=hold)
        went_on = purified(text, "fisher_steps", hold=hold, resume=path)
        assert same(whole, went_on) and course(whole) == course(went_on)


@pytest.mark.parametrize("method", ["fisher_steps", "fast_wfip"])
def test_a_killed_run_on_point_clouds_ends_with_the_same_weights(method, tmp_path, monkeypatch):
    """Points at learned places go on from where they were, and clouds in the parts that they went in."""
    monkeypatch.setattr(_gentle, "CLOUD_POINTS", 200)  # ten clouds together
    torch.manual_seed(0)
    x = torch.randn(48, 20, 3) * torch.arange(1, 49)[:, None, None] / 24
    clouds = PointNet(4, (8, 16), 8).eval(), (x, torch.arange(48) % 4)
    whole = purified(clouds, method)
    assert any("reached_by_points" in record for record in whole.history)
    path = tmp_path / "2.resume"
    killed(clouds, path, 2, method)
    went_on = purified(clouds, method, resume=path)
    assert same(whole, went_on) and course(whole) == course(went_on)


def test_it_may_be_killed_again_and_again(given, tmp_path):
    whole, path = purified(given, "fisher_steps", holdout=0.2, select="best"), tmp_path / "a.resume"
    for step in (2, 5, 9):
        killed(given, path, step, "fisher_steps", holdout=0.2, select="best")
    assert same(whole, purified(given, "fisher_steps", holdout=0.2, select="best", resume=path))


@pytest.mark.parametrize(
    "other, word",
    [({"seed": 1}, "seed"), ({"lr": 0.02}, "settings"), ({"method": "ft_sam"}, "method"), ({"model": 1}, "model"),
     ({"clean": 1}, "clean samples")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_file_of_another_run_is_refused(other, word, given, tmp_path):
    path = tmp_path / "a.resume"
    killed(given, path, 4)
    before = path.read_bytes()
    model, (x, y) = given
    if other.pop("model", None):
        model = fastfip.purify(model, (x, y), "fine_tune", steps=1, progress=False).model
    if other.pop("clean", None):
        x = x + 0.01
    with pytest.raises(CheckpointError, match=f"{word}.* differ"):
        purified((model, (x, y)), resume=path, **other)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", "pickle"], ids=["empty", "cut", "pickle"])
def test_what_is_no_such_file_is_refused_and_not_run(content, given, tmp_path):
    path, ran = tmp_path / "a.resume", tmp_path / "ran"
    if content == "pickle":
        torch.save(_Runs(ran), path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is no file of a broken run"):
        purified(given, resume=path)
    assert path.exists() and not ran.exists()


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_methods_that_cannot_say_what_they_keep_are_refused(given, tmp_path):
    with pytest.raises(ConfigError, match="a broken run of fst cannot go on: resume= is for fast_fip"):
        purified(given, "fst", resume=tmp_path / "a.resume")


@pytest.mark.parametrize("path, every", [("", 60), ("missing/a.resume", 60), ("a.resume", -1)])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(path, every, tmp_path):
    with pytest.raises(ConfigError, match="no file can be written there|seconds, 0 or more"):
        Resume(tmp_path / path, every)


def test_a_file_is_written_now_and_then(given, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(Resume, "write", lambda self, loop: written.append(loop.run.step))
    purified(given, resume=Resume(tmp_path / "a.resume", 3600))
    assert written == []
    purified(given, resume=Resume(tmp_path / "a.resume", 0))
    assert written == list(range(1, 10))  # not after the last step: the result is there
