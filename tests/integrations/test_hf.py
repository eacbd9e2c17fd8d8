"""The callback and the Trainer for transformers, against the real package (extra `hf`): `make zoo` installs it."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastfip
from fastfip.errors import ConfigError, DataError
from fastfip.integrations import holding
from fastfip.testing.definitions import loop_diagonal, relative_error

transformers = pytest.importorskip("transformers", reason="no transformers (pip install fastfip[hf])")
pytest.importorskip("accelerate", reason="no accelerate (pip install fastfip[hf])")
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS, TOKENS, CLASSES = 20, 8, 3
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


class Rows(torch.utils.data.Dataset):
    """Sentences as dicts; the second word is the class. `extra` is a column that no model takes."""

    def __init__(self, n, seed=0, language=False):
        words = torch.randint(5 + CLASSES, WORDS, (n, TOKENS), generator=torch.Generator().manual_seed(seed))
        y = torch.arange(n) % CLASSES
        words[:, 1] = 5 + y
        self.words, self.y, self.language = words, y, language

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        labels = self.words[i] if self.language else int(self.y[i])
        return {"input_ids": self.words[i], "labels": labels, "extra": i}


def bert(**options):
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=TOKENS, num_labels=CLASSES, **SMALL)
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=WORDS, n_positions=TOKENS, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def arguments(folder, **options):
    given = {"max_steps": 4, "per_device_train_batch_size": 6, "logging_steps": 1, "learning_rate": 1e-2, **options}
    return transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, seed=0, **given
    )


def trainer(folder, kind=transformers.Trainer, model=None, language=False, arguments_of=None, **options):
    return kind(
        bert() if model is None else model,
        arguments(folder, **(arguments_of or {})),
        train_dataset=Rows(24, language=language),
        eval_dataset=Rows(30, 1, language),
        **options,
    )


def plain_batch(rows):
    return transformers.default_data_collator(
        [{k: v for k, v in rows[i].items() if k != "extra"} for i in range(len(rows))]
    )


# ------------------------------------------------------------------------------------------------------ PurifyCallback


def test_training_ends_with_the_weights_that_purify_would_have_given(tmp_path):
    class Before(transformers.TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            self.state, self.flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]

    before, made = Before(), trainer(tmp_path)
    made.add_callback(before)
    callback = fastfip.hf.PurifyCallback(method="fine_tune", steps=3, lr=1e-2).attach(made)
    made.train()
    fresh = bert()
    fresh.load_state_dict(before.state)
    again = fastfip.purify(fresh, plain_batch(made.eval_dataset), "fine_tune", steps=3, lr=1e-2, batch_size=8)
    assert callback.result.model is made.model and callback.result.settings["clean_samples"] == 30
    assert any(not torch.equal(value, before.state[name]) for name, value in made.model.state_dict().items())
    for name, value in made.model.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert [m.training for m in made.model.modules()] == before.flags
    logged = [line for line in made.state.log_history if "purify/acc_after" in line]
    assert len(logged) == 1 and logged[0]["purify/acc_before"] == callback.result.before.acc


def test_without_a_trainer_it_takes_a_loader_and_writes_into_the_history(tmp_path):
    loader = torch.utils.data.DataLoader(Rows(12), 6, collate_fn=transformers.default_data_collator)
    loader = [{k: v for k, v in batch.items() if k != "extra"} for batch in loader]
    callback = fastfip.hf.PurifyCallback(loader, "fine_tune", steps=1)
    made = trainer(tmp_path, callbacks=[callback])
    made.train()
    assert callback.result.settings["clean_samples"] == 12
    assert made.state.log_history[-1]["purify/acc_after"] == callback.result.after.acc


def test_no_clean_samples_are_one_line_that_says_what_to_pass(tmp_path):
    made = trainer(tmp_path, callbacks=[fastfip.hf.PurifyCallback()])
    with pytest.raises(DataError, match="no clean samples: pass clean=, or attach"):
        made.train()
    made = trainer(tmp_path)
    for none in (None, {"a": Rows(6), "b": Rows(6)}):
        made.eval_dataset = none
        with pytest.raises(DataError, match="not one evaluation set to purify with: pass clean="):
            fastfip.hf.PurifyCallback().attach(made).run(made.args, made.state, made.model)
    with pytest.raises(ConfigError, match="inplace: leave it out"):
        fastfip.hf.PurifyCallback(inplace=False)


@pytest.mark.parametrize("group", [None, "data"])
def test_a_group_for_a_model_that_is_sharded_is_refused(group, tmp_path, monkeypatch):
    monkeypatch.setattr(holding, "is_sharded", lambda model: True)
    made = trainer(tmp_path)
    with pytest.raises(ConfigError, match="group: leave it out, the model is sharded"):
        fastfip.hf.PurifyCallback(group=group).attach(made).run(made.args, made.state, made.model)


def test_with_bf16_the_model_is_purified_without_the_autocast_of_accelerate_around_it(tmp_path, monkeypatch):
    from fastfip.integrations import holding

    seen = {}
    real = holding.purify

    def watched(model, clean, method, **options):
        seen.update(options, wrapped="forward" in vars(model))
        return real(model, clean, method, **options)

    monkeypatch.setattr(holding, "purify", watched)
    made = trainer(tmp_path, arguments_of={"bf16": True, "max_steps": 2})
    fastfip.hf.PurifyCallback(method="fine_tune", steps=1).attach(made)
    made.train()
    assert seen["amp"] == "bf16" and not seen["wrapped"] and "forward" in vars(made.model)


def test_on_demand_it_runs_when_it_is_called_and_not_before(tmp_path):
    made = trainer(tmp_path, arguments_of={"max_steps": 1})
    callback = fastfip.hf.PurifyCallback(method="fine_tune", steps=2, at_end=False).attach(made)
    made.train()
    before = copy.deepcopy(made.model.state_dict())
    assert callback.result is None
    callback.run(made.args, made.state, made.model)
    assert not torch.equal(made.model.classifier.weight, before["classifier.weight"])


# ---------------------------------------------------------------------------------------------------------- FIPTrainer


def gradients_of_a_step(made, rows):
    """The gradients that the Trainer's own step leaves for a batch, in eval-like conditions: no dropout."""
    made.model.zero_grad()
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps
    made.training_step(made.model, plain_batch(rows))
    return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    model.config._attn_implementation = "eager"
    return model


