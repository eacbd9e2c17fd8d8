"""The settings of all methods of the package, for type checkers: what `fastfip.purify` takes by name.

tests/test_typing.py compares them with the methods' configs. A method of another package has settings of its own, which
a type checker cannot know of: `config={...}` takes them.
"""

from __future__ import annotations

from typing import Literal, TypedDict

__all__ = ["Overrides"]


class Overrides(TypedDict, total=False):
    """Name and type of every setting but `steps` and `epochs`, which `purify` has itself."""

    adversarial_weight: float
    affine: bool
    alpha: float | None
    augment: Literal["none", "crop", "crop_flip"]
    back: float
    batch_size: int | None
    beta_adversarial: float
    beta_shared: float
    bn_mode: Literal["train", "eval", "freeze"]
    budget: float
    c: float
    cache: str | None
    changes: float
    clean_weight: float
    cycle: int
    damping: float | None
    decay: float
    delta_lr: float
    drop: float
    drop_every: float
    dropout: bool
    epsilon: float
    eta: float
    eta_f: float
    eta_r: float
    every: int
    first: float
    floor: float
    gamma: float
    grad_clip: float | None
    high: float | tuple[float, ...] | None
    hold: float
    holdout: float
    inner: int | None
    inner_step: float
    keep: float
    kl: float
    kl_clip: float | None
    label_smoothing: float | None
    labels: Literal["predicted", "given"]
    layer: str | None
    layers: Literal["auto", "conv", "all"]
    length: float | None
    low: float | tuple[float, ...] | None
    lr: float
    lr_end: float
    lr_first: float
    lr_second: float
    masks: Literal["auto", "norm", "channels"]
    mirror: bool
    mixup: float
    momentum: float
    optimizer: Literal["sgd", "adam"] | Literal["sgd"]
    patience: int | None
    peak: float
    radius: float
    radius_factor: float
    rank: float | int | None
    rho: float | None
    ridge: float
    samples: int
    schedule: Literal["constant", "cosine"] | Literal["constant"]
    scout: float
    select: Literal["best", "last"]
    share: float
    shared_weight: float
    sieve: float
    soften: float
    solver: Literal["exact", "kronecker"] | Literal["fixed_point", "conjugate_gradient"]
    start: Literal["max", "min", "zero", "random"]
    states: float
    suspects: float
    tau: float | None
    terms: int
    threshold: float | None
    tolerance: float
    trace_every: int
    trace_way: Literal["auto", "exact", "perturb", "signs"] | Literal["auto", "exact"]
    trust: float | None
    u: float
    unlearn: float
    views: int
    warmup: float
    weight: float
    weight_decay: float
