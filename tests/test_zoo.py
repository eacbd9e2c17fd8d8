"""Every public function on models as people write them: right, or one line that names problem and remedy."""

import pytest
import torch

import fastfip
from fastfip.errors import FastFIPError
from tests.support.small_nets import same, values
from tests.support.zoo import ZOO, Animal, ViT, lora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def made(animal: Animal):
    if animal.make is lora:
        pytest.importorskip("peft", reason="peft is not installed: make zoo installs it")
    torch.manual_seed(0)
    return animal.make().eval()


def reached(animal: Animal, model, x, y):
    """The accuracy, by hand."""
    out = model(x)
    if animal.name.startswith("one logit"):
        return float(((out.view(-1) > 0) == y.bool()).float().mean())
    if animal.name == "several labels":
        return float(((out > 0) == y.bool()).float().mean())
    return float((out.argmax(1) == y).float().mean())


@pytest.mark.parametrize("method", ["fine_tune", "fast_wfip", "fisher_steps"])
@pytest.mark.parametrize("animal", ZOO, ids=str)
def test_purify(animal, method):
    model, (x, y) = made(animal), animal.data()
    before = values(model)
    result = fastfip.purify(
        model, (x, y), method, steps=3, weight_decay=0.0, progress=False, test_loader=[(x, y)], **animal.hooks
    )
    after = result.state_dict()
    assert same(values(model), before) and list(after) == list(before)
    assert all(bool(torch.isfinite(v).all()) for v in after.values()) and not same(after, before)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(animal.still or "-"))
    assert not result.alerts  # tokens and tasks without classes have a worst case as well
    coverage = result.coverage
    assert set(coverage.tuned) | set(coverage.left) == {name for name, _ in model.named_parameters()}
    # Tables and what is added are no maps; a bias before a BatchNorm and a step before the first have no gradient.
    excused = ("hh_l1_reverse", "features.0.bias", "features.5.bias", "down.0.bias")
    excused += ("wte", "wpe", "cls_token", "pos_embed") if method == "fast_wfip" else ()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    rest = [name for name in coverage.left if name not in frozen and not any(word in name for word in excused)]
    assert not rest
    if animal.classes:
        with torch.no_grad():
            assert result.after.acc == pytest.approx(reached(animal, result.model.eval(), x, y))


@pytest.mark.parametrize("animal", ZOO, ids=str)
def test_evaluate(animal):
    model, (x, y) = made(animal), animal.data()
    before = values(model)
    measured = fastfip.evaluate(model, [(x, y)], **animal.hooks)
    assert same(values(model), before) and measured.loss is not None and measured.n == len(x)
    if animal.name == "u-net":
        assert measured.acc is None
    else:
        with torch.no_grad():
            assert measured.acc == pytest.approx(reached(animal, model, x, y))


@pytest.mark.parametrize("animal", ZOO, ids=str)
def test_audit(animal):
    model, (x, y) = made(animal), animal.data()
    before = values(model)
    forward = {k: v for k, v in animal.hooks.items() if k == "forward"}
    try:
        found = fastfip.audit(model, (x, y), steps=2, **forward)
        assert found.table().rows or (animal.unsearched and "no changes were looked for" in str(found))
    except FastFIPError as error:
        assert animal.unsearched or "one logit" in animal.name, error
        assert "\n" not in str(error) and ":" in str(error)
    assert same(values(model), before)


@pytest.mark.usefixtures("one_short_search")
@pytest.mark.parametrize("animal", ZOO, ids=str)
def test_compare(animal):
    model, (x, y) = made(animal), animal.data()
    before = values(model)
    methods = [("fine_tune", {"steps": 2}), ("fast_wfip", {"steps": 2})]
    rows = fastfip.compare(model, (x, y), methods, test_loader=[(x, y)], progress=False, **animal.hooks).rows
    assert same(values(model), before) and [row.error for row in rows] == [""] * 3
    assert (rows[0].test_acc is None) == (animal.name == "u-net")


def test_a_lora_model_keeps_its_purification_when_it_is_saved(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: make zoo installs it")
    animal = next(animal for animal in ZOO if animal.make is lora)
    model, (x, y) = made(animal), animal.data()
    result = fastfip.purify(model, (x, y), steps=3, progress=False)
    result.model.save_pretrained(tmp_path)
    torch.manual_seed(0)  # the same base as in `made`
    again = peft.PeftModel.from_pretrained(ViT(), tmp_path)
    with torch.no_grad():
        assert not torch.equal(result.model(x), model(x))
        torch.testing.assert_close(again.eval()(x), result.model.eval()(x), rtol=0, atol=0)
    with pytest.raises(FastFIPError, match=r"is_trainable=True.*merge_and_unload"):
        fastfip.purify(again, (x, y), steps=3, progress=False)
