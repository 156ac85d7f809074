"""What a decoder computes, whatever the family that its checkpoint comes from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those trained on.

    `kind` "linear" divides every frequency by `factor`; "llama3" divides those of wavelengths above
    `original_max_position_embeddings / low_freq_factor`, keeps those below
    `original_max_position_embeddings / high_freq_factor`, and goes smoothly between.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """What fixes a decoder: its sizes and the kind of each part.

    `config_json.py` reads it from a `config.json` and writes it back; `family` is the model_type
    there and says nothing else. The defaults are a LLaMA's.

    - `norm` is "rms" or "layer" (with a bias where `norm_bias`), of `norm_eps`.
    - `position` is "rotary", "learned" or "alibi". Rotary turns the first `rotary_dim` elements of
      a head (None: all), pairing i with i + rotary_dim / 2, or 2 i with 2 i + 1 where
      `rotary_interleaved`. Position p is row p + `position_offset` of a learned table.
    - `activation` is "silu", "gelu", "gelu_tanh" or "relu"; `mlp_gated` is down(act(gate) * up),
      else down(act(up)).
    - `parallel_residual` is x + attention(norm(x)) + mlp(norm(x)), by two norms, or one where
      `shared_norm`.
    - `qk_norm`: an RMS norm of each query and key head. `embed_norm`: a norm of the embeddings.
    - A query attends to the last `sliding_window` keys, its own among them, in the layers that
      `sliding_layers` names (None: in all).
    - `softmax_scale` None is 1 / sqrt(head_dim).
    - `eos_token_ids` holds every token that ends a generation. `dtype` is the name the checkpoint
      was saved in, such as "bfloat16", or None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_bias: bool = True
    position: str = "rotary"
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    position_offset: int = 0
    mlp_gated: bool = True
    activation: str = "silu"
    parallel_residual: bool = False
    shared_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    qk_norm: bool = False
    embed_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    softmax_scale: float | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None
    family: str = "llama"

    def __post_init__(self) -> None:
        check_sizes(self, _SIZES)
        for name, kinds in _KINDS.items():
            if getattr(self, name) not in kinds:
                raise ValueError(
                    f"config: {name} must be one of {', '.join(kinds)}, got {getattr(self, name)!r}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.position == "rotary":
            self._check_rotary()
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"config: sliding_window must be positive or None, got {self.sliding_window}"
            )
        if self.shared_norm and not self.parallel_residual:
            raise ValueError("config: shared_norm needs parallel_residual")

    def _check_rotary(self) -> None:
        name = "head_dim" if self.rotary_dim is None else "rotary_dim"
        if getattr(self, name) % 2 or not 0 < getattr(self, name) <= self.head_dim:
            raise ValueError(
                f"config: {name} must be even for rotary and at most head_dim ({self.head_dim}), "
                f"got {getattr(self, name)}"
            )

    def window(self, layer: int) -> tuple[int, int]:
        """The layer's attention window, as `flash_attention` takes it."""
        slides = self.sliding_layers is None or layer in self.sliding_layers
        return (self.sliding_window - 1, -1) if self.sliding_window and slides else (-1, -1)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, source: str = "config") -> ModelConfig:
        """Builds a config from the parsed `config.json` of Hugging Face transformers.

        Raises ValueError for a missing or malformed entry and NotImplementedError for a model
        that this runtime does not compute. `source` is named in the messages.
        """
        from .config_json import read_config

        return read_config(raw, source, cls)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads `config.json`. Raises FileNotFoundError, or ValueError when it is not JSON."""
        return cls.from_dict(read_json(path), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of the family, which transformers and `from_dict` both read.

        Raises ValueError for a config that the family cannot say, such as a GPT-2 with rotary.
        """
        from .config_json import write_config

        return write_config(self)


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """A BERT: `ModelConfig` with a norm after each residual sum, attention to both sides, and a
    table of `type_vocab_size` token types."""

    type_vocab_size: int = 2
    family: str = "bert"


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_KINDS = {
    "norm": ("rms", "layer"),
    "position": ("rotary", "learned", "alibi"),
    "activation": ACTIVATIONS,
}


def check_sizes(config: Any, names: tuple[str, ...]) -> None:
    """Raises ValueError unless each of these is a positive integer."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config: {name} must be a positive integer, got {value!r}")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, or ValueError for anything else."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw
