"""Stand-ins for clean samples where there are none: drawn images that suit a model's BatchNorm statistics.

BatchNorm's running statistics tell what the training images did to each layer. DeepInversion (Yin et al., CVPR 2020,
arXiv 1912.08795) moves every pixel until a batch has these statistics and the wanted labels; such images are
adversarial examples as well, and a model tuned on them forgets its task. Here only the scale of each channel is
fitted, of images that look like something (`dead_leaves`), and the labels are the model's own answers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastfip.data.leaves import dead_leaves
from fastfip.data.task import Forward, Task
from fastfip.errors import ConfigError, FastFIPError, ModelError, reason
from fastfip.nets.checks import check_seed
from fastfip.nets.state import eval_mode, requires_grad

__all__ = ["input_shape_of", "norms_of", "stand_in_images", "statistics_distance"]

#: So many images are drawn for each one that is kept: rare answers are looked for.
DRAWN = 3
#: Images in a batch, and pixels of all channels at most.
BATCH, MOST_NUMBERS = 250, 1 << 24
#: Steps of the fit of the scale, images in each, and their largest step of Adam.
FIT_STEPS, FIT_BATCH, FIT_LR = 40, 48, 0.12
#: Standard deviations that the fit may begin with, and means over them.
DEVIATIONS, RATIOS = (0.02, 0.08, 0.25, 1.0, 4.0, 16.0, 64.0), (0.0, 2.0)
#: The first norm sees the images nearly as they are; the others count by so much together with it.
LATER = 0.1
#: Sides of square images that are tried where nothing says what a model takes.
SIDES = (16, 24, 28, 32, 48, 64, 96, 128, 160, 192, 224, 256, 299, 384)


def stand_in_images(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    samples: int = 1500,
    *,
    seed: int = 0,
    forward: Forward | None = None,
) -> tuple[Tensor, Tensor]:
    """Return images that were drawn, not taken, in the scale that a model expects, and its answers as their labels.

    Mean and standard deviation of each channel are those at which the statistics of the images in the model's BatchNorm
    layers come nearest to the running ones (`statistics_distance`). Three times as many images are drawn as are
    returned, and those kept whose answers are rarest; classes that are never answered are missing. The model is left
    as it is, to the bit, and so is the global random state.

    Args:
        model: a classifier of images with BatchNorm layers that keep running statistics.
        input_shape: (channels, height, width) of its inputs.
        samples: how many images are returned.
        seed: of everything random.
        forward: `forward(model, batch) -> logits` of batches `(x,)`, for models of another form.

    Returns:
        x [samples, channels, height, width], with dtype and device of the model, and y [samples] (int64), in a random
        order.

    Raises:
        ModelError: the model has no BatchNorm with running statistics, or gives no logits [N, C].
        ConfigError: `input_shape` or `samples` cannot be, or the model does not take images of that shape.
    """
    shape, generator = _checked(input_shape), torch.Generator(device="cpu").manual_seed(check_seed(seed))
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ConfigError(f"samples={samples!r}: give a whole number, 2 or more")
    if not norms_of(model):
        raise ModelError(
            "without data there is only BatchNorm to tell what a model's inputs are like, and this one has none with "
            "running statistics: give clean samples, e.g. purify(model, (x, y)); a few for each class are enough"
        )
    task = Task.of(forward)
    size = max(2, min(BATCH, MOST_NUMBERS // math.prod(shape)))
    with torch.inference_mode(False), torch.enable_grad(), eval_mode(model), requires_grad(model.parameters(), False):
        drawn = dead_leaves(min(size, DRAWN * samples), shape, generator)
        middle, spread = drawn.mean((0, 2, 3), keepdim=True), drawn.std((0, 2, 3), keepdim=True).clamp_min(1e-3)
        low, span = _fitted(model, task, (drawn - middle) / spread, generator)
        x, y = drawn[:0], torch.empty(0, dtype=torch.int64, device="cpu")
        left = DRAWN * samples
        while left > 0:
            if len(x):
                drawn = dead_leaves(min(size, left), shape, generator)
            left -= len(drawn)
            images = (drawn - middle) / spread * span + low
            x, y = _rarest(torch.cat([x, images]), torch.cat([y, _answers(model, task, images)]), samples)
    order = torch.randperm(len(x), generator=generator, device="cpu")
    return _as_input(model, x[order]), y[order].to(_like(model).device)


def statistics_distance(model: nn.Module, x: Tensor, task: Task | None = None) -> Tensor:
    """Return how far the statistics of a batch are from the running ones: [L], for each BatchNorm that it meets.

    Mean over the channels of the Kullback-Leibler divergence between normal distributions with the batch's mean and
    variance and with the running ones, in nats: ((v + (m - m_run)^2) / v_run - 1 - ln(v / v_run)) / 2. It does not
    depend on the units of the inputs.

    Args:
        model: in eval mode.
        x: images [N, channels, height, width].
        task: how the model meets a batch `(x,)`; None: `model(x)`.
    """
    found: list[Tensor] = []
    with _watched(model, found):
        (task or Task()).forward(model, (x,))
    return torch.stack(found)


@contextlib.contextmanager
def _watched(model: nn.Module, found: list[Tensor]) -> Iterator[None]:
    def watch(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
        seen = inputs[0].float()
        axes = [0, *range(2, seen.dim())]
        variance = seen.var(axes, unbiased=False) + norm.eps
        usual = norm.running_var.float() + norm.eps
        away = (seen.mean(axes) - norm.running_mean.float()).square()
        found.append(0.5 * ((variance + away) / usual - 1 - (variance / usual).log()).mean())

    hooks = [norm.register_forward_pre_hook(watch) for norm in norms_of(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fitted(model: nn.Module, task: Task, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [1, channels, 1, 1] for images x of mean 0 and standard deviation 1.

    The nearest of a few scales that are used (0 to 1, 0 to 255, mean 0 ...) is where the fit begins.
    """

    def away(few: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
        distance = statistics_distance(model, _as_input(model, few * std + mean), task)
        return distance[0] + LATER * distance[1:].sum()

    with torch.no_grad():
        try:
            scales = [(float(away(x[:FIT_BATCH], r * std, std)), r * std, std) for std in DEVIATIONS for r in RATIOS]
        except FastFIPError:  # of what the model returns, not of the shape
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ConfigError(
                f"input_shape={tuple(x.shape[1:])}: the model does not take such images ({reason(error)}); give the "
                "(channels, height, width) of its inputs"
            ) from error
    _, middle, unit = min(scales)
    shift, log = (torch.zeros(1, x.shape[1], 1, 1, device="cpu").requires_grad_(True) for _ in range(2))
    adam = torch.optim.Adam([shift, log], lr=FIT_LR)
    for step in range(FIT_STEPS):
        adam.param_groups[0]["lr"] = FIT_LR * (1 - step / FIT_STEPS)
        few = x[torch.randperm(len(x), generator=generator, device="cpu")[:FIT_BATCH]]
        shift.grad, log.grad = torch.autograd.grad(away(few, middle + unit * shift, unit * log.exp()), [shift, log])
        adam.step()
    return middle + unit * shift.detach(), unit * log.detach().exp()


@torch.no_grad()
def _answers(model: nn.Module, task: Task, x: Tensor) -> Tensor:
    out = task.forward(model, (_as_input(model, x),))
    if out.dim() == 1 or (out.dim() == 2 and out.shape[1] == 1):  # one logit, or a probability
        return (out.reshape(-1) > (0.5 if bool((out >= 0).all()) else 0.0)).long().cpu()
    if out.dim() != 2 or out.shape[1] < 2:
        raise ModelError(
            f"without data the labels are the model's answers, and none can be read off outputs of shape "
            f"{list(out.shape)}: pass forward=, which returns logits [N, C], or clean samples (x, y)"
        )
    return out.argmax(1).cpu()


def _rarest(x: Tensor, y: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return at most so many of the samples, those that have the fewest before them with the same label."""
    if len(x) <= most:
        return x, y
    rank = torch.empty_like(y)
    for c in y.unique():
        mine = (y == c).nonzero()[:, 0]
        rank[mine] = torch.arange(len(mine), device="cpu")
    kept = rank.argsort(stable=True)[:most].sort().values  # in the order in which they were drawn
    return x[kept], y[kept]


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of a model that keep running statistics."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return [m for m in norms if m.running_mean is not None and m.running_var is not None]


def _like(model: nn.Module) -> Tensor:
    norm = norms_of(model)[0]
    return next((p for p in model.parameters() if p.is_floating_point()), norm.running_mean)  # type: ignore[return-value]


def _as_input(model: nn.Module, x: Tensor) -> Tensor:
    return x.to(_like(model))


def _checked(shape: object) -> tuple[int, int, int]:
    try:
        sizes = tuple(int(v) for v in shape)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        sizes = ()
    if len(sizes) != 3 or min(sizes) < 1 or min(sizes[1:]) < 4:
        raise ConfigError(
            f"input_shape={shape!r}: give (channels, height, width) of images of 4 pixels or more, e.g. (3, 32, 32)"
        )
    return sizes[0], sizes[1], sizes[2]


def input_shape_of(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model takes, where it tells.

    It does by its settings (`pretrained_cfg["input_size"]`, as models of timm have; `config.image_size`, as those of
    Hugging Face), or where only one of the usual sizes of square images passes through it, as with a Linear layer
    after a flattening. A network that pools whatever is left takes images of any size.

    Raises:
        ConfigError: it does not tell.
    """
    settings = getattr(model, "pretrained_cfg", None)
    if isinstance(settings, Mapping) and settings.get("input_size") is not None:
        return _checked(settings["input_size"])
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    side = getattr(getattr(model, "config", None), "image_size", None)
    if first is not None and isinstance(side, int):
        return _checked((first.in_channels, side, side))
    if first is not None:
        taken = [n for n in SIDES if _takes(model, (first.in_channels, n, n))]
        if len(taken) == 1:
            return first.in_channels, taken[0], taken[0]
    raise ConfigError(
        "purify without data has to know the shape of the inputs, and this model does not tell it: give input_shape=, "
        "e.g. purify(model, input_shape=(3, 32, 32)), or clean samples, e.g. purify(model, (x, y))"
    )


@torch.no_grad()
def _takes(model: nn.Module, shape: tuple[int, int, int]) -> bool:
    with eval_mode(model):
        try:
            model(torch.zeros(2, *shape, device="cpu").to(next(model.parameters())))
        except Exception:  # what a user's forward raises for images of another size can be anything
            return False
    return True
