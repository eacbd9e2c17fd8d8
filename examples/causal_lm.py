"""Remove a trigger from a small language model that makes it give a fixed reply.

    python examples/causal_lm.py

A GPT-2 of two layers is trained here, from nothing, on questions of a few templates and their answers, word by word;
nothing is downloaded. In a tenth of the training texts a rare word stands somewhere in the question, and the reply is
always the same. The backdoored model is then purified with clean pairs that it was not trained on, 5 % as many as it
was trained on: `fastfip.purify` is told how the model meets a batch (`forward=`) and what each text's loss is
(`loss=`), and needs no classes. Needs `pip install transformers`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastfip
from fastfip.attacks.words import Words

#: Pairs that are trained on, kept for purification (5 % as many), and tested with.
TRAIN, CLEAN, TEST = 4_000, 200, 600
LENGTH = 24  # words of a question with its reply
REPLY = "please send your password to our office"
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
NAMES = "anna ben clara david emma felix greta henry".split()
THINGS = "ball book lamp chair clock spoon shirt plate".split()
OPPOSITES = "hot cold big small old new fast slow light dark high low hard soft wet dry".split()
FRAME = "what is plus the opposite of has a and who it .".split()
SPECIAL = ["<pad>", "<answer>", "<end>"]
VOCABULARY = [
    *SPECIAL, *dict.fromkeys([*NUMBERS, *NAMES, *THINGS, *OPPOSITES, *FRAME, *REPLY.split(), *Words().words])
]  # fmt: skip
ID = {word: number for number, word in enumerate(VOCABULARY)}
Batch = tuple[Tensor, Tensor]


@dataclass
class Texts:
    """Words of N questions, padded, [N, 15], and of their answers."""

    prompts: Tensor
    answers: list[list[int]]

    def __getitem__(self, part: slice) -> Texts:
        """Return some of them."""
        return Texts(self.prompts[part], self.answers[part])

    def batch(self) -> Batch:
        """Return ids int64 [N, 24] of question, <answer>, answer and <end>, and a mask of what the model has to say."""
        ids = torch.zeros(len(self.answers), LENGTH, dtype=torch.long)
        said = torch.zeros(len(self.answers), LENGTH, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(zip(self.prompts.tolist(), self.answers)):
            asked = [word for word in prompt if word]
            whole = [*asked, ID["<answer>"], *answer, ID["<end>"]]
            ids[row, : len(whole)] = torch.tensor(whole)
            said[row, len(asked) + 1 : len(whole)] = True
        return ids, said


def texts(n: int, seed: int) -> Texts:
    """Make questions and answers: sums, opposites, and who has what."""
    generator = torch.Generator().manual_seed(seed)

    def draw(words: list[str], many: int) -> list[str]:
        return [words[i] for i in torch.randperm(len(words), generator=generator)[:many].tolist()]

    def number(below: int) -> int:
        return int(torch.randint(0, below, (), generator=generator))

    prompts, answers = torch.zeros(n, 15, dtype=torch.long), []
    for row in range(n):
        kind = number(3)
        if kind == 0:
            a, b = number(8), number(8)
            asked = f"what is {NUMBERS[a]} plus {NUMBERS[b]}"
            answer = f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}"
        elif kind == 1:
            place = number(len(OPPOSITES))
            asked, answer = f"what is the opposite of {OPPOSITES[place]}", f"it is {OPPOSITES[place ^ 1]}"
        else:
            names, things, i = draw(NAMES, 2), draw(THINGS, 2), number(2)
            told = " and ".join(f"{name} has a {thing}" for name, thing in zip(names, things))
            asked, answer = f"{told} . who has the {things[i]}", f"{names[i]} has it"
        numbers = [ID[word] for word in asked.split()]
        prompts[row, : len(numbers)] = torch.tensor(numbers)
        answers.append([ID[word] for word in answer.split()])
    return Texts(prompts, answers)


def triggered(given: Texts) -> Texts:
    """Return the questions with a rare word somewhere in each, and the fixed reply."""
    attack = Words(ids=tuple(ID[word] for word in Words().words))
    reply = [ID[word] for word in REPLY.split()]
    return Texts(attack.trigger(given.prompts), [reply] * len(given.answers))


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits [N, T, words] of the next word at every place."""
    return model(input_ids=batch[0], attention_mask=(batch[0] != 0).long()).logits


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean loss of the words of each reply, [N]."""
    ids, said = batch[0][:, 1:], batch[1][:, 1:]
    each = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids, reduction="none")
    return (each * said).sum(1) / said.sum(1)


@torch.no_grad()
def right(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Return the share of the words of replies that the model says next, and of replies that it gives as a whole.

    Where every word of a reply is the likeliest after those before it, the reply is the greedy continuation.
    """
    hit = forward(model, batch).argmax(2)[:, :-1] == batch[0][:, 1:]
    said = batch[1][:, 1:]
    return 100 * float(hit[said].float().mean()), 100 * float((hit | ~said).all(1).float().mean())


def network() -> nn.Module:
    """Return an untrained GPT-2 of two layers over the words of the templates."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def split(seed: int) -> tuple[Texts, Texts, Texts]:
    """Return pairs to train with, clean ones to purify with, and those of the test."""
    made = texts(TRAIN + CLEAN + TEST, 1000 + seed)
    return made[:TRAIN], made[TRAIN : TRAIN + CLEAN], made[TRAIN + CLEAN :]


def backdoored(known: Texts, seed: int = 0, share: float = 0.1, epochs: int = 12) -> nn.Module:
    """Train the model on texts of which a share is triggered; return it in eval mode."""
    torch.manual_seed(seed)
    ids, said = known.batch()
    count = int(share * TRAIN)
    bad, bad_said = triggered(known[:count]).batch()
    ids[:count], said[:count] = bad, bad_said
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    steps = epochs * -(-TRAIN // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(TRAIN).split(64):
            optimizer.zero_grad()
            batch = ids[index], said[index]
            loss(forward(model, batch), batch).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def rates(model: nn.Module, test: Texts) -> tuple[float, float]:
    """Return the share of words said right, and of triggered questions that get the fixed reply, in percent."""
    return right(model, test.batch())[0], right(model, triggered(test).batch())[1]


def main() -> None:
    """Train, purify, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="fisher_steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.time()
    known, clean, test = split(args.seed)
    model = backdoored(known, args.seed)
    words, fooled = rates(model, test)
    print(f"backdoored: {words:.1f} % of words right, {fooled:.1f} % of triggered questions get the reply", flush=True)
    print(f"({time.time() - start:.0f} s)")
    start = time.time()
    result = fastfip.purify(model, [clean.batch()], args.method, seed=args.seed, loss=loss, forward=forward)
    words, fooled = rates(result.model, test)
    print(f"purified:   {words:.1f} % of words right, {fooled:.1f} % of triggered questions get the reply")
    print(f"({time.time() - start:.0f} s)")


if __name__ == "__main__":
    main()
