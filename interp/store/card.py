"""The Data Card of a dataset: what the writer knows, filled in; what only its author knows, taken from `sources`."""

from __future__ import annotations

from typing import Any

from interp.cards import NOT_MEASURED, Card
from interp.store.plan import Plan


def dataset_card(plan: Plan, manifest: dict[str, Any]) -> Card:
    """The card of a dataset. Fields given as ``store.write(..., sources={...})`` win over what is filled in here.

    Where texts come from, under which licence, how they were chosen, what they may be used for and whether they hold
    personal content cannot be known from the files, so these stay empty, and `interp.cards.lint` says so.
    """
    name = plan.model_name or "a model"
    sites = manifest["sites"]
    nonfinite = {site: entry["nonfinite_rows"] for site, entry in sites.items() if entry["nonfinite_rows"]}
    labelled = manifest["label_type"]
    known: dict[str, Any] = {
        "description": f"Activations of {name} at {len(sites)} sites on {manifest['rows']:,} tokens of "
                       f"{manifest['documents']:,} documents.",
        "model": f"{name}, run in {plan.model_dtype}" + (f", edited: {'; '.join(plan.edits)}" if plan.edits else ""),
        "model_hash": plan.model,
        "site": [f"{site} (TransformerLens: {entry['transformer_lens'] or 'has no name for it'}), {entry['dtype']} "
                 f"{['row', *entry['shape']]}" for site, entry in sites.items()],
        "transforms": {
            "tokenisation": f"tokenizer {plan.tokenizer or 'none: token ids were given'}",
            "windows": f"texts are cut into windows of at most {plan.context} tokens, each run on its own; a later "
                       "window starts with the tokens that the tokenizer puts before a text",
            "padding": "no row is padding",
            "empty texts": "left out" if plan.empty == "skip" else "none",
            "rounding": f"activations are rounded to {plan.dtype}",
            "text": "the texts are not kept: token ids, character spans and a fingerprint of the texts are "
                    f"({manifest['text_sha256']})",
        },
        "labels": f"One label per document ({labelled}), as given by the writer." if labelled else "There are none.",
        "composition": {key: f"{manifest[key]:,}" for key in ("documents", "windows", "rows", "bytes")},
        "evaluation": [
            {"site": site, "rows": entry["rows"], "rows with NaN or infinity": entry["nonfinite_rows"],
             "rms": f"{entry['rms']:.6g}" if "rms" in entry else "whole numbers", "by label": NOT_MEASURED}
            for site, entry in sites.items()
        ],
        "limits": "Activations belong to the model with this fingerprint and to windows of this length; what other "
                  "contexts would give is " + NOT_MEASURED + "."
                  + (f" NaN or infinity occurs: {nonfinite}." if nonfinite else ""),
        "maintenance": "Every file carries its sha256; interp.store.verify finds any change. Content "
                       f"{manifest['content_sha256']}, begun {plan.created}.",
        "versions": plan.versions,
    }
    front = {"pretty_name": f"Activations of {name}", "tags": ["activations", "interpretability"],
             "configs": [{"config_name": "tokens", "data_files": "tokens/*.parquet"}]}
    if isinstance(plan.card.get("licence"), str):
        front["license"] = plan.card["licence"]
    return Card("dataset", f"Activations of {name}", {**known, **plan.card}, front)
