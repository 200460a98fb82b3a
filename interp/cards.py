"""Cards: what goes with every artefact, so that whoever finds it knows what it is, and what it is not for.

A card is a list of named fields, the same for every artefact of a kind (`FIELDS`). Vectors, SAEs, probes and masks
follow Model Cards (Mitchell et al. 2019, arXiv:1810.03993): what was made, how, for what use, evaluated on which
groups, with which limits. Datasets follow Data Cards (Pushkarna et al. 2022, arXiv:2204.01075): sources, licences,
collection, transforms, uses. Code fills in what it knows; the rest is for the author, and `lint` names what is empty:

    card = Card("vector", "refusal, layer 12", {"model_hash": m.fingerprint, "site": "resid_post[12]", ...})
    card.save("refusal/card.json")
    lint("refusal/card.json")      # ["intended_use: empty. What should it be used for? ..."]

"not measured" is an honest answer and passes; silence does not.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.version import __version__

NOT_MEASURED = "not measured"

_ARTEFACT = {
    "description": "What is it, in a sentence or two?",
    "model": "Which model does it belong to?",
    "model_hash": "Fingerprint of that model (Model.fingerprint)?",
    "site": "Where in the model does it act or read?",
    "method": "How was it made: method, settings, seed?",
    "training_data": "From which data was it made?",
    "intended_use": "What should it be used for, and by whom?",
    "out_of_scope": "What should it not be used for?",
    "factors": "Which groups (domains, languages, people, conditions) may it treat differently?",
    "metrics": "What was measured, and why that?",
    "evaluation_data": "On which data was it evaluated?",
    "evaluation": "What are the results, by group?",
    "ethics": "Whom could it harm, and how?",
    "limits": "Where does it fail, or where is it untested?",
    "licence": "Under which licence may it be used?",
    "versions": "Which software made it?",
}
_DATASET = {
    "description": "What is it, in a sentence or two?",
    "model": "Which model do the activations come from?",
    "model_hash": "Fingerprint of that model (Model.fingerprint)?",
    "site": "Which sites were stored?",
    "sources": "Where do the texts come from?",
    "licence": "Under which licences are the texts, and this dataset?",
    "collection": "How were the texts chosen and collected?",
    "transforms": "What was done to them on the way to these files?",
    "labels": "What do the labels mean, and who gave them?",
    "composition": "How much is there: documents, tokens, sites, bytes?",
    "sensitive": "Does it hold personal or otherwise sensitive content?",
    "intended_use": "What should it be used for, and by whom?",
    "out_of_scope": "What should it not be used for?",
    "evaluation": "What was checked on the data, by group where there are groups?",
    "limits": "What is missing, skewed or untested?",
    "maintenance": "Who keeps it, and how is it checked?",
    "versions": "Which software made it?",
}
#: The fields of each kind of artefact, each with the question that it answers.
FIELDS: dict[str, dict[str, str]] = {
    "dataset": _DATASET,
    **dict.fromkeys(("vector", "sae", "probe", "mask", "checkpoint"), _ARTEFACT),
}
# What people leave in a form when they have not filled it in.
_BLANK = re.compile(
    r"(todo|tbd|tba|fixme|xxx|\?+|-+|\.+|none|n/a|fill (me )?in|\[?more information needed\]?)\W*\Z", re.I)


class CardError(ValueError):
    """A card that cannot be read, or a field that no card of this kind has."""


@dataclass(frozen=True)
class Card:
    """The description of one artefact.

    Attributes:
        kind: a key of `FIELDS`.
        name: what the artefact is called.
        fields: answers by field: text, a list, a mapping, or (for tables, such as an evaluation by group) a list of
            mappings with the same keys. Fields that are absent count as empty.
        front: further YAML front matter for a README, as the Hugging Face hub reads it.
    """

    kind: str
    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    front: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in FIELDS:
            raise CardError(f"kind={self.kind!r}: there are cards for {', '.join(FIELDS)}")
        unknown = [key for key in self.fields if key not in FIELDS[self.kind]]
        if unknown:
            raise CardError(f"fields: a {self.kind} card has no {unknown[0]!r}; it has {', '.join(FIELDS[self.kind])}")

    def lint(self) -> list[str]:
        """One message per empty field; an empty list means a filled card."""
        return [f"{key}: empty. {question} ('{NOT_MEASURED}' is an answer)"
                for key, question in FIELDS[self.kind].items() if _is_blank(self.fields.get(key))]

    def to_json(self) -> str:
        fields = {key: self.fields.get(key, "") for key in FIELDS[self.kind]}
        return json.dumps({"card": 1, "kind": self.kind, "name": self.name, "fields": fields,
                           "front": dict(self.front), "interp": __version__}, indent=1, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """A README with YAML front matter and one section per field."""
        import yaml  # type: ignore[import-untyped]

        front = yaml.safe_dump({**self.front, "interp_card": self.kind}, sort_keys=False, allow_unicode=True)
        sections = [f"## {_title(key)}\n\n<!-- {question} -->\n\n{_markdown(self.fields.get(key, ''))}".rstrip()
                    for key, question in FIELDS[self.kind].items()]
        return f"---\n{front}---\n\n# {_one_line(self.name)}\n\n" + "\n\n".join(sections) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the card, as Markdown for ``*.md`` and else as JSON; whole or not at all."""
        target = Path(path)
        text = self.to_markdown() if target.suffix == ".md" else self.to_json()
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}", delete=False,
                                         encoding="utf-8") as handle:
            try:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
                os.chmod(handle.name, 0o644)
                os.replace(handle.name, target)
            except BaseException:
                os.unlink(handle.name)
                raise
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Card:
        """Read the card of an artefact, or the card's own file.

        A directory has ``card.json`` or ``README.md`` in it, a file ``v.safetensors`` has ``v.card.json`` beside it.
        From Markdown each field is the text of its section. CardError where there is no card.
        """
        place = Path(path)
        if place.is_dir() or place.suffix not in (".json", ".md"):
            beside = [place / "card.json", place / "README.md"] if place.is_dir() else [place.with_suffix(".card.json")]
            found = [p for p in beside if p.is_file()]
            if not found:
                raise CardError(f"{place} has no card ({' or '.join(p.name for p in beside)})")
            place = found[0]
        try:
            text = place.read_text(encoding="utf-8")
        except OSError as error:
            raise CardError(f"{place}: no card can be read there ({error.strerror})") from error
        return _from_markdown(text, place) if place.suffix == ".md" else _from_json(text, place)


