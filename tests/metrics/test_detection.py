"""Average precision and attack success of detectors, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from fastfip.attacks.detection.baddet import BadDet
from fastfip.errors import DataError
from fastfip.metrics.detection import average_precision, detection_success, overlap


def boxes(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def found(rows: list[tuple[float, ...]], labels: list[int], scores: list[float]) -> dict[str, torch.Tensor]:
    return {"boxes": boxes(*rows), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}


def target(rows: list[tuple[float, ...]], labels: list[int]) -> dict[str, torch.Tensor]:
    return {"boxes": boxes(*rows), "labels": torch.tensor(labels, dtype=torch.int64)}


A, B, C = (0, 0, 10, 10), (20, 20, 30, 30), (40, 0, 50, 10)


def test_overlap_is_the_intersection_over_the_union() -> None:
    got = overlap(boxes(A, B), boxes((5, 0, 15, 10), B))
    torch.testing.assert_close(got, torch.tensor([[50 / 150, 0.0], [0.0, 1.0]]))


def test_average_precision_of_a_ranking_worked_out_by_hand() -> None:
    targets = [target([A, B], [1, 1]), target([A, C], [1, 2])]
    perfect = [found([A, B], [1, 1], [0.9, 0.8]), found([A, C], [1, 2], [0.7, 0.6])]
    assert average_precision(perfect, targets) == 1.0
    # Class 1, three objects: right, wrong (a second box on the same object), right: precisions 1, -, 2/3 at recalls 1/3
    # and 2/3. Class 2: the only box is elsewhere.
    found_ = [found([A, A], [1, 1], [0.9, 0.8]), found([A, A], [1, 2], [0.7, 0.6])]
    assert average_precision(found_, targets) == pytest.approx((1 / 3 + 2 / 9 + 0) / 2)
    assert average_precision([found([], [], []), found([], [], [])], targets) == 0.0


def test_a_box_takes_the_free_object_that_it_overlaps_most() -> None:
    near = (0, 0, 10, 12)
    targets = [target([A, near], [1, 1])]
    got = average_precision([found([A, near], [1, 1], [0.9, 0.8])], targets)
    assert got == 1.0


@pytest.mark.parametrize("goal", ["global", "regional", "disappearance", "generation"])
def test_success_is_one_for_what_the_attacker_wants_and_none_for_the_truth(goal: str) -> None:
    attack = BadDet(goal, target=1, size=3, box=(12.0, 12.0))  # type: ignore[arg-type]
    images = [torch.rand(3, 48, 60, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    targets = [target([A, B], [1, 2]), target([C], [1]), target([B, C], [2, 3])]
    _, wanted, true = attack.asr_set(images, targets)

    def as_detected(of: list[dict[str, torch.Tensor]], score: float = 0.9) -> list[dict[str, torch.Tensor]]:
        return [{**t, "scores": torch.full((len(t["labels"]),), score)} for t in of]

    assert detection_success(as_detected(wanted), wanted, true) == 1.0
    assert detection_success(as_detected(true), wanted, true) == 0.0
    unsure = detection_success(as_detected(wanted, 0.3), wanted, true)
    assert unsure == (1.0 if goal == "disappearance" else 0.0)


def test_what_cannot_be_measured_is_refused() -> None:
    some = [target([A], [1])]
    with pytest.raises(DataError, match="no object"):
        average_precision([found([], [], [])], [target([], [])])
    with pytest.raises(DataError, match="1 images"):
        average_precision([found([], [], [])], some * 2)
    with pytest.raises(DataError, match="no attack"):
        detection_success([found([A], [1], [0.9])], some, some)
