"""Reads a LLaMA-style `config.json` and refuses what the runtime does not compute."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that fix a LLaMA-style decoder, under their Hugging Face names.

    `eos_token_ids` holds every token that ends a generation (`eos_token_id` in the file, a number
    or a list). `dtype` is the name the checkpoint was saved in, such as "bfloat16", or None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim must be even for rotary, got {self.head_dim}")

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, source: str = "config") -> ModelConfig:
        """Builds a config from the parsed `config.json` of Hugging Face transformers.

        Raises ValueError for a missing or malformed entry and NotImplementedError for a model
        that this runtime does not compute. `source` is named in the messages.
        """
        _refuse_unsupported(raw, source)
        missing = [name for name in _REQUIRED if raw.get(name) is None]
        if missing:
            raise ValueError(f"{source}: missing {', '.join(missing)}")
        heads = raw["num_attention_heads"]
        head_dim = raw.get("head_dim")
        if head_dim is None:
            head_dim = raw["hidden_size"] // max(heads, 1)
        eos = raw.get("eos_token_id")
        eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        optional = {name: raw[name] for name in _OPTIONAL if raw.get(name) is not None}
        try:
            return cls(
                **{name: raw[name] for name in _REQUIRED},
                **optional,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=head_dim,
                rope_theta=_rope_theta(raw, source),
                eos_token_ids=eos_ids,
                dtype=raw.get("dtype") or raw.get("torch_dtype"),
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads `config.json`. Raises FileNotFoundError, or ValueError when it is not JSON."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
        return cls.from_dict(raw, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` that transformers' `LlamaConfig` and `from_dict` both read."""
        raw = asdict(self)
        raw["eos_token_id"] = list(raw.pop("eos_token_ids")) or None
        if raw["eos_token_id"] and len(raw["eos_token_id"]) == 1:
            raw["eos_token_id"] = raw["eos_token_id"][0]
        theta = raw.pop("rope_theta")
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        # transformers before version 5 reads this entry and ignores `rope_parameters`.
        raw["rope_theta"] = theta
        raw["torch_dtype"] = raw["dtype"]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **raw,
        }


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OPTIONAL = (
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
)


def _refuse_unsupported(raw: dict[str, Any], source: str) -> None:
    model_type = raw.get("model_type")
    if model_type is None:
        raise ValueError(f"{source}: no model_type; expected the config.json of a LLaMA model")
    if model_type != "llama":
        raise NotImplementedError(
            f"{source}: model_type {model_type!r} is not supported; expected 'llama'"
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise NotImplementedError(
            f"{source}: hidden_act {activation!r} is not supported; expected 'silu'"
        )
    if raw.get("quantization_config") is not None:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise NotImplementedError(
            f"{source}: the checkpoint is already quantised ({method}); expected a float one"
        )


def _rope_theta(raw: dict[str, Any], source: str) -> float:
    # transformers 5 writes rope_parameters; before, rope_theta and, for long contexts, rope_scaling
    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name)
        if rope is None:
            continue
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise NotImplementedError(
                f"{source}: {name} has rope_type {rope_type!r}; expected 'default'"
            )
        partial = rope.get("partial_rotary_factor", 1.0)
        if partial != 1.0:
            raise NotImplementedError(
                f"{source}: {name} has partial_rotary_factor {partial}; expected 1.0"
            )
        if rope.get("rope_theta") is not None:
            return float(rope["rope_theta"])
    return float(raw.get("rope_theta") or 10000.0)
