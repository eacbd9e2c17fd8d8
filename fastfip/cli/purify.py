"""`fastfip purify IN OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastfip.cli import options as o
from fastfip.cli.errors import Interrupted, NotPurified, fail, undisturbed
from fastfip.cli.maybe_clean import MaybeClean
from fastfip.cli.opening import Opened, attack_in
from fastfip.cli.outputs import check_distinct, check_file, check_outputs, check_state, inputs_of, kept
from fastfip.cli.reports import data_of, origin_of
from fastfip.cli.together import together

if TYPE_CHECKING:
    from fastfip.methods import MethodConfig


def purify(
    source: o.In,
    net: o.Net,
    clean: MaybeClean,
    scores: o.Scores,
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="file to write, .safetensors or .pth",
            show_default="for a result of BackdoorBench: defense_result.pt in its folder",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="method to use; fastfip methods lists them. auto is fisher_steps. If you change no setting, it is "
            "fast_wfip for fewer than 200 images and clp for none",
        ),
    ] = "auto",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="file with settings of the method, .json or .yaml")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="one setting of the method; may be given several times"),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", help="passes over the clean images")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="number of steps; give this or --epochs")
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option("--micro-batch", metavar="N", help="largest number of images that go through the model at once"),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="SIZE", help="memory to stay within, e.g. 12GB; --micro-batch is chosen for it"
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        str,
        typer.Option(
            "--gradient-checkpointing",
            metavar="HOW",
            help="on takes less memory and more time: most activations are computed twice. auto does so where --memory "
            "needs it",
        ),
    ] = "auto",
    pretrained: o.Pretrained = None,
    seed: o.Seed = 0,
    amp: o.Amp = "off",
    fisher_trace: Annotated[
        bool, typer.Option("--fisher-trace", help="also measure the trace of the Fisher information before and after")
    ] = False,
    report: o.ReportFile = None,
    leaderboard: Annotated[
        Path | None,
        typer.Option(
            "--leaderboard",
            metavar="CSV",
            help="add the result to this table in the form of BackdoorBench's leaderboard; made if it does not exist",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="FILE",
            help="save the state of the run here, and continue from it if the file exists; removed at the end",
        ),
    ] = None,
    resume_every: Annotated[
        float, typer.Option("--resume-every", metavar="SECONDS", help="shortest time between two saves of --resume")
    ] = 60.0,
    force: Annotated[bool, typer.Option("--force", help="replace OUT and --report if they exist")] = False,
    ignore_fit: o.IgnoreFit = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Remove a backdoor from the model in IN with a few clean images, and write the model to OUT in the format of IN.

    Without --data, channels are pruned by looking at the weights alone. If --method is given, that method runs on
    randomly generated images. Both remove less than clean images do. Under torchrun several processes share the
    work; the first of them prints and writes the result.
    """
    out = default_out(source) if out is None else out
    inputs = inputs_of(clean.data, scores.test_data, scores.asr_data, config, pretrained)
    check_outputs(source, out, report, force, inputs)
    if leaderboard is not None:
        _check_leaderboard(leaderboard, [source, *inputs])
    check_state("--resume", resume, [source, *inputs])
    check_distinct(("OUT", out), ("--report", report), ("--resume", resume))
    mixed, checkpointing = o.precision(amp), o.checkpointing(gradient_checkpointing)
    scores.check()
    shape = clean.check()
    if epochs is not None and steps is not None:
        raise fail("--epochs and --steps: give only one of them")

    from fastfip.backdoorbench import leaderboard_rows, write_leaderboard
    from fastfip.errors import CheckpointError
    from fastfip.purification.purify import purify as clean_up
    from fastfip.purification.resume import Resume
    from fastfip.reporting.table import show

    chosen = settings_of(method, config, settings or [], pretrained is not None)
    state = None if resume is None else Resume(resume, resume_every, keep=True)
    with together(net) as first:
        opened = net.opened(source)
        if leaderboard is not None and opened.attack is None:
            raise fail("--leaderboard works only on results of BackdoorBench, and IN is not one: leave it out")
        images = clean.load(opened.how, seed)
        test, asr = scores.load(opened.how, opened.model, images, opened.attack)
        result = clean_up(
            opened.model,
            net.batches(images),
            method,
            config=chosen,
            epochs=epochs,
            steps=steps,
            seed=seed,
            device=opened.where,
            amp=mixed,
            progress=o.progress(quiet),
            test_loader=net.batches(test),
            asr_loader=net.batches(asr),
            measure=("acc", "asr", "fisher_trace") if fisher_trace else ("acc", "asr"),
            inplace=True,
            force=ignore_fit,
            input_shape=shape,
            micro_batch=micro_batch,
            memory=memory,
            gradient_checkpointing=checkpointing,
            resume=state,
            pretrained=pretrained,
        )
    if not first:
        return
    result.notes += scores.unmeasured(opened.attack)
    if images is not None:
        result.notes += images.words()
        result.settings["images"] = images.to_dict()
    result.origin = origin_of(source, opened, net.arch, report, **data_of(clean.data, scores))
    if result.interrupted and not result.history:
        raise Interrupted("interrupted before the first epoch was complete: nothing was written")
    if opened.checkpoint.left_out:
        left = ", ".join(opened.checkpoint.left_out[:10])
        result.notes.append(f"not written to {out.name}, because they belong to the old weights: {left}")
    with undisturbed() as came:
        lost: list[str | None] = []
        if not result.unchanged:
            lost.append(kept(out, lambda path: _write(opened, result, path)))
        if report is not None:
            lost.append(kept(report, result.report))
        if leaderboard is not None and opened.attack is not None and not (result.unchanged or result.interrupted):
            rows = leaderboard_rows(opened.attack, result.before, result.after, result.method)
            lost.append(kept(leaderboard, lambda path: write_leaderboard(path, rows)))
        if state is not None and not (result.interrupted or any(lost)):
            state.remove()
    if as_json:
        print(result.to_json())
    else:
        show(result)
    if any(lost):
        raise CheckpointError("; ".join(text for text in lost if text))
    if result.interrupted or (came and not result.unchanged):
        if result.unchanged:  # nothing better than what was received was found until then
            raise Interrupted("interrupted while the model was as it was given: nothing was written")
        what = "the last good state" if result.interrupted else "the result, which is complete"
        raise Interrupted(f"interrupted: {out} holds {what}")
    if result.unchanged or result.diverged:
        written = "nothing was written" if result.unchanged else f"{out} holds the last good state"
        raise NotPurified(f"{'; '.join(result.alerts)} ({written})")


