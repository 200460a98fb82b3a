"""What running a model gives back besides activations: the trace of an intervention, and a generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from interp.activations import Activations, Tokens
from interp.hooks.tap import Bound

if TYPE_CHECKING:
    import pandas as pd


class Intervention:
    """The handle of an open ``intervene`` context."""

    def __init__(self, bound: list[Bound], model: Any = None) -> None:
        self._bound, self._model = bound, model

    def trace(self, calls: bool = False) -> pd.DataFrame:
        """The tokens that were edited: node, edit, batch, position (among real tokens), token (id, -1 if unknown).

        Without `calls`, each edited token stands once, however often it was recomputed; so the trace is the same with
        and without a cache, and whatever the padding. With `calls`, one line per forward call too. ``.attrs["edits"]``
        names the edits with their scopes, those that touched nothing too.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for bound in self._bound:
            for call, position, mask, ids in bound.touched:
                for batch, column in mask.nonzero().tolist():
                    token = -1 if ids is None else int(ids[batch, column])
                    rows.append(
                        {
                            "node": str(bound.site),
                            "edit": bound.edit.name,
                            "call": call,
                            "batch": batch,
                            "position": int(position[batch, column]),
                            "token": token,
                        }
                    )
        frame = pd.DataFrame(rows, columns=["node", "edit", "call", "batch", "position", "token"])
        if not calls:
            frame = frame.drop(columns="call").drop_duplicates(ignore_index=True)
        about = {} if self._model is None else {"model": self._model.name, "fingerprint": self._model.fingerprint}
        edits = [{"node": str(b.site), "edit": b.edit.name, "scope": b.edit.scope.text} for b in self._bound]
        frame.attrs.update(about, edits=edits)
        return frame


@dataclass(frozen=True)
class Generation:
    """What ``Model.generate`` made.

    Attributes:
        texts: the continuations, without the prompt (token ids as text where there is no tokenizer).
        tokens: prompt and continuation [batch, pos], padded on the left.
        prompt: how many columns are prompt.
        acts: the captured sites over all columns but the last new one, which is never fed back.
    """

    texts: list[str]
    tokens: Tokens
    prompt: int
    acts: Activations | None = None

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def new_ids(self) -> Tensor:
        """Generated ids [batch, new]."""
        return self.tokens.ids[:, self.prompt :]

    def __str__(self) -> str:
        return self.text if len(self.texts) == 1 else "\n---\n".join(self.texts)
