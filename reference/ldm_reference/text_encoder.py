"""The text model of CLIP (Radford et al., 2103.00020): token ids to hidden states, causally masked.

One class serves Stable Diffusion 1.x and 2.x (``CLIPTextModel``) and, with ``projection_dim``, the second encoder of
SDXL (``CLIPTextModelWithProjection``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_reference.config import ConfigError, check_choice, check_layers, check_positive, config_from_dict

INERT = {"model_type": {"clip_text_model", "clip"}, "use_attention_mask": {None, False}}
BOOKKEEPING = {
    *("architectures", "torch_dtype", "dtype", "transformers_version"),
    *("attention_dropout", "dropout", "initializer_factor", "initializer_range"),
}
"""What transformers writes into every config and a trained text encoder does not depend on."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """Keys of transformers' ``CLIPTextConfig``. ``with_projection`` stands for ``CLIPTextModelWithProjection``."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    with_projection: bool = False

    def __post_init__(self) -> None:
        check_choice("hidden_act", self.hidden_act, ("quick_gelu", "gelu"))
        check_positive(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=self.max_position_embeddings,
        )
        if self.with_projection:
            check_positive(projection_dim=self.projection_dim)
        check_layers(self.num_hidden_layers)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"num_attention_heads = {self.num_attention_heads} does not divide {self.hidden_size}")


class TextEncoding(NamedTuple):
    """What the text encoder says of token ids (B, L).

    Attributes
    ----------
    last_hidden_state : (B, L, hidden_size), after the final norm
    pooled : (B, hidden_size), the final state of the first end-of-text token; projected to (B, projection_dim) where
        the model has a projection
    hidden_states : the input of every layer and the output of the last, each (B, L, hidden_size), not normed
    """

    last_hidden_state: Tensor
    pooled: Tensor
    hidden_states: tuple[Tensor, ...]


class Embeddings(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_embedding.weight[: input_ids.shape[1]]
        return self.token_embedding(input_ids) + positions


class SelfAttention(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, C) -> (B, heads, L, d)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class EncoderLayer(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))


class TextTransformer(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> TextEncoding:
        x = self.embeddings(input_ids)
        length = input_ids.shape[1]
        mask = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
        states = [x]
        for layer in self.encoder.layers:
            states.append(layer(states[-1], mask))
        last = self.final_layer_norm(states[-1])
        # Configs from before transformers 4.31 say 2; their models end a text with the highest id of the vocabulary.
        is_end = input_ids if self.eos_token_id == 2 else (input_ids == self.eos_token_id).int()
        end = is_end.argmax(dim=-1)  # the first end-of-text token of each row
        pooled = last[torch.arange(len(last), device=last.device), end]
        return TextEncoding(last, pooled, tuple(states))


class CLIPTextModel(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        self.text_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False) if config.with_projection else None
        )

    @classmethod
    def from_config(cls, values: Mapping[str, Any], *, strict: bool = True) -> CLIPTextModel:
        """Build the network that a ``config.json`` of transformers describes, or the text half of a CLIP model's."""
        if isinstance(values.get("text_config"), dict):
            values = {**values["text_config"], "architectures": values.get("architectures")}
        keep = {key: value for key, value in values.items() if key in TextEncoderConfig.__dataclass_fields__}
        rest = {key: value for key, value in values.items() if key not in keep and key not in BOOKKEEPING}
        keep["with_projection"] = "CLIPTextModelWithProjection" in (values.get("architectures") or ())
        return cls(config_from_dict(TextEncoderConfig, {**keep, **rest}, INERT, strict=strict))

    def forward(self, input_ids: Tensor) -> TextEncoding:
        """Token ids (B, L), int64."""
        encoding = self.text_model(input_ids)
        if self.text_projection is None:
            return encoding
        return encoding._replace(pooled=self.text_projection(encoding.pooled))