def settings_of(method: str, path: Path | None, settings: list[str], pretrained: bool = False) -> MethodConfig | None:
    """Return the settings of `--method`, `--config` and `--set`; None: what is taken depends on the images."""
    from fastfip.methods import get
    from fastfip.purification.door import BY_PRETRAINED, MANY

    if method == "auto":
        if path is None and not settings:
            return None
        method = BY_PRETRAINED if pretrained else MANY

    kind: Any = get(method).Config
    chosen: MethodConfig = kind() if path is None else kind.load(path)
    if not settings:
        return chosen
    changes: dict[str, str] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise fail(f"--set {text}: give KEY=VALUE, e.g. --set lr=0.01")
        changes[name.strip()] = value.strip()
    return chosen.read(changes)


def default_out(source: Path) -> Path:
    """Return where the purified network goes if no option says it."""
    attack = attack_in(source)
    if attack is None:
        raise fail("OUT is missing: give the file to write")
    return attack.path.with_name("defense_result.pt")


def _check_leaderboard(path: Path, inputs: list[Path]) -> None:
    """Find out before the work whether rows can be added to a table."""
    from fastfip.backdoorbench.leaderboard import read_rows

    check_file("--leaderboard", path, (".csv",), True, inputs=inputs)
    if path.exists():
        read_rows(path)


def _write(opened: Opened, result: Any, path: Path) -> None:
    """Write the purified network in the form of IN; of a result of BackdoorBench as its defences do."""
    from fastfip.backdoorbench import write_defense_result
    from fastfip.checkpoint import save_checkpoint

    form = opened.checkpoint
    if opened.attack is not None and form.nesting == ("model",) and path.suffix != ".safetensors":
        write_defense_result(result.model, path, form)
    else:
        save_checkpoint(result.model, path, like=form)
