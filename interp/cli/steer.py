"""`interp steer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.cli.common import ModelArgument, ModelOption, emit, keep, named_model, records, stderr, stdout

if TYPE_CHECKING:
    import pandas as pd


def command(
    argument: ModelArgument = None,
    model: ModelOption = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            "--pairs", "-p", help="A .jsonl file with prompt, positive and negative per row; or mood, of ours."
        ),
    ] = None,
    vector: Annotated[Path | None, typer.Option("--vector", help="A saved vector, instead of fitting one.")] = None,
    layer: Annotated[int | None, typer.Option("--layer", "-l", help="Default: the middle one.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where vector, report and generations go.")] = None,
    multipliers: Annotated[str, typer.Option(help="Strengths, with commas.")] = "-2,-1,0,1,2",
    split: Annotated[float, typer.Option(min=0.1, max=0.9, help="Share of the pairs that is fitted on.")] = 0.5,
    limit: Annotated[int | None, typer.Option(min=4, help="Use no more pairs than this.")] = None,
    controls: Annotated[int, typer.Option(min=1, help="Random vectors of the same norm.")] = 20,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to continue. Repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each generation.")] = 40,
    template: Annotated[
        bool | None,
        typer.Option("--template/--no-template", help="Use the model's chat template; default: if it has one."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Try multipliers in the terminal.")] = False,
    seed: Annotated[int, typer.Option(help="Of split, controls and bootstrap.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Fit a steering vector on pairs, prove on others what it does, and take it away.

    The pairs are split: the vector (contrastive activation addition) is fitted on one part, and its report is made
    on the other, beside random vectors. With --out it writes the vector, an HTML report, the table and the
    generations.

    Example:

    ```
    interp steer smollm2 --pairs mood --controls 4 --out mood
    ```
    """
    import interp
    import steering

    say = stderr()

    def tell(message: str) -> None:
        say.print(f"· {message}", markup=False, highlight=False)

    name = named_model(argument, model)
    if pairs is None and vector is None:
        raise ValueError("--pairs: give a .jsonl file of pairs to fit on, or --vector a vector that is there already")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not empty; choose a new directory")
    if pairs is None and not chat:
        raise ValueError(
            "--vector: without --pairs there is nothing to score it on; add --pairs, or try it with --chat"
        )
    ks = _numbers(multipliers)
    triples = [] if pairs is None else _read(pairs, limit)
    opened = interp.load(name, device=device)
    has = bool(getattr(opened.tokenizer, "chat_template", None))
    use = has if template is None else template
    fit, held_out = ([], triples) if vector is not None else _split(triples, split, seed)
    if vector is not None:
        v = steering.load(vector, opened)
    else:
        where = opened.n_layers // 2 if layer is None else layer
        tell(f"fitting on {len(fit)} pairs at layer {where}" + (", in the chat template" if use else ""))
        v = steering.caa(opened, fit, layer=where, chat=use)
    if chat:
        _talk(opened, v, use, max_new_tokens)
        return
    found = steering.report(
        opened, v, held_out, ks, prompts=prompt, controls=controls, chat=use, max_new_tokens=max_new_tokens, seed=seed,
        say=tell,
    )  # fmt: skip
    files: dict[str, str] = {}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        files["vector"] = str(v.save(out / "vector", evaluation=" ".join(found.about["verdict"])))
        files["report"] = str(found.save(out / "report.html"))
        files["table"] = keep(found.table, out / "table.parquet")
        found.generations.to_json(out / "generations.jsonl", orient="records", lines=True)
        files["generations"] = str(out / "generations.jsonl")
    dose = found.table[(found.table["section"] == "on target") & (found.table["metric"] == "propensity")]
    if as_json:
        emit({
            "model": opened.name, "vector": repr(v), "fitted_on": len(fit), "scored_on": len(held_out),
            "chat_template": use,
            "verdict": found.about["verdict"], "table": records(found.table), "generations": records(found.generations),
            "files": files,
        })  # fmt: skip
    else:
        _show(repr(v), dose, found.about["verdict"], found.generations, files)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--multipliers {text!r}: expected numbers with commas, such as -2,-1,0,1,2") from None