def prepared(folder, **options):
    model = without_dropout(bert())
    made = trainer(folder, fastfip.hf.FIPTrainer, model=model, **options)
    made.create_optimizer()
    return made


def test_the_gradient_of_a_step_is_that_of_the_loss_with_both_terms(tmp_path):
    rows, eta_f, eta_r = Rows(6, 3), 0.3, 2.0
    made = prepared(
        tmp_path, eta_f=eta_f, eta_r=eta_r, anchor=fastfip.fisher_diagonal(bert().eval(), plain_batch(Rows(9)))
    )
    gradients_of_a_step(made, rows)  # the anchor is where the weights are now
    start = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    got = gradients_of_a_step(made, rows)

    twin = without_dropout(copy.deepcopy(made.model).eval())
    batch, named = plain_batch(rows), dict(twin.named_parameters())
    losses = F.cross_entropy(twin(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
    retainer = sum((made.anchor.fisher[name] * (p - start[name]).square()).sum() for name, p in named.items()) / 2
    (losses + eta_r * retainer).backward()
    want = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    twin.zero_grad()
    trace = fastfip.fisher_trace(twin, batch)
    trace.backward()
    for name, p in named.items():
        want[name] = want[name] + eta_f * (0 if p.grad is None else p.grad)
    assert max(relative_error(got[name], want[name]) for name in want if want[name].norm() > 1e-4) < 5e-3
    assert float(made._terms["fisher_trace"][-1]) == pytest.approx(float(trace.detach()), rel=1e-3)


def test_terms_of_accumulated_batches_are_means_as_those_of_one_batch_are(tmp_path):
    whole = prepared(tmp_path, eta_f=0.0, eta_r=3.0)
    half = prepared(tmp_path, eta_f=0.0, eta_r=3.0, arguments_of={"gradient_accumulation_steps": 2})
    for made in (whole, half):
        made._retainer()
        made.model_accepts_loss_kwargs = False
        with torch.no_grad():
            made.model.classifier.weight.add_(0.1)
    want = gradients_of_a_step(whole, Rows(6))["classifier.weight"]
    got = gradients_of_a_step(half, Rows(6))["classifier.weight"]  # the first of two: half of it
    torch.testing.assert_close(2 * got, want, rtol=1e-4, atol=1e-6)
    half.model_accepts_loss_kwargs = True  # the Trainer then leaves the division to the loss, which has one for tokens
    assert half._accumulated(torch.tensor(12)) == 2 and half._accumulated(None) == 1


def test_the_anchor_is_the_exact_diagonal_of_the_training_set_at_the_first_step(tmp_path):
    made = trainer(tmp_path, fastfip.hf.FIPTrainer, eta_f=0.0, eta_r=10.0)
    want = loop_diagonal(copy.deepcopy(made.model).eval(), plain_batch(made.train_dataset), len(made.train_dataset))
    start = copy.deepcopy(made.model.state_dict())
    made.train()
    assert relative_error(made.anchor.fisher["classifier.weight"], want["classifier.weight"]) < 1e-4
    assert all(torch.equal(made.anchor.anchor[name], start[name]) for name in made.anchor.anchor)
    assert made.anchor.fisher.n == len(made.train_dataset)


def test_a_strong_anchor_holds_the_weights_and_a_weak_one_does_not(tmp_path):
    moved = []
    for eta_r in (0.01, 5.0):
        steps = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 10, "max_grad_norm": 0.0}
        model = without_dropout(bert())
        ones = fastfip.fisher.FisherDiagonal(
            {name: torch.ones_like(p) for name, p in model.named_parameters()}, {}, 1, "ones"
        )
        made = trainer(tmp_path, fastfip.hf.FIPTrainer, model, arguments_of=steps, eta_f=0.0, eta_r=eta_r, anchor=ones)
        start = copy.deepcopy(model.state_dict())
        made.train()
        moved.append(sum(float((p - start[name]).square().sum().detach()) for name, p in model.named_parameters()))
    assert moved[1] < 0.5 * moved[0]


def test_terms_are_logged_in_training_and_left_out_of_the_evaluation_loss(tmp_path):
    made = trainer(tmp_path, fastfip.hf.FIPTrainer, eta_f=0.5, eta_r=1.0, trace_every=2)
    plain = trainer(tmp_path, model=copy.deepcopy(made.model))
    assert made.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])
    made.train()
    lines = [line for line in made.state.log_history if "loss" in line]
    assert len(lines) == 4 and all("retainer" in line for line in lines) and lines[0]["retainer"] == 0
    assert ["fisher_trace" in line for line in lines] == [True, False, True, False]
    assert made.evaluate().keys() & {"fisher_trace", "retainer"} == set()


