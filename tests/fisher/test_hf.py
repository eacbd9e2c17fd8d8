"""Hugging Face models with tiny random configurations (extra [hf]), in float64 against a loop over samples."""

import pytest
import torch
import torch.nn.functional as F

from fastfip.data import Task
from fastfip.fisher import fisher_diagonal, fisher_trace
from fastfip.testing.definitions import loop_diagonal, loop_trace, worst_error

transformers = pytest.importorskip("transformers", reason="no transformers (pip install fastfip[hf])")

B, T, V = 3, 6, 17
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def tokens():
    return torch.randint(1, V, (B, T))


def classes():
    return torch.randint(0, 3, (B,))


def next_token_loss(z, batch):
    return F.cross_entropy(z[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").sum(1)


def bert():
    config = transformers.BertConfig(vocab_size=V, max_position_embeddings=9, num_labels=3, **SMALL)
    model = transformers.BertForSequenceClassification(config)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, 4:] = 0
    return model, {"input_ids": tokens(), "attention_mask": mask, "labels": classes()}, Task(), {"embeddings"}


def gpt2():
    config = transformers.GPT2Config(vocab_size=V, n_positions=9, n_embd=8, n_layer=2, n_head=2)
    batch = {"input_ids": tokens()}
    task = Task.of(loss=next_token_loss)
    return transformers.GPT2LMHeadModel(config), batch, task, {"wte", "wpe"}


def t5():
    config = transformers.T5Config(
        vocab_size=V, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    batch = {"input_ids": tokens(), "decoder_input_ids": tokens()}

    def loss(z, b):
        return F.cross_entropy(z[:, :-1].transpose(1, 2), b["decoder_input_ids"][:, 1:], reduction="none").sum(1)

    return model, batch, Task.of(loss=loss), {"shared", "relative_attention_bias"}


def llama():
    config = transformers.LlamaConfig(vocab_size=V, max_position_embeddings=9, num_key_value_heads=1, **SMALL)
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens()}, Task.of(loss=next_token_loss), set()


def vit():
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)
    model = transformers.ViTForImageClassification(config)
    return model, {"pixel_values": torch.randn(B, 3, 8, 8), "labels": classes()}, Task(), set()


def swin():
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    model = transformers.SwinForImageClassification(config)
    return (
        model,
        {"pixel_values": torch.randn(B, 3, 16, 16), "labels": classes()},
        Task(),
        {"relative_position_bias_table"},
    )


def detr_like():
    """DETR's encoder and decoder without its downloaded backbone: queries, positions, two heads."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 4, 4)
            self.rows, self.columns = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4, 4))
            self.queries = torch.nn.Embedding(5, 8)
            self.body = torch.nn.Transformer(8, 2, 1, 1, 12, 0.0)
            self.what, self.where = torch.nn.Linear(8, 3), torch.nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            n, _, h, w = x.shape
            place = torch.cat(
                [self.columns[:w, None].expand(w, h, 4).transpose(0, 1), self.rows[:h, None].expand(h, w, 4)], -1
            ).flatten(0, 1)
            asked = self.queries.weight[:, None].expand(5, n, 8)
            out = self.body(place[:, None] + x.flatten(2).permute(2, 0, 1), asked).transpose(0, 1)
            return torch.cat([self.what(out), self.where(out).sigmoid()], -1)

    def loss(z, batch):
        y = batch[1][:, None].expand(-1, 5)
        return F.cross_entropy(z[..., :3].transpose(1, 2), y, reduction="none").sum(1) + z[..., 3:].abs().sum((1, 2))

    return Model(), (torch.randn(B, 3, 16, 16), classes()), Task.of(loss=loss), {"rows", "columns"}


MODELS = [bert, gpt2, t5, llama, vit, swin, detr_like]


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_diagonal_and_trace(make):
    torch.manual_seed(0)
    model, batch, task, slow = make()
    model.double().eval()
    for p in model.parameters():  # away from the zeros and ones of a fresh net
        p.data.add_(torch.randn_like(p), alpha=0.1)

    def doubled(v):
        return v.double() if v.is_floating_point() else v

    batch = {k: doubled(v) for k, v in batch.items()} if isinstance(batch, dict) else tuple(map(doubled, batch))
    got = fisher_diagonal(model, batch, loss=task.loss_hook, forward=task.forward_hook)
    assert worst_error(got, loop_diagonal(model, batch, B, task), 1e-10) < 1e-10
    slower = {k: how for k, how in got.coverage.items() if "loop" in how or "one sample" in how}
    assert not {k: how for k, how in slower.items() if not any(part in k for part in slow)}
    want = loop_trace(model, batch, B, task)
    trace = fisher_trace(model, batch, loss=task.loss_hook, forward=task.forward_hook)
    assert abs(trace - want) <= 1e-10 * want
    params = dict(model.named_parameters())
    mine, theirs = (
        {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(params.items(), grads)}
        for grads in (torch.autograd.grad(v, list(params.values()), allow_unused=True) for v in (trace, want))
    )
    assert worst_error(mine, theirs, 1e-10) < 1e-8
