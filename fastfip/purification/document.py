"""What the report of a purification says beside the figures: classes, pictures, what could not be known, the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastfip.metrics.evaluation import FEW, Evaluation, wilson
from fastfip.reporting.document import as_document
from fastfip.reporting.pictures import as_png

if TYPE_CHECKING:
    from fastfip.purification.result import PurifyResult

__all__ = ["document_of"]

#: Shares of clean accuracy lost, and of triggered samples that still go to the attack's class, that ask for advice.
WORRYING_LOSS, BAD_LOSS, STILL_THERE = 0.05, 0.2, 0.1


def document_of(result: PurifyResult) -> dict[str, Any]:
    """Return the report of a purification as plain values."""
    values = result.to_dict()
    for side in ("before", "after"):
        values[side]["intervals"] = _intervals(getattr(result, side))
    values.update(
        received=_received(result),
        classes=_classes(result),
        found=_found(result),
        advice=_advice(result),
        unknown=_unknown(result),
        repeat=result.origin.command or _call(result),
    )
    return as_document("purify", result.title, result.alerts, values)


def _intervals(measured: Evaluation) -> dict[str, Any]:
    return {name: around for name in ("acc", "asr", "ra") if (around := measured.interval(name)) is not None}


def _received(result: PurifyResult) -> dict[str, Any]:
    state = {name: list(value.shape) for name, value in result.model.state_dict().items() if hasattr(value, "shape")}
    return {
        **result.origin.to_dict(),
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "shapes": state,
        "classes": result.settings.get("classes"),
        "inputs": result.settings.get("inputs") or None,
        "images": result.settings.get("images"),
    }


def _classes(result: PurifyResult) -> list[dict[str, Any]]:
    """Return for each class how often it was answered rightly before and after, where both were counted alike."""
    names = (result.settings.get("images") or {}).get("classes") or []
    after = {label: (right, n) for label, right, n in result.after.per_class}
    rows = []
    for label, right, n in result.before.per_class:
        if after.get(label, (0, 0))[1] != n:
            continue
        shares = right / n, after[label][0] / n
        around = [wilson(share, n) for share in shares]
        rows.append(
            {
                "label": label,
                "name": names[label] if label < len(names) else None,
                "samples": n,
                "before": shares[0],
                "after": shares[1],
                "before_interval": around[0],
                "after_interval": around[1],
                "apart": around[0][0] > around[1][1] or around[1][0] > around[0][1],
            }
        )
    return rows


def _found(result: PurifyResult) -> dict[str, Any]:
    """Return what the method found, its pictures as PNG."""
    out: dict[str, Any] = {"searched": "search" in result.seconds, "changes": [], "left_out": [], "change_size": None}
    changes, left = result.found.get("changes"), result.found.get("left_out")
    if changes is not None:
        out["change_size"] = changes["size"]
        out["changes"] = [
            {
                "label": label,
                "success": success,
                "bound": bound,
                "colour": picture.ndim == 3,
                "png": as_png(picture, change=True),
            }
            for label, success, bound, picture in zip(
                changes["classes"], changes["success"], changes["bound"], changes["pictures"]
            )
        ]
    if left is not None:
        out["left_out"] = [
            {"label": label, "png": as_png(picture)} for label, picture in zip(left["labels"], left["pictures"])
        ]
    return out


def _advice(result: PurifyResult) -> list[str]:
    """Return what to do next, from the figures alone."""
    before, after = result.before, result.after
    lost = None if before.acc is None or after.acc is None else before.acc - after.acc
    if result.unchanged:
        return ["The model is as it was: nothing was moved. Read the line above and try again before you use it."]
    out = []
    if result.diverged or (lost is not None and lost > BAD_LOSS):
        out.append(
            "Do not use this model as it is. Try a smaller step size (lr), more clean samples, or another method; "
            "check that the images are scaled as the model expects."
        )
    elif lost is not None and lost > WORRYING_LOSS:
        out.append("Accuracy fell by more than 5 points: try a smaller step size (lr) or more clean samples.")
    if after.asr is None:
        out.append(
            "Audit the purified model (fastfip audit IN --purified OUT): the class that a backdoor leads to should "
            "need as large a change as the others."
        )
    elif after.asr > STILL_THERE:
        out.append(
            f"The backdoor is still there: {100 * after.asr:.1f} % of triggered samples go to the attack's class. Try "
            "more steps, more clean samples, or other methods side by side (fastfip compare)."
        )
    elif not out:
        out.append(
            "By these figures the attack that was measured is gone. Audit the model for others before you use it."
        )
    return out


def _unknown(result: PurifyResult) -> list[str]:
    before, after = result.before, result.after
    out = [
        "Whether the model is clean: there is no certificate. A backdoor that nobody has triggered samples of can be "
        "looked for and unlearned, but its absence cannot be shown."
    ]
    if after.asr is None and before.asr is None:
        out.append(
            "Whether the backdoor is gone: no triggered samples were given, so the attack success rate was not "
            "measured. An audit of the purified model (fastfip audit) looks for what is left of it."
        )
    else:
        out.append("Whether triggers other than the one that was measured are gone as well.")
    if after.acc is None:
        out.append("The accuracy on clean samples: it was not measured.")
    elif after.on != "test_loader":
        out.append(
            f"The accuracy on new samples: it was measured on the {after.on}. Give test samples (test_loader=, "
            "--test-data) to know it."
        )
    if after.acc is not None and after.n < FEW:
        low, high = after.interval("acc") or (0.0, 1.0)
        out.append(
            f"The accuracy to within a point: it rests on {after.n} samples, and anything from {100 * low:.1f} to "
            f"{100 * high:.1f} % fits what they show."
        )
    return out


def _call(result: PurifyResult) -> str:
    """Return the call in Python that does it again."""
    from fastfip.methods import get, names

    config = dict(result.settings.get("config") or {})
    if result.method in names():
        usual = get(result.method).Config().to_dict()
        chosen = result.settings.get("chosen", ())
        config = {name: value for name, value in config.items() if usual.get(name) != value or name in chosen}
    parts = ["model", "clean_loader", repr(result.method)]
    parts += [
        f"{name}={result.settings[name]!r}"
        for name in ("seed", "amp", "micro_batch", "gradient_checkpointing")
        if result.settings.get(name)
    ]
    parts += [f"{name}={text}" for name, text in result.settings.get("arguments", {}).items()]
    parts += ["test_loader=test"] if result.after.on == "test_loader" and result.after.acc is not None else []
    parts += ["asr_loader=triggered"] if result.after.asr is not None else []
    parts += [f"config={config!r}"] if config else []
    return f"result = fastfip.purify({', '.join(parts)})"
