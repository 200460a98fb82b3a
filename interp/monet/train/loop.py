"""The training loop.

    step -> tokens (data.Sampler) -> loss (the model's own, with its routing losses) -> gradients, clipped -> optimisers

Every `checkpoint_minutes` the state is written to `checkpoint.safetensors` and the validation loss of each label to the
log. `training.jsonl` has one line per logged step; on resume the lines after the checkpoint are dropped, so the log too
is that of an uninterrupted run. When the learning rate begins to fall the state is also kept as `stable.safetensors`:
a later run with more tokens goes on from there.
"""

from __future__ import annotations

import json
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.monet.train import checkpoint
from interp.monet.train.data import Corpus, Sampler, windows
from interp.monet.train.recipes import CONTEXT, RECIPES
from interp.monet.train.schedule import Schedule, optimizers, set_rate

CHECKPOINT, STABLE, LOG, RUN = "checkpoint.safetensors", "stable.safetensors", "training.jsonl", "run.json"


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run, together with the corpus; a resumed run must have the same.

    Attributes:
        recipe: name in `RECIPES`; overrides: changed fields of its configuration.
        tokens: length of the run, the one setting that may change on resume.
        batch, context: rows of a step, tokens of a row.
        lr: peak learning rate; router_lr: that of routers, as a multiple of it; warmup: in steps; decay: share of
            the run in which the rate falls.
        uniform_start, uniform_steps: Monet's uniformity coefficient at first, and the steps in which it comes down to
            the configuration's. In the first steps all tokens look alike to a router; unhindered, a few keys take
            them all, and a key without tokens has no gradient. Later a batch of few documents should be free
            to use few keys.
        power: how much more a larger label is read: 0 = all alike, 1 = as the corpus is.
        bf16: matrix products in bfloat16 (autocast); weights and optimisers stay in float32.
        start: a shipped checkpoint of this recipe whose weights the run begins with, in place of random ones; the
            optimisers begin anew. Take another seed, or the same text is read again in the same order.
    """

    recipe: str
    tokens: int
    overrides: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch: int = 8
    context: int = CONTEXT
    optimizer: str = "adamw"
    lr: float = 3e-3
    router_lr: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    warmup: int = 100
    decay: float = 0.25
    power: float = 0.0
    uniform_start: float = 0.5
    uniform_steps: int = 600
    bf16: bool = False
    start: str | None = None

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return max(1, self.tokens // (self.batch * self.context))


class Run:
    """A model in training, its optimisers and its place in the run.

    Args:
        settings: what to train.
        corpus: on what (see `data.prepare`).
        out: the run's directory; if it holds a checkpoint, the run goes on from it.
        device: "auto" is CUDA if there is one, else the processor.
        compiled: let torch.compile fuse the forward and backward pass (same results up to rounding).

    Raises ValueError if the directory holds a run with other settings or another corpus.
    """

    def __init__(
        self, settings: Settings, corpus: Corpus, out: Path, *, device: str = "auto", compiled: bool = False
    ) -> None:
        self.settings, self.corpus, self.out = settings, corpus, out
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        torch.manual_seed(settings.seed)
        recipe = RECIPES[settings.recipe]
        self.model = recipe.model(corpus.vocabulary, corpus.special, **settings.overrides).to(self.device)
        if settings.start is not None:
            _take_weights(self.model, Path(settings.start), corpus)
        self._uniformity: float | None = getattr(self.model.config, "moe_uniformity_coef", None)
        self.forward: Callable[..., Any] = torch.compile(self.model) if compiled else self.model
        self.sampler = Sampler(corpus, settings.context, settings.batch, seed=settings.seed, power=settings.power)
        self.schedule = Schedule(settings.steps, settings.warmup, settings.decay)
        self.optimizers = optimizers(
            self.model,
            settings.optimizer,
            lr=settings.lr,
            router_lr=settings.router_lr,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
        )
        self.step, self.seconds = 0, 0.0
        self._resume()

    @property
    def tokens_seen(self) -> int:
        """Training tokens read so far."""
        return self.step * self.settings.batch * self.settings.context

    def train_step(self) -> dict[str, float]:
        """One step; returns its losses (nats per token), gradient norm and learning rate."""
        self.model.train()
        self._weigh_uniformity()
        ids = torch.from_numpy(self.sampler.step(self.step)).to(self.device)
        with self._autocast():
            output = self.forward(input_ids=ids, labels=ids)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        scale = self.schedule(self.step)
        set_rate(self.optimizers, scale)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return {**self._losses(output), "grad_norm": float(norm), "lr": scale * self.settings.lr}

    @torch.no_grad()
    def validate(self, limit: int = 8192) -> dict[str, float]:
        """Loss of each label, nats per token, on at most `limit` tokens of its validation text."""
        self.model.eval()
        losses = {}
        for label in self.corpus.spans["validation"]:
            rows = windows(self.corpus.stream("validation", label), self.settings.context, limit)
            losses[label] = float(token_losses(self.model, rows).mean())
        return losses

    def save(self, name: str = CHECKPOINT) -> None:
        """Writes a checkpoint, atomically."""
        checkpoint.save(self.out / name, self.model, self.optimizers, self._state())

    def fit(
        self,
        *,
        minutes: float | None = None,
        checkpoint_minutes: float = 5.0,
        log_every: int = 10,
        tell: Callable[[Run, dict[str, float]], None] | None = None,
    ) -> bool:
        """Trains to the end, to `minutes` of this call, or to an interrupt or terminate signal, whichever is first.

        Whatever ends it, the state is saved first. Returns True if the run is complete. `tell` is called with the
        logged numbers.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        _cut_log(self.out / LOG, self.step)
        about = {"settings": asdict(self.settings), "corpus": self.corpus.fingerprint, "device": describe(self.device)}
        (self.out / RUN).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        began = saved = last = time.monotonic()
        with (self.out / LOG).open("a", encoding="utf-8") as log, _signals() as stopped:
            while self.step < self.settings.steps:
                if self.step == self.schedule.decay_start:
                    self.save(STABLE)
                numbers = self.train_step()
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                done = self.step == self.settings.steps
                if self.step % log_every == 0 or done:
                    entry = {"step": self.step, "tokens": self.tokens_seen, "seconds": round(self.seconds, 1)} | numbers
                    log.write(json.dumps(entry) + "\n")
                    if tell:
                        tell(self, entry)
                enough = bool(stopped) or (minutes is not None and now - began >= 60 * minutes)
                if done or enough or now - saved >= 60 * checkpoint_minutes:
                    if not stopped:
                        log.write(json.dumps({"step": self.step, "validation": self.validate()}) + "\n")
                    log.flush()
                    self.save()
                    saved = last = time.monotonic()  # what was spent on measuring is not training time
                if enough:
                    break
        return self.step >= self.settings.steps

    def _weigh_uniformity(self) -> None:
        """Monet's uniformity coefficient of this step, falling geometrically to the configuration's own."""
        if self._uniformity is not None:
            start, end = max(self.settings.uniform_start, self._uniformity), self._uniformity
            left = max(0.0, 1 - self.step / max(1, self.settings.uniform_steps))
            self.model.config.moe_uniformity_coef = end * (start / end) ** left if end else start * left

    def _losses(self, output: Any) -> dict[str, float]:
        """The loss of the next token and the auxiliary losses, as each family names them."""
        loss = float(output.loss.detach())
        aux = getattr(output, "aux_loss", None)
        if aux is None:
            return {"loss": loss}
        if hasattr(output, "lm_loss"):  # Monet
            parts = ("uniformity_loss", "ambiguity_loss")
            return {"loss": float(output.lm_loss.detach())} | {p: float(getattr(output, p).detach()) for p in parts}
        return {
            "loss": loss - self.model.config.router_aux_loss_coef * float(aux.detach()),
            "balance_loss": float(aux.detach()),
        }

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.settings.bf16 else nullcontext()

    def _identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that goes on from it."""
        own = json.loads(json.dumps(asdict(self.settings)))
        del own["tokens"]
        return own | {"corpus": self.corpus.fingerprint}

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "decay_start": self.schedule.decay_start,
            "settings": self._identity(),
        }

    def _resume(self) -> None:
        file = self.out / CHECKPOINT
        if file.is_file():
            state = checkpoint.read_state(file)
            identity = self._identity()
            if odd := [key for key, value in identity.items() if state["settings"].get(key) != value]:
                raise ValueError(
                    f"{self.out}: holds a run with {odd[0]}={state['settings'].get(odd[0])!r}, not "
                    f"{identity[odd[0]]!r}; ask for the same, or choose another --out"
                )
            stable = self.out / STABLE
            if state["step"] > state["decay_start"] < self.schedule.decay_start and stable.is_file():
                file = stable  # more tokens were asked for, and this run had begun to end
            state = checkpoint.load(file, self.model, self.optimizers)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])


def _take_weights(model: Any, path: Path, corpus: Corpus) -> None:
    """Fills a fresh model with the weights of a checkpoint. Raises ValueError where model or tokenizer are others."""
    from interp.zoo.load import load

    other = load(path)
    if other.tokenizer is None or other.tokenizer.get_vocab() != corpus.tokenizer().get_vocab():
        raise ValueError(f"--start {path}: its tokenizer is not that of this corpus; train from the beginning")
    try:
        model.load_state_dict(other.hf.state_dict())
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise ValueError(f"--start {path}: not a checkpoint of this recipe ({why})") from error


@torch.no_grad()
def token_losses(model: Any, rows: Any, batch: int = 16) -> Tensor:
    """-log p of each next token, nats: windows of ids [window, pos] -> [window, pos - 1], float32 on the processor."""
    device = next(model.parameters()).device
    found = []
    for part in torch.as_tensor(rows).split(batch):
        ids = part.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").cpu())
    return torch.cat(found)


def describe(device: torch.device) -> str:
    """The machine in words: device, cores used, versions."""
    import transformers

    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        what = f"{_processor()}, {torch.get_num_threads()} thread(s)"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{what}; {versions}"


def native_bf16(device: torch.device) -> bool:
    """Does this device multiply bfloat16 matrices itself? Elsewhere bf16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return "AMX" in torch.backends.cpu.get_cpu_capability() or _has_flag("avx512_bf16")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine())


def _has_flag(flag: str) -> bool:
    try:
        return flag in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False


def _cut_log(file: Path, step: int) -> None:
    """Drops what was logged after the step that the run goes on from, and a line that was cut short."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    file.write_text("".join(kept if step else []), encoding="utf-8")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects interrupt and terminate signals instead of dying of them; a second one is not caught."""
    got: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        got.append(number)
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: signals are somebody else's business
        pass
    try:
        yield got
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
