"""`python -m interp.monet.train`: one command per recipe, `prepare` before them and `report` after."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.common import USER_ERRORS, fail, stderr, stdout
from interp.monet.train.recipes import RECIPES, VOCABULARY, parse_overrides
from interp.zoo.load import trained_dir

app = typer.Typer(
    name="python -m interp.monet.train",
    help="Train the minis: monet-mini, olmoe-mini, llama-mini.",
    epilog="Example: `python -m interp.monet.train monet-mini --data CORPUS --out runs/monet-mini --tokens 6M`",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Data = Annotated[Path, typer.Option(help="Directory with train, validation and test .parquet (columns text, label).")]
_Out = Annotated[Path, typer.Option(help="The run's directory; if it holds a checkpoint, the run goes on from it.")]
_Threads = Annotated[int, typer.Option(min=0, help="Processor threads; 0 = as torch chooses.")]


def _count(text: str) -> int:
    """A number of tokens as people write it: 6M, 500k, 1e7, 12345."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)([kMG]?)", text.strip())
    if not match:
        raise typer.BadParameter(f"{text!r}: expected a number of tokens such as 6M, 500k or 1e7")
    return int(float(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}[match[2]])


def train(
    ctx: typer.Context,
    data: _Data,
    out: _Out,
    tokens: Annotated[str, typer.Option(help="Length of the run: 6M, 500k, 1e7. More on resume makes it longer.")],
    minutes: Annotated[float | None, typer.Option(help="Stop this call after so many minutes; resume later.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out; --no-resume refuses one.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 8,
    context: Annotated[int, typer.Option(min=8, help="Tokens of a row.")] = 256,
    vocabulary: Annotated[int, typer.Option(help="Tokens of the tokenizer.")] = VOCABULARY,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    router_lr: Annotated[float, typer.Option(help="Peak learning rate of routers, as a multiple of --lr.")] = 0.1,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon for the matrices.")] = "adamw",
    warmup: Annotated[int, typer.Option(min=1, help="Steps in which the rate rises.")] = 100,
    decay: Annotated[float, typer.Option(min=0, max=1, help="Share of the run in which the rate falls.")] = 0.25,
    power: Annotated[float, typer.Option(help="0 reads all labels alike, 1 in proportion to their size.")] = 0.0,
    uniform_start: Annotated[float, typer.Option(help="Monet: uniformity coefficient of the first step.")] = 0.5,
    uniform_steps: Annotated[int, typer.Option(min=1, help="Monet: steps until it is the configuration's.")] = 600,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the data.")] = 0,
    start: Annotated[str | None, typer.Option(help="A shipped checkpoint to begin with; take another --seed.")] = None,
    threads: _Threads = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    bf16: Annotated[bool, typer.Option(help="Products in bfloat16, where the machine has them.")] = False,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = False,
    checkpoint_minutes: Annotated[float, typer.Option(help="Between checkpoints.")] = 5.0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the model's configuration; may be repeated.")
    ] = None,
) -> None:
    """Train this model, or go on training it."""
    import torch

    from interp.monet.train import loop
    from interp.monet.train.data import prepare
    from interp.monet.train.progress import Progress

    if threads:
        torch.set_num_threads(threads)
    if not resume and (out / loop.CHECKPOINT).exists():
        raise ValueError(f"{out}: holds a checkpoint; remove it, choose another --out, or let it --resume")
    settings = loop.Settings(
        recipe=str(ctx.info_name), tokens=_count(tokens), overrides=parse_overrides(overrides or []), seed=seed,
        batch=batch, context=context, optimizer=optimizer, lr=lr,
        router_lr=router_lr, warmup=warmup, decay=decay, power=power,
        uniform_start=uniform_start, uniform_steps=uniform_steps, bf16=bf16, start=start,
    )  # fmt: skip
    run = loop.Run(settings, prepare(data, vocabulary), out, device=device, compiled=compiled)
    if bf16 and not loop.native_bf16(run.device):
        raise ValueError("--bf16: this processor has no bfloat16 products and would only imitate them; leave it out")
    with Progress(run, stderr()) as progress:
        complete = run.fit(minutes=minutes, checkpoint_minutes=checkpoint_minutes, tell=progress)
    stdout().print(f"{out}: step {run.step} of {settings.steps}, {'complete' if complete else 'to be resumed'}")


for _name, _recipe in RECIPES.items():
    app.command(
        _name,
        help=f"Train {_name}: {_recipe.summary}.",
        epilog=f"Example: `python -m interp.monet.train {_name} --data CORPUS --out runs/{_name} --tokens 6M`",
    )(train)


@app.command("prepare")
def prepare_command(
    data: _Data, vocabulary: Annotated[int, typer.Option(help="Tokens of the tokenizer.")] = VOCABULARY
) -> None:
    """Train the tokenizer and tokenise the corpus, if that has not been done (training does it too)."""
    from interp.monet.train.data import SPLITS, prepare

    corpus = prepare(data, vocabulary)
    for label in sorted(set().union(*corpus.spans.values())):
        sizes = ", ".join(f"{s} {len(corpus.stream(s, label)):,}" for s in SPLITS if label in corpus.spans[s])
        stdout().print(f"{label}: {sizes} tokens", highlight=False)


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(help="The directory of a run.")],
    data: _Data,
    limit: Annotated[int, typer.Option(help="Test tokens of each label, at most.")] = 65_536,
    to: Annotated[Path | None, typer.Option(help="Where to write the model; default: the zoo's directory.")] = None,
    vocabulary: Annotated[int, typer.Option(help="Tokens of the tokenizer.")] = VOCABULARY,
    threads: _Threads = 0,
) -> None:
    """Export a run's model, measure it on the test text against a 5-gram, and write its card."""
    import torch

    from interp.monet.train import report
    from interp.monet.train.data import prepare

    if threads:
        torch.set_num_threads(threads)
    corpus = prepare(data, vocabulary)
    if to is None:
        to = trained_dir() / report.open_run(run, corpus).settings.recipe
    result = report.ship(run, corpus, to, limit=limit)
    stdout().print(result.round(4).to_string(index=False), highlight=False)
    stdout().print(f"written to {to}", highlight=False)


def main() -> Any:
    """Run the command line."""
    try:
        app()
    except USER_ERRORS as error:
        raise SystemExit(fail(error)) from None


if __name__ == "__main__":
    main()