def _read(name: str, limit: int | None) -> list[tuple[str, str, str]]:
    """(prompt, positive, negative) of each row of a .jsonl file, or of a set of ours."""
    from interp.cli import lines
    from steering.examples import example_pairs

    path = Path(name)
    if not path.exists() and path.name == name and not path.suffix:
        return example_pairs(name)[:limit]
    found = []
    for number, row in enumerate(lines.rows(path, limit), start=1):
        sides = [row.get(name) for name in ("prompt", "positive", "negative")]
        for name, side in zip(("prompt", "positive", "negative"), sides, strict=True):
            if not isinstance(side, str) or not side.strip():
                raise ValueError(f"{path}, row {number}: no text in {name!r}; a row has prompt, positive and negative")
        found.append((sides[0], sides[1], sides[2]))
    return found


def _split(triples: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Pairs to fit on and pairs to score on. Pairs with one prompt stay on one side."""
    import random

    groups: dict[str, list[Any]] = {}
    for triple in triples:
        groups.setdefault(triple[0], []).append(triple)
    if len(groups) < 4:
        raise ValueError(
            f"--pairs: {len(groups)} different prompts; at least four are needed, two to fit and two to score"
        )
    order = list(groups)
    random.Random(seed).shuffle(order)
    cut = min(max(2, round(share * len(order))), len(order) - 2)
    return tuple([t for prompt in part for t in groups[prompt]] for part in (order[:cut], order[cut:]))  # type: ignore[return-value]


def _talk(model: Any, v: Any, template: bool, max_new_tokens: int) -> None:
    """Reads prompts from standard input; a line ``/2.5`` sets the multiplier, an empty line or end of input ends it."""
    from steering.pairs import chat_text

    console, k = stdout(), 1.0
    console.print(
        f"{v!r}\n/<number> sets the multiplier (now {k:g}); an empty line ends.", markup=False, highlight=False
    )
    while True:
        try:
            line = console.input(f"[{k:+g}] > ", markup=False).strip()
        except EOFError:
            return
        if not line:
            return
        if line.startswith("/"):
            try:
                k = float(line[1:])
            except ValueError:
                console.print(f"{line}: expected a number, such as /-1.5", markup=False, highlight=False)
            continue
        tokens = model.tokens(chat_text(model, line) if template else line, special=not template)
        for factor in dict.fromkeys((0.0, k)):
            with model.intervene(v * factor):
                text = model.generate(tokens, max_new_tokens=max_new_tokens).text
            console.print(f"{factor:+g}: {text.strip()}", markup=False, highlight=False, soft_wrap=True)


def _show(name: str, dose: pd.DataFrame, verdict: list[str], generations: pd.DataFrame, files: dict[str, str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = stdout()
    shown = Table(title=escape(name), title_justify="left", box=None, padding=(0, 2, 0, 0))  # 80 columns hold it
    for column in ("multiplier", "propensity", "95 %", "random vectors", "their middle 95 %"):
        shown.add_column(column, justify="right", no_wrap=True)
    grid = dose.set_index(["baseline", "multiplier"])
    for k in sorted(set(dose["multiplier"])):
        own = grid.loc[("none", k)]
        cells = [f"{k:+g}", f"{own['value']:+.3f}", f"{own['low']:+.3f}..{own['high']:+.3f}"]
        if ("random", k) in grid.index:
            other = grid.loc[("random", k)]
            cells += [f"{other['value']:+.3f}", f"{other['low']:+.3f}..{other['high']:+.3f}"]
        shown.add_row(*cells)
    console.print(shown)
    console.print("propensity: log P(positive) - log P(negative), nats per token of the answers", highlight=False)
    for line in verdict:
        console.print(line, markup=False, highlight=False)
    for row in generations.to_dict("records"):
        line = f"{row['multiplier']:+g}  {row['prompt']!r:.50} -> {row['text']!r}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for label, path in files.items():
        console.print(f"{label}: {path}", markup=False, highlight=False, soft_wrap=True)
