"""`sparvar generate`: a prompt, or a class, to PNG files that say how they were made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from sparvar_jax.cli import console, options
from sparvar_jax.cli.prompts import Job


@dataclasses.dataclass(frozen=True)
class Order:
    """What to draw with which model; None takes the model's default."""

    prompt: str | None
    label: int | None
    model: Path | None
    num: int
    kind: dict[str, Any]
    """How it is loaded: dtype, weights, stream, cache, devices."""
    text_first: bool
    compare: bool
    drawing: dict[str, Any]
    """Options of the pipeline's call."""

    def load(self, report: Any) -> tuple[Any, Any, dict[str, Any]]:
        """The pipeline, what it draws (labels, prompts or text features), and with which options.

        The text encoder may be loaded, used and freed before the rest is loaded.
        """
        from sparvar_jax.pipelines import loading
        from sparvar_jax.pipelines.pipeline import Pipeline

        folder = loading.model_folder(self.model)
        if loading.family_in(folder).draws == "classes":
            self._check_class_model()
            pipe = Pipeline.from_checkpoint(folder, **self.kind, progress=report)
            return pipe, [self.label] * self.num, self.drawing
        if self.label is not None or self.prompt is None:
            raise ValueError("Missing argument: this model draws prompts, give one and no --class")
        prompts = [self.prompt] * self.num
        text, drawing = self._text_features(prompts) if self.text_first else (prompts, {})
        pipe = Pipeline.from_checkpoint(
            self.model, text_encoder=not self.text_first, **self.kind, progress=report
        )
        return pipe, text, self.drawing | drawing

    def _check_class_model(self) -> None:
        if self.label is None or self.prompt is not None:
            raise ValueError(
                f"{self.model} draws classes: give --class N instead of a prompt; many pictures of "
                "many classes draws `sparvar sample`"
            )
        texts = {name: self.drawing.get(name) for name in ("negative", "aspect_ratio", "size")}
        options.refuse(self.model, **texts, free_text_encoder=self.text_first)

    def _text_features(self, prompts: list[str]) -> tuple[Any, dict[str, Any]]:
        from sparvar_jax.pipelines import loading

        family = loading.family_in(loading.model_folder(self.model))
        how = {name: self.kind[name] for name in ("dtype", "weights")}
        encoder = family.encoder.from_checkpoint(self.model, **how)
        texts = {name: self.drawing[name] for name in ("negative",) if name in self.drawing}
        others = {name: encoder([text] * self.num) for name, text in texts.items()}
        return encoder(prompts), others

    def describe(self, pipe: Any) -> dict[str, str]:
        """How the pictures were made, for their metadata."""
        from sparvar_jax.models import eight_bits
        from sparvar_jax.pipelines import metadata

        form = eight_bits.form_of(pipe.model.transformer)
        precision = pipe.model.transformer.config.precision
        drawing, defaults = self.drawing, dataclasses.asdict(pipe.model.defaults)
        subject = {"class": str(self.label)} if self.prompt is None else {"prompt": self.prompt}
        settings = ("plan", "guidance", "temperature", "negative", "size", "aspect_ratio")
        told = {name: str(drawing.get(name, defaults.get(name))) for name in settings}
        return {
            **subject,
            **{name: value for name, value in told.items() if value != "None"},
            "model": pipe.model.name,
            "dtype": pipe.model.transformer.config.dtype,
            **({"stream": precision.stream} if precision.stream != "float32" else {}),
            **({"matrices": form} if form else {}),
            "cache": pipe.cache,
            "versions": ", ".join(f"{k} {v}" for k, v in metadata.versions().items()),
        }


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    out: Annotated[
        Path, typer.Option("--out", help="PNG to write; several get their seed appended.")
    ] = Path("sparvar.png"),
    model: options.Model = None,
    plan: options.Plan = None,
    seed: Annotated[int, typer.Option("--seed", help="Picture b draws from seed + b.")] = 0,
    num: options.Num = 1,
    guidance: options.Guidance = None,
    temperature: options.Temperature = None,
    negative: Annotated[
        str | None, typer.Option("--negative", help="What the picture should not show.")
    ] = None,
    aspect: options.Aspect = None,
    size: options.Size = None,
    label: Annotated[
        int | None, typer.Option("--class", help="Class to draw, with class-conditional models.")
    ] = None,
    text_first: Annotated[
        bool,
        typer.Option("--free-text-encoder", help="Run the text encoder first and free it."),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Draw the dense picture as well, and say how long it took."),
    ] = False,
    dtype: options.Precision = None,
    weights: options.Weights = None,
    stream: options.Stream = None,
    cache: options.CacheKind = options.Cache.full,
    devices: options.Devices = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="File of prompts, one a line, or JSON lines; --out DIR."),
    ] = None,
    coordinator: options.Coordinator = None,
    processes: options.Processes = None,
    process: options.Process = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say which kernels served the picture.")
    ] = False,
) -> None:
    """Draw a prompt, or with a class-conditional model a class; or a whole file of prompts.

    With --prompts, --num pictures are drawn together; run again after a kill, it goes on.
    """
    asked = {
        "plan": plan,
        "guidance": guidance,
        "temperature": temperature,
        "negative": negative,
        "aspect_ratio": aspect,
        "size": size,
    }
    drawing = {"seed": seed} | {name: value for name, value in asked.items() if value is not None}
    kind = {
        **options.loading(dtype, weights, stream),
        "cache": cache.value,
        "devices": devices,
    }
    hosts = (coordinator, processes, process)
    if prompts is not None:
        if prompt is not None or label is not None or text_first or compare or verbose:
            raise ValueError(
                "--prompts brings its own prompts: leave out what names others, "
                "--free-text-encoder, --compare and --verbose"
            )
        Job(prompts, out, model, num, kind, drawing, hosts).run()
        return
    if hosts != (None, None, None):
        raise ValueError("several processes draw a file of prompts: give --prompts FILE")
    _run(Order(prompt, label, model, num, kind, text_first, compare, drawing), out, verbose)


