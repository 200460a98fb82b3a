"""A transformer without norms whose every weight a test can plant: the parts that patching names, and nothing else.

Attention goes through transformers' interface, so the hooks open it like any model. It also holds programs compiled by
Tracr (`tests/patching/tracr_programs.py`): those have no norms, and attend both ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

import interp


class PlainConfig(PretrainedConfig):
    model_type = "plain"

    def __init__(
        self, layers: int = 1, heads: int = 1, d_head: int = 4, d_model: int = 8, d_mlp: int = 4, vocab: int = 8,
        n_ctx: int = 8, out: int | None = None, act: str = "relu", causal: bool = True, pad: int | None = None,
        **more: Any,
    ) -> None:  # fmt: skip
        self.num_hidden_layers, self.num_attention_heads, self.head_dim = layers, heads, d_head
        self.hidden_size, self.intermediate_size, self.vocab_size = d_model, d_mlp, vocab
        self.max_position_embeddings, self.out = n_ctx, vocab if out is None else out
        self.act, self.causal, self.pad = act, causal, pad
        super().__init__(tie_word_embeddings=False, **more)


class PlainAttention(nn.Module):
    def __init__(self, config: PlainConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer, config.head_dim
        self.num_key_value_groups, self.scaling, self.is_causal = 1, config.head_dim**-0.5, False
        width = config.num_attention_heads * config.head_dim
        self.q, self.k, self.v = (nn.Linear(config.hidden_size, width) for _ in range(3))
        self.o = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        z, _ = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0)
        return self.o(z.reshape(*hidden_states.shape[:-1], -1))


class PlainMLP(nn.Module):
    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = nn.ReLU() if config.act == "relu" else nn.Identity()
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class PlainLayer(nn.Module):
    def __init__(self, config: PlainConfig, layer: int) -> None:
        super().__init__()
        self.attn, self.mlp = PlainAttention(config, layer), PlainMLP(config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(hidden_states, attention_mask)
        return hidden_states + self.mlp(hidden_states)


class PlainModel(PreTrainedModel):
    config_class = PlainConfig
    _supports_sdpa = True

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.place = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(config, i) for i in range(config.num_hidden_layers))
        self.unembed = nn.Linear(config.hidden_size, config.out, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        n, config = input_ids.shape[1], self.config
        seen = torch.ones(len(input_ids), 1, 1, n, dtype=torch.bool, device=input_ids.device)
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None]
        if config.pad is not None:
            seen = seen & (input_ids != config.pad)[:, None, None]
        allowed = seen.expand(-1, 1, n, n)
        if config.causal:
            allowed = allowed & torch.ones(n, n, dtype=torch.bool, device=input_ids.device).tril()
        x = self.embed(input_ids) + self.place(
            torch.arange(n, device=input_ids.device).clamp(max=config.max_position_embeddings - 1)
        )
        mask = torch.zeros(allowed.shape, dtype=x.dtype).masked_fill(~allowed, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, mask)
        return CausalLMOutput(logits=self.unembed(x))


def blank(**sizes: Any) -> PlainModel:
    """A model whose every weight is zero: it predicts nothing until something is planted."""
    model = PlainModel(PlainConfig(**sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return model


@torch.no_grad()
def plant_copy(
    model: PlainModel, layer: int, head: int, start: int, end: int, reads: int, writes: int, gain: float = 1.0
) -> None:
    """Head: at position `end` look at `start`, read dimension `reads` of the stream there and write gain x it.

    Positions are one-hot in the last n_ctx dimensions of the stream (`plant_positions`); other tokens write about what
    they read on average, which a test keeps at zero by planting values only where they are looked up.
    """
    d, n = model.config.head_dim, model.config.max_position_embeddings
    first, base = head * d, model.config.hidden_size - n
    attn = model.layers[layer].attn
    attn.q.weight[first, base + end] = 60.0 * d**0.5
    attn.k.weight[first, base + start] = 1.0
    attn.v.weight[first + 1, reads] = 1.0
    attn.o.weight[writes, first + 1] = gain


@torch.no_grad()
def plant_positions(model: PlainModel) -> None:
    n = model.config.max_position_embeddings
    model.place.weight[:, -n:] = torch.eye(n)


def opened(model: PlainModel, name: str) -> interp.Model:
    return interp.Model(model, name=name)


ON, OFF, BLANK, ANSWER, WRONG = 1, 2, 3, 4, 5
CLEAN = torch.tensor([[BLANK, ON, ON, BLANK]])
CORRUPT = torch.tensor([[BLANK, OFF, OFF, BLANK]])


def gap(logits: Tensor) -> Tensor:
    """Logit of ANSWER minus that of WRONG at the last token [batch]."""
    return logits[:, -1, ANSWER] - logits[:, -1, WRONG]


@torch.no_grad()
def gate(kind: str) -> interp.Model:
    """Two heads carry a bit each from positions 1 and 2 to the last; layer 1's MLP makes "and" or "or" of them."""
    model = blank(layers=2, heads=2, d_model=16, n_ctx=8, vocab=8, d_mlp=2)
    plant_positions(model)
    model.embed.weight[ON, 0] = 1.0
    plant_copy(model, 0, 0, start=1, end=3, reads=0, writes=1)
    plant_copy(model, 0, 1, start=2, end=3, reads=0, writes=2)
    mlp = model.layers[1].mlp
    mlp.up.weight[:, 1:3] = 1.0  # a + b
    mlp.up.bias[1] = -1.0  # a + b - 1
    mlp.down.weight[3, 1] = 1.0 if kind == "and" else -1.0
    mlp.down.weight[3, 0] = 0.0 if kind == "and" else 1.0
    model.unembed.weight[ANSWER, 3] = 4.0
    return opened(model, f"{kind} gate")


@torch.no_grad()
def induction() -> interp.Model:
    """... A B ... A -> B. Head 0 of layer 0 writes the token before; head 0 of layer 1 looks for it, and copies.

    Dimensions of the stream: token, token before, output (6 each), position (8). The other heads do nothing.
    """
    model = blank(layers=2, heads=2, d_head=8, d_model=26, n_ctx=8, vocab=6)
    plant_positions(model)
    model.embed.weight[:, :6] = torch.eye(6)
    sharp, before, copy = 60.0 * 8**0.5, model.layers[0].attn, model.layers[1].attn
    for p in range(1, 8):
        before.q.weight[p - 1, 18 + p] = sharp  # position p asks for position p - 1
    before.k.weight[:8, 18:] = torch.eye(8)
    for attn, end in ((before, 6), (copy, 12)):
        attn.v.weight[:6, :6] = torch.eye(6)
        attn.o.weight[end : end + 6, :6] = torch.eye(6)
    copy.q.weight[:6, :6] = sharp * torch.eye(6)  # the present token asks for a place that came after it
    copy.k.weight[:6, 6:12] = torch.eye(6)
    model.unembed.weight[:, 12:18] = torch.eye(6)
    return opened(model, "induction")
