"""`config.json` to `ModelConfig` and back, by the table of families."""

from __future__ import annotations

import math
from typing import Any

from .config import EncoderConfig, ModelConfig, RopeScaling
from .families import ENCODERS, FAMILIES, REQUIRED, Family, family_of

# Of checkpoints that are quantised; `fastq.checkpoints` reads them.
READ_QUANTIZATIONS = ("compressed-tensors", "bitsandbytes")

# config.json's names of an activation; the first of a kind is the one written.
_ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


_SCALING_NAMES = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def read_config(
    raw: dict[str, Any], source: str, kind: type[ModelConfig] = ModelConfig
) -> ModelConfig:
    """The config that a parsed `config.json` describes; see `ModelConfig.from_dict`."""
    name, family = _family_of(raw, ENCODERS if kind is EncoderConfig else FAMILIES, source)
    _check_only(raw, family.only, source)
    fields = family.traits | {"family": name, "dtype": raw.get("dtype") or raw.get("torch_dtype")}
    missing = []
    for key, entry in family.entries.items():
        value = raw.get(entry.name)
        if value is None and entry.older:
            value = raw.get(entry.older)
        if value is None and entry.default is REQUIRED:
            missing.append(entry.name)
        fields[key] = entry.default if value is None else value
    if missing:
        raise ValueError(f"{source}: missing {', '.join(missing)}")
    if "activation" in family.entries:
        entry = family.entries["activation"].name
        fields["activation"] = _read_activation(fields["activation"], entry, source)
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    _fill(fields, "num_key_value_heads", lambda: heads)
    _fill(fields, "head_dim", lambda: hidden // max(heads, 1))
    _fill(fields, "intermediate_size", lambda: 4 * hidden)
    if raw.get("word_embed_proj_dim") not in (None, hidden):
        raise NotImplementedError(
            f"{source}: word_embed_proj_dim {raw['word_embed_proj_dim']} is not supported; "
            f"expected hidden_size ({hidden})"
        )
    eos = raw.get("eos_token_id")
    fields["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if _has_rope(family):
        fields |= _read_rope(raw, family, fields["head_dim"], source)
    if family.windows:
        fields |= _read_windows(raw, fields["num_hidden_layers"])
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of the config's family; see `ModelConfig.to_dict`."""
    family = family_of(config)
    raw = {"architectures": [family.architecture], "model_type": config.family}
    for key, entry in family.entries.items():
        value = getattr(config, key)
        raw[entry.name] = _activation_name(value) if key == "activation" else value
    ends = list(config.eos_token_ids)
    raw["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    # transformers before version 5 reads torch_dtype.
    raw["dtype"] = raw["torch_dtype"] = config.dtype
    if _has_rope(family):
        raw |= _write_rope(config)
    if family.windows:
        raw |= _write_windows(config)
    if read_config(raw, "config", type(config)) != config:
        raise ValueError(f"config: a config.json of {config.family!r} cannot say {config}")
    return raw


def _fill(fields: dict[str, Any], name: str, value) -> None:
    if fields.get(name) is None:
        fields[name] = value()


def _family_of(raw: dict[str, Any], families: dict[str, Family], source: str) -> tuple[str, Family]:
    name = raw.get("model_type")
    if name is None:
        raise ValueError(f"{source}: no model_type; expected the config.json of a model")
    if name not in families:
        raise NotImplementedError(
            f"{source}: model_type {name!r} is not supported; expected one of {', '.join(families)}"
        )
    return name, families[name]


def _check_only(raw: dict[str, Any], only: dict[str, Any], source: str) -> None:
    """Raises NotImplementedError where an entry asks for what the runtime does not compute."""
    for name, value in only.items():
        if raw.get(name, value) != value:
            raise NotImplementedError(
                f"{source}: {name} {raw[name]!r} is not supported; expected {value!r}"
            )
    quantization = raw.get("quantization_config")
    if isinstance(quantization, dict) and "load_in_8bit" not in quantization:
        method = quantization.get("quant_method", "unknown")
        if method not in READ_QUANTIZATIONS:
            raise NotImplementedError(
                f"{source}: the checkpoint is already quantised ({method}); expected a float one, "
                f"or one by {' or '.join(READ_QUANTIZATIONS)}"
            )


def _read_activation(name: str, entry: str, source: str) -> str:
    """The activation that config.json names in `entry`."""
    if name not in _ACTIVATION_NAMES:
        raise NotImplementedError(
            f"{source}: {entry} {name!r} is not supported; expected one of "
            f"{', '.join(_ACTIVATION_NAMES)}"
        )
    return _ACTIVATION_NAMES[name]


def _activation_name(activation: str) -> str:
    """What config.json calls an activation."""
    return next(name for name, kind in _ACTIVATION_NAMES.items() if kind == activation)


def _has_rope(family: Family) -> bool:
    """Whether config.json holds rope_parameters: GPT-J's rotary is fixed but for its size."""
    return "position" not in family.traits and "rotary_dim" not in family.entries


def _read_rope(raw: dict[str, Any], family: Family, head_dim: int, source: str) -> dict[str, Any]:
    # transformers 5 writes rope_parameters; before, rope_theta and, for long contexts, rope_scaling
    name = next((n for n in ("rope_parameters", "rope_scaling") if raw.get(n)), "rope_parameters")
    rope = raw.get(name) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *_SCALING_NAMES):
        raise NotImplementedError(
            f"{source}: {name} has rope_type {kind!r}; expected 'default', 'linear' or 'llama3'"
        )
    scaling = None
    if kind != "default":
        if rope.get("factor") is None:
            raise ValueError(f"{source}: {name} has rope_type {kind!r} but no factor")
        names = _SCALING_NAMES[kind]
        scaling = RopeScaling(kind, **{n: rope[n] for n in names if rope.get(n) is not None})
    theta = rope.get("rope_theta") or raw.get("rope_theta") or raw.get("rotary_emb_base") or 1e4
    factor = family.rotary_factor
    for value in (raw.get("rotary_pct"), raw.get("partial_rotary_factor")):
        factor = factor if value is None else value
    factor = rope.get("partial_rotary_factor", factor)
    return {
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "rotary_dim": None if factor == 1 else int(head_dim * factor),
    }


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    raw: dict[str, Any] = {}
    scaling = config.rope_scaling
    if scaling is not None:
        rope["rope_type"] = scaling.kind
        rope |= {name: getattr(scaling, name) for name in _SCALING_NAMES[scaling.kind]}
        # transformers before version 5 reads this entry and rope_theta, not `rope_parameters`.
        raw["rope_scaling"] = dict(rope)
    if config.rotary_dim is not None:
        factor = config.rotary_dim / config.head_dim
        if int(config.head_dim * factor) < config.rotary_dim:
            factor = math.nextafter(factor, 2)
        rope["partial_rotary_factor"] = raw["rotary_pct"] = factor
    elif FAMILIES[config.family].rotary_factor != 1:
        rope["partial_rotary_factor"] = raw["rotary_pct"] = 1.0
    theta = "rope_theta" if FAMILIES[config.family].rotary_factor == 1 else "rotary_emb_base"
    return raw | {"rope_parameters": rope, theta: config.rope_theta}


def _read_windows(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Qwen's: a window only where use_sliding_window is set, in the layers of layer_types, or those
    from max_window_layers."""
    if not raw.get("use_sliding_window") or raw.get("sliding_window") is None:
        return {}
    types = raw.get("layer_types")
    if types is None:
        layers = range(raw.get("max_window_layers", 28), num_layers)
    else:
        layers = (i for i, kind in enumerate(types) if kind == "sliding_attention")
    return {"sliding_window": raw["sliding_window"], "sliding_layers": tuple(layers)}


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    count = config.num_hidden_layers
    slides = [config.window(layer) != (-1, -1) for layer in range(count)]
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": slides.index(True) if any(slides) else count,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in slides],
    }