def _run(order: Order, out: Path, verbose: bool) -> None:
    from pallas_kernels import backends
    from sparvar_jax.pipelines import metadata
    from sparvar_jax.pipelines.numbers import first_seed
    from sparvar_jax.study import beside
    from sparvar_jax.weights.large_file import whole_files

    console.use_compilation_cache()
    seed, watch = first_seed(order.drawing["seed"], order.num), console.Stopwatch()
    targets = _targets(out, seed, order.num)
    # Opened before the work: a folder that cannot be written to is found now.
    with whole_files(targets) as opened, backends.watch() as served:
        with console.progress() as report:
            pipe, subject, drawing = order.load(report)
            watch.lap("loaded")
            if order.compare:
                beside.sparse_plan(pipe, drawing)  # complains before the work
            pipe.warm_up(subject, progress=report, **drawing)
            watch.lap("compiled")
            pictures = pipe(subject, progress=report, **drawing)
            seconds = watch.lap("drawn")
        told = order.describe(pipe)
        for index, (path, picture) in enumerate(zip(opened, pictures, strict=True)):
            metadata.write_png(path, picture, {**told, "seed": str(seed + index)})
    watch.tell()
    if verbose:
        console.say(f"kernels: {backends.told(served)}")
    height, width = pictures.shape[1:3]
    for path in targets:
        console.say(f"{path}: {width}x{height}")
    console.say(_told_of_plan(pipe, drawing, order.compare))
    if order.compare:  # the picture asked for is there already, whatever becomes of the other
        found = beside.beside_dense(pipe, subject, drawn=(pictures, seconds), **drawing)
        console.say(found.line())


def _told_of_plan(pipe: Any, drawing: dict[str, Any], compare: bool) -> str:
    """Which plan drew, and how much of the dense plan's work it is: counted, not timed."""
    from sparvar_jax.study.bench import DENSE

    plan, _ = pipe.model.family.asked(pipe.model.name, drawing).resolve(pipe.model)
    if plan.name == DENSE:
        return "plan dense"
    more = "" if compare else "; --compare draws by dense too and says how long that takes"
    return f"plan {plan.name}: {100 * plan.work():.0f} % of the tokens x rows of dense{more}"


def _targets(out: Path, seed: int, num: int) -> list[Path]:
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got {out}")
    if num == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{seed + index}") for index in range(num)]
