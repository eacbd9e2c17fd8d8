"""What the report of an audit says beside the figures: pictures, what could not be known, how to repeat it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastfip.reporting.document import as_document
from fastfip.reporting.pictures import as_png, of_change

if TYPE_CHECKING:
    from fastfip.auditing.result import Audit, NetAudit

__all__ = ["document_of"]

#: Classes that have a picture, those first that stand out most.
MOST_PICTURES = 5


def document_of(audit: Audit) -> dict[str, Any]:
    """Return the report of an audit as plain values."""
    values = audit.to_dict()
    for net in audit.nets:
        values[net.name]["words"] = net.words()
        values[net.name]["pictures"] = _pictures(net)
    values["purified"] = values.get("purified")
    values.update(
        received=values["received"],
        model={**audit.origin.to_dict(), "images": audit.settings.get("images")},
        advice=_advice(audit),
        unknown=_unknown(audit),
        repeat=audit.origin.command or _call(audit),
    )
    alerts = [net.words() for net in audit.nets if net.verdict == "flagged"]
    alerts += ["interrupted: only the searches that were complete are here"] if audit.interrupted else []
    title = f"{', '.join(f'{net.name} model: {net.verdict}' for net in audit.nets)}"
    return as_document("audit", title, alerts, values)


def _pictures(net: NetAudit) -> list[dict[str, Any]]:
    """Return the changes of the classes that stand out most in each form, as PNG with their figures."""
    out = []
    for form, ranking in net.anomaly.items():
        one = net.inverted[form]
        labels = one.classes.tolist()
        for place, c in enumerate(ranking.classes[:MOST_PICTURES]):
            k = labels.index(c)
            picture, bound = of_change((one.moved[k] - one.base).float().cpu().numpy())
            out.append(
                {
                    "form": form,
                    "label": c,
                    "size": float(one.size[k]),
                    "reached": bool(one.reached[k]),
                    "success": float(one.success[k]),
                    "index": ranking.index[place] if place < len(ranking.index) else None,
                    "transfer": net.transfer[form][k] if form in net.transfer else None,
                    "bound": bound,
                    "colour": picture.ndim == 3,
                    "png": as_png(picture, change=True),
                }
            )
    return out


def _advice(audit: Audit) -> list[str]:
    """Return what to do next, by the verdict on the last model."""
    last = audit.nets[-1]
    if last.verdict == "flagged":
        return [
            "Do not use this model as it is. Look at the picture of the flagged class, and purify the model (fastfip "
            "purify). If it was purified already, purify it with other settings, more clean samples or another method."
        ]
    if last.verdict == "cannot tell":
        return [
            "The model may have a backdoor. Give more clean samples and search all classes, with more steps. If that "
            "does not help, purify the model and compare its accuracy before and after."
        ]
    return ["No class stands out in these forms. If the model comes from strangers, purify it all the same."]


def _unknown(audit: Audit) -> list[str]:
    from fastfip.auditing.result import CAVEAT

    out = [CAVEAT]
    for net in audit.nets:
        if net.verdict == "cannot tell":
            whys = dict.fromkeys(ranking.why_not for ranking in net.anomaly.values() if ranking.why_not)
            because = f" ({'; '.join(whys)})" if whys else ""
            out.append(
                f"Whether the {net.name} model has a backdoor: this audit cannot tell{because}. Assume that the model "
                "may have one: purify it, and audit the result."
            )
        elif net.verdict == "nothing stands out":
            out.append(
                f"Whether the {net.name} model is clean: nothing stands out among patches and additive patterns. "
                "Triggers that warp or recolour the image, or differ from image to image, were not searched for."
            )
    if audit.retuning is None:
        out.append(
            "Whether a backdoor would come back after tuning on a few poisoned samples: no such samples were given "
            "(poisoned=, --poisoned)."
        )
    return out


def _call(audit: Audit) -> str:
    """Return the call in Python that does it again."""
    more = [
        f"{name}={audit.settings[name]!r}" for name in ("reach", "steps", "samples", "seed") if name in audit.settings
    ]
    other = ["purified=purified"] if audit.purified is not None else []
    other += ["poisoned=poisoned"] if audit.retuning is not None else []
    return f"found = fastfip.audit({', '.join(['model', 'clean_loader', *other, *more])})"
