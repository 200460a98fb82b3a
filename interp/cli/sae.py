"""`interp sae train|eval|dash`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.calls import settings
from interp.cli.common import emit, keep, records, stderr, stdout

if TYPE_CHECKING:
    from interp.model import Model

app = typer.Typer(
    help="Train sparse autoencoders, measure them, look at their latents.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

File = Annotated[Path | None, typer.Option("--file", help="A text file, one text per line.")]
Texts = Annotated[list[str] | None, typer.Option("--text", "-t", help="A text. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Sae = Annotated[Path, typer.Argument(help="The SAE's directory, ours or SAELens's; or a name: sae-smollm2.")]
ModelName = Annotated[str, typer.Argument(help="A zoo name, a hub id, a directory, a .gguf file, or tiny:FAMILY.")]


def _texts(text: list[str] | None, file: Path | None, limit: int | None = None) -> list[str]:
    from interp.cli import lines

    if bool(text) == bool(file):
        raise typer.BadParameter("give exactly one of --text and --file")
    if text:
        return text[:limit]
    assert file is not None
    return list(lines.texts(file, limit))


def _open(model: str, device: str | None) -> Model:
    import interp

    return interp.load(model, device=device)


@app.command("train")
def train(
    source: Annotated[str, typer.Argument(help="An activation dataset (interp capture), or a model with --file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the SAE goes.")],
    site: Annotated[str, typer.Option("--site", "-s", help='What it reads, such as "resid_post[15]".')],
    d_sae: Annotated[int, typer.Option(min=1, help="Latents.")] = 4608,
    k: Annotated[float | None, typer.Option(help="Latents per token.")] = 32,
    arch: Annotated[str, typer.Option(help="topk, batchtopk, matryoshka, standard, panneal, gated, jumprelu, mp.")] = (
        "batchtopk"
    ),
    target: Annotated[str | None, typer.Option(help="Predict this site instead: a transcoder.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to train on; by default all, once.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 4096,
    lr: Annotated[float | None, typer.Option(help="Learning rate; by default the paper's.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Coefficient of the sparsity loss.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="A directory for checkpoints; a run that stopped goes on.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to train, such as cuda.")] = "cpu",
    text: Texts = None,
    file: File = None,
    as_json: Json = False,
) -> None:
    """Train an SAE from a dataset on disk, or from a model that runs over texts.

    Example:

    ```
    interp capture smollm2 --file texts.txt --sites "resid_post[15]" --out acts
    interp sae train acts --site "resid_post[15]" --d-sae 4608 --k 32 --out sae
    ```
    """
    from interp import sae

    given: Any = source
    if text or file:
        given = (_open(source, None), _texts(text, file))
    elif not Path(source).is_dir():
        raise typer.BadParameter(f"{source} is no directory; a model needs texts too (--file)")
    options: dict[str, Any] = {name: value for name, value in (("lr", lr), ("sparsity", sparsity)) if value is not None}
    needs_k = arch in ("topk", "batchtopk", "matryoshka", "mp", "jumprelu")
    s = sae.train(
        given, site, arch=arch, d_sae=d_sae, k=k if needs_k else None, target=target, tokens=tokens,
        batch_size=batch_size, seed=seed, checkpoint=resume, device=device, **options,
    )  # fmt: skip
    s.save(out)
    assert s.history is not None
    keep(s.history, out / "history.parquet")
    last = records(s.history.tail(1))[0]
    if as_json:
        emit({"directory": str(out), "sae": repr(s), "last": last, "history": records(s.history)})
    else:
        stdout().print(
            f"{s!r}\nfvu {last['fvu']:.4f}, l0 {last['l0']:.1f}, dead {last['dead']:.0f}, {last['tokens']} tokens; "
            f"in {out}", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


@app.command("eval")
def evaluate(
    directory: Sae,
    model: ModelName,
    text: Texts = None,
    file: File = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first so many texts of a file.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens per text at most.")] = 128,
    ablation: Annotated[str, typer.Option(help="What counts as nothing: zero or mean.")] = "zero",
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")] = None,
    as_json: Json = False,
) -> None:
    """Reconstruction, sparsity, and what it costs the model to read the reconstruction.

    Example:

    ```
    interp sae eval sae smollm2 --file held_out.txt
    ```
    """
    from interp import sae

    texts = _texts(text, file, limit)
    table = sae.evaluate(sae.load(directory), _open(model, device), texts, context=context, ablation=ablation)
    if as_json:
        emit({"directory": str(directory), "settings": settings(table), "table": records(table)})
        return
    for row in table.to_dict("records"):
        interval = f"  [{row['low']:.4f}, {row['high']:.4f}]" if row["low"] == row["low"] else ""
        stdout().print(f"{row['metric']:20s} {row['value']:10.4f}{interval}", markup=False, highlight=False)


@app.command("dash")
def dash(
    directory: Sae,
    model: ModelName,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")],
    latent: Annotated[list[int] | None, typer.Option("--latent", "-l", help="A latent. Repeatable.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Without --latent: so many of those that write most.")] = 10,
    text: Texts = None,
    file: File = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first so many texts of a file.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens per text at most.")] = 128,
    effects: Annotated[bool, typer.Option(help="Measure the loss with each latent off.")] = True,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")] = None,
    as_json: Json = False,
) -> None:
    """One HTML file about latents: contexts, logits, density, partners, effect. It opens without a network.

    Example:

    ```
    interp sae dash sae smollm2 --file held_out.txt --latent 3 --latent 17 --out latents.html
    ```
    """
    from interp import sae
    from interp.sae import latents, page

    texts = _texts(text, file, limit)
    s, opened = sae.load(directory), _open(model, device)
    chosen = list(latent or ())
    if not chosen:
        stats = latents.statistics(opened, s, texts, partners=1, context=context)
        mass = stats.density * stats["mean"]
        chosen = stats.latent[mass.sort_values(ascending=False).index[:top]].tolist()
        stderr().print(f"the {len(chosen)} latents with the most mass: {chosen}", markup=False, highlight=False)
    path = page.save(page.dashboard(opened, s, texts, chosen, effects=effects, context=context), out)
    if as_json:
        emit({"file": str(path), "latents": chosen, "bytes": path.stat().st_size})
    else:
        stdout().print(f"{len(chosen)} latents in {path}", markup=False, highlight=False, soft_wrap=True)