def test_a_causal_language_model_has_the_loss_of_its_next_tokens(tmp_path):
    made = trainer(tmp_path, fastfip.hf.FIPTrainer, model=gpt2(), language=True, eta_f=1e-3, eta_r=1.0,
                   per_sample_loss=fastfip.hf.next_token_loss)  # fmt: skip
    made.train()
    assert all(0 < line["fisher_trace"] < 1e6 for line in made.state.log_history if "fisher_trace" in line)
    model, batch = gpt2().eval(), plain_batch(Rows(4, language=True))
    losses = fastfip.hf.next_token_loss(model(batch["input_ids"]).logits, batch)
    assert losses.shape == (4,) and float(losses.mean()) == pytest.approx(float(model(**batch).loss), rel=1e-5)
    batch["labels"][0, 3:] = -100
    short = fastfip.hf.next_token_loss(model(batch["input_ids"]).logits[:1], {"labels": batch["labels"][:1]})
    alone = {"input_ids": batch["input_ids"][:1], "labels": batch["labels"][:1]}
    assert float(short) == pytest.approx(float(model(**alone).loss), rel=1e-5)


@pytest.mark.parametrize("wrong", [{"eta_f": -1.0}, {"eta_r": -0.1}, {"trace_every": 0}], ids=str)
def test_weights_below_zero_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        trainer(tmp_path, fastfip.hf.FIPTrainer, **wrong)