def lint(card: Card | str | os.PathLike[str]) -> list[str]:
    """What is missing in a card, given as such, as its file, or as the directory of its artefact.

    A blank field, a missing section and a placeholder (TODO, n/a, ...) count as missing; "not measured" does not.
    """
    return (card if isinstance(card, Card) else Card.load(card)).lint()


def _is_blank(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, str):
        text = re.sub(r"<!--.*?-->", "", value, flags=re.S).strip()
        return not text or bool(_BLANK.match(text))
    if isinstance(value, Mapping):
        return not value or all(_is_blank(v) for v in value.values())
    if isinstance(value, Sequence):
        return not value or all(_is_blank(v) for v in value)
    return False


def _title(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def _markdown(value: Any) -> str:
    """A field as Markdown: text as it is, a list as bullets, a mapping as bold terms, rows as a table."""
    if isinstance(value, str):
        return re.sub(r"(?m)^#", r"\\#", value.strip())  # a heading inside a field would end the field
    if isinstance(value, Mapping):
        return "\n".join(f"- **{_one_line(k)}**: {_one_line(v)}" for k, v in value.items())
    if isinstance(value, Sequence):
        if value and all(isinstance(row, Mapping) for row in value):
            columns = list(dict.fromkeys(key for row in value for key in row))
            lines = [columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in value)]
            return "\n".join("| " + " | ".join(_one_line(c).replace("|", "\\|") for c in line) + " |" for line in lines)
        return "\n".join(f"- {_one_line(item)}" for item in value)
    return str(value)


def _from_json(text: str, place: Path) -> Card:
    try:
        data = json.loads(text)
        return Card(data["kind"], data["name"], data["fields"], data.get("front", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise CardError(f"{place} is no card: {error}") from error


def _from_markdown(text: str, place: Path) -> Card:
    import yaml

    match = re.match(r"---\n(.*?)\n---\n(.*)\Z", text, re.S)
    if not match:
        raise CardError(f"{place} is no card: it has no YAML front matter between --- lines")
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise CardError(f"{place}: the front matter is not YAML ({error})") from error
    kind = front.pop("interp_card", None) if isinstance(front, dict) else None
    if kind not in FIELDS:
        raise CardError(f"{place} is no card of interp: its front matter has no interp_card ({', '.join(FIELDS)})")
    keys = {_title(key): key for key in FIELDS[kind]}
    name, fields = "", {}
    for section in re.split(r"(?m)^(?=#{1,2} )", match[2]):
        heading, _, body = section.partition("\n")
        level, _, title = heading.strip().partition(" ")
        if level == "#":
            name = title
        elif level == "##" and title in keys:
            body = re.sub(r"<!--.*?-->", "", body, flags=re.S)
            fields[keys[title]] = re.sub(r"(?m)^\\#", "#", body.strip())
    return Card(kind, name, fields, front)
