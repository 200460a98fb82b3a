"""Croissant metadata (JSON-LD for ML datasets, MLCommons, version 1.1): what machines read about a dataset.

Croissant readers open parquet but not safetensors. So for a dataset as written, every file is listed with its size and
sha256, and the token table is described as a record set; after `ActivationDataset.to_parquet` the activations are
records too. The documents are made here by hand: they are short, and writing a dataset then needs no Croissant package.
"""

from __future__ import annotations

from typing import Any

from interp.store.plan import Plan

VERSION = "http://mlcommons.org/croissant/1.1"
PARQUET = "application/x-parquet"
_LABEL_TYPES = {"str": "sc:Text", "int": "sc:Integer", "float": "sc:Float", "bool": "sc:Boolean", None: "sc:Text"}
_TOKEN_FIELDS = {
    "document": ("sc:Integer", "number of the document in the input"),
    "window": ("sc:Integer", "number of the window within the document; each window was run on its own"),
    "position": ("sc:Integer", "place within the window"),
    "token_id": ("sc:Integer", "id of the token"),
    "char_start": ("sc:Integer", "first character of the token in the document, -1 where unknown"),
    "char_end": ("sc:Integer", "one past the last character of the token in the document, -1 where unknown"),
    "special": ("sc:Boolean", "true for tokens that are no part of the text"),
}
# The terms used below, as the specification maps them; kept in the document so that reading it needs no network.
_TERMS = ("column", "extract", "field", "fileObject", "fileSet", "includes", "isArray", "arrayShape", "recordSet",
          "source", "key", "citeAs", "isLiveDataset", "containedIn")
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _TERMS},
}


def dataset_croissant(plan: Plan, manifest: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a dataset as written: all files, and the token table as records."""
    files = [entry for part in manifest["parts"] for entry in (part["tokens"], *part["sites"].values())]
    files.append(manifest["statistics"])
    about = "The activations are in safetensors files whose rows are those of the token table, in the same order."
    return _document(plan, manifest, about, files, "tokens/*.parquet", token_fields(manifest["label_type"]))


def parquet_croissant(plan: Plan, manifest: dict[str, Any], files: list[dict[str, Any]], shapes: dict[str, list[int]]
                      ) -> dict[str, Any]:
    """The metadata of a parquet export: tokens and the sites in `shapes` (shape of one row) as records."""
    fields = token_fields(manifest["label_type"])
    for site, shape in shapes.items():
        whole = manifest["sites"][site]["dtype"] == "int32"
        size = 1
        for n in shape:
            size *= n
        fields.append({
            **_field(site, "sc:Integer" if whole else "sc:Float", f"activations at {site}, shape {shape}, flattened"),
            "isArray": True, "arrayShape": str(size)})
    return _document(plan, manifest, "Exported to parquet.", files, "data/*.parquet", fields)


def token_fields(label_type: str | None) -> list[dict[str, Any]]:
    fields = [_field(name, kind, about) for name, (kind, about) in _TOKEN_FIELDS.items()]
    return [*fields, _field("label", _LABEL_TYPES[label_type], "label of the document, if it has one")]


def _field(name: str, kind: str, about: str) -> dict[str, Any]:
    return {"@type": "cr:Field", "@id": f"rows/{name}", "name": name, "description": about, "dataType": kind,
            "source": {"fileSet": {"@id": "parquet"}, "extract": {"column": name}}}


def _document(plan: Plan, manifest: dict[str, Any], about: str, files: list[dict[str, Any]], includes: str,
              fields: list[dict[str, Any]]) -> dict[str, Any]:
    content = manifest["content_sha256"]
    data: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": f"activations-{content[:12]}",
        "description": f"Activations of {plan.model_name or 'a model'} on {manifest['rows']} tokens. {about}",
        "conformsTo": VERSION,
        "identifier": f"sha256:{content}",
        "version": "1.0.0",
        "datePublished": plan.created,
        "url": f"urn:sha256:{content}",
        "distribution": [
            {"@type": "cr:FileSet", "@id": "parquet", "name": "parquet", "encodingFormat": PARQUET,
             "includes": includes},
            *({"@type": "cr:FileObject", "@id": f["file"], "name": f["file"], "contentUrl": f["file"],
               "contentSize": f"{f['bytes']} B", "sha256": f["sha256"],
               "encodingFormat": PARQUET if f["file"].endswith(".parquet") else "application/octet-stream"}
              for f in files),
        ],
        "recordSet": [{"@type": "cr:RecordSet", "@id": "rows", "name": "rows", "description": "one record per token",
                       "field": fields}],
    }
    if isinstance(plan.card.get("licence"), str):
        data["license"] = plan.card["licence"]
    return data
