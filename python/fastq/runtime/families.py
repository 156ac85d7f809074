"""The families of decoders: how each names its config's entries and its tensors.

A family is one row of `FAMILIES`: which entry of `config.json` gives which field of `ModelConfig`,
what the family fixes, and what its checkpoints call the canonical modules (`layout.py` says how
their tensors are laid out). A table and a few functions read it both ways.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .config import EncoderConfig, ModelConfig, RopeScaling

_REQUIRED: Any = object()


class Entry(NamedTuple):
    """An entry of config.json: its name, its value where it is absent or null, an older name."""

    name: str
    default: Any = _REQUIRED
    older: str | None = None


@dataclass(frozen=True)
class Family:
    """One family.

    `entries`: field of ModelConfig -> entry of config.json. `traits`: fields that the family fixes.
    `only`: entries that the runtime computes at one value alone, which is their default too.
    `prefix`: what checkpoints saved without their head leave out of every name. `layers`: the
    modules' list. `names`: canonical module -> the family's, those within a layer without the
    layer's part; a module that is not here has its canonical name. `fused` says how
    `self_attn.qkv_proj` holds q, k and v: as "blocks" (all of q, all of k, all of v) or by "heads"
    (q, k and v of the first head, of the second, and so on). `transposed`: the layers' linear
    weights are (in, out).
    """

    architecture: str
    entries: dict[str, Entry]
    traits: dict[str, Any]
    only: dict[str, Any] = field(default_factory=dict)
    rotary_factor: float = 1.0
    windows: bool = False
    prefix: str = "model."
    layers: str = "model.layers"
    names: dict[str, str] = field(default_factory=dict)
    fused: str | None = None
    transposed: bool = False
    canonical_layers: str = "model.layers"


_COMMON = {
    "vocab_size": Entry("vocab_size"),
    "hidden_size": Entry("hidden_size"),
    "num_hidden_layers": Entry("num_hidden_layers"),
    "num_attention_heads": Entry("num_attention_heads"),
    "max_position_embeddings": Entry("max_position_embeddings", 2048),
    "tie_word_embeddings": Entry("tie_word_embeddings", False),
    "bos_token_id": Entry("bos_token_id", None),
}
_LLAMA = _COMMON | {
    "intermediate_size": Entry("intermediate_size"),
    "num_key_value_heads": Entry("num_key_value_heads", None),
    "head_dim": Entry("head_dim", None),
    "norm_eps": Entry("rms_norm_eps", 1e-6),
    "activation": Entry("hidden_act", "silu"),
}
_GPT = _COMMON | {
    "hidden_size": Entry("n_embd"),
    "num_hidden_layers": Entry("n_layer"),
    "num_attention_heads": Entry("n_head"),
    "intermediate_size": Entry("n_inner", None),
    "max_position_embeddings": Entry("n_positions", 1024),
    "norm_eps": Entry("layer_norm_epsilon", 1e-5),
    "activation": Entry("activation_function", "gelu_new"),
}
_TIED = {"tie_word_embeddings": Entry("tie_word_embeddings", True)}
_ATTENTION_BIAS = {
    "qkv_bias": Entry("attention_bias", False),
    "out_bias": Entry("attention_bias", False),
}
_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
_PLAIN_MLP = {"norm": "layer", "mlp_gated": False}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        _LLAMA | _ATTENTION_BIAS | {"mlp_bias": Entry("mlp_bias", False)},
        {},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _LLAMA | {"sliding_window": Entry("sliding_window", None)},
        {},
    ),
    "qwen2": Family("Qwen2ForCausalLM", _LLAMA, {"qkv_bias": True}, windows=True),
    "qwen3": Family("Qwen3ForCausalLM", _LLAMA | _ATTENTION_BIAS, {"qk_norm": True}, windows=True),
    "opt": Family(
        "OPTForCausalLM",
        _COMMON
        | _TIED
        | {
            "intermediate_size": Entry("ffn_dim"),
            "activation": Entry("activation_function", "relu"),
            "qkv_bias": Entry("enable_bias", True),
            "out_bias": Entry("enable_bias", True),
            "mlp_bias": Entry("enable_bias", True),
        },
        _PLAIN_MLP | {"norm_eps": 1e-5, "position": "learned", "position_offset": 2},
        only={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
        },
        layers="model.decoder.layers",
        names={
            "model.embed_tokens": "model.decoder.embed_tokens",
            "model.embed_positions": "model.decoder.embed_positions",
            "model.norm": "model.decoder.final_layer_norm",
            "input_layernorm": "self_attn_layer_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "post_attention_layernorm": "final_layer_norm",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
        },
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _GPT | _TIED,
        _PLAIN_MLP | _BIASES | {"position": "learned"},
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        prefix="transformer.",
        layers="transformer.h",
        names={
            "model.embed_tokens": "transformer.wte",
            "model.embed_positions": "transformer.wpe",
            "model.norm": "transformer.ln_f",
            "input_layernorm": "ln_1",
            "self_attn.qkv_proj": "attn.c_attn",
            "self_attn.o_proj": "attn.c_proj",
            "post_attention_layernorm": "ln_2",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        fused="blocks",
        transposed=True,
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        _GPT
        | {
            "max_position_embeddings": Entry("n_positions", 2048),
            "rotary_dim": Entry("rotary_dim", 64),
        },
        _PLAIN_MLP
        | {
            "rotary_interleaved": True,
            "parallel_residual": True,
            "shared_norm": True,
            "mlp_bias": True,
            "lm_head_bias": True,
        },
        prefix="transformer.",
        layers="transformer.h",
        names={
            "model.embed_tokens": "transformer.wte",
            "model.norm": "transformer.ln_f",
            "input_layernorm": "ln_1",
            "self_attn.q_proj": "attn.q_proj",
            "self_attn.k_proj": "attn.k_proj",
            "self_attn.v_proj": "attn.v_proj",
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "mlp.fc_in",
            "mlp.down_proj": "mlp.fc_out",
        },
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        _COMMON
        | {
            "intermediate_size": Entry("intermediate_size"),
            "norm_eps": Entry("layer_norm_eps", 1e-5),
            "activation": Entry("hidden_act", "gelu"),
            "qkv_bias": Entry("attention_bias", True),
            "out_bias": Entry("attention_bias", True),
            "parallel_residual": Entry("use_parallel_residual", True),
        },
        _PLAIN_MLP | {"mlp_bias": True},
        rotary_factor=0.25,
        prefix="gpt_neox.",
        layers="gpt_neox.layers",
        names={
            "model.embed_tokens": "gpt_neox.embed_in",
            "model.norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
            "self_attn.qkv_proj": "attention.query_key_value",
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        fused="heads",
    ),
    "bloom": Family(
        "BloomForCausalLM",
        _COMMON
        | _TIED
        | {
            "hidden_size": Entry("hidden_size", older="n_embed"),
            "num_hidden_layers": Entry("n_layer", older="num_hidden_layers"),
            "num_attention_heads": Entry("n_head", older="num_attention_heads"),
            "intermediate_size": Entry("n_inner", None),
            "max_position_embeddings": Entry("seq_length", 2048),
            "norm_eps": Entry("layer_norm_epsilon", 1e-5),
        },
        _PLAIN_MLP | _BIASES | {"position": "alibi", "activation": "gelu_tanh", "embed_norm": True},
        only={"apply_residual_connection_post_layernorm": False},
        prefix="transformer.",
        layers="transformer.h",
        names={
            "model.embed_tokens": "transformer.word_embeddings",
            "model.embed_norm": "transformer.word_embeddings_layernorm",
            "model.norm": "transformer.ln_f",
            "self_attn.qkv_proj": "self_attention.query_key_value",
            "self_attn.o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        fused="heads",
    ),
}

ENCODERS: dict[str, Family] = {
    "bert": Family(
        "BertModel",
        _COMMON
        | {
            "intermediate_size": Entry("intermediate_size"),
            "max_position_embeddings": Entry("max_position_embeddings", 512),
            "norm_eps": Entry("layer_norm_eps", 1e-12),
            "activation": Entry("hidden_act", "gelu"),
            "type_vocab_size": Entry("type_vocab_size", 2),
        },
        _PLAIN_MLP | _BIASES | {"position": "learned", "embed_norm": True},
        only={
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "add_cross_attention": False,
        },
        prefix="bert.",
        layers="bert.encoder.layer",
        names={
            "embed_tokens": "bert.embeddings.word_embeddings",
            "embed_positions": "bert.embeddings.position_embeddings",
            "embed_types": "bert.embeddings.token_type_embeddings",
            "embed_norm": "bert.embeddings.LayerNorm",
            "pooler": "bert.pooler.dense",
            "self_attn.q_proj": "attention.self.query",
            "self_attn.k_proj": "attention.self.key",
            "self_attn.v_proj": "attention.self.value",
            "self_attn.o_proj": "attention.output.dense",
            "post_attention_layernorm": "attention.output.LayerNorm",
            "mlp.up_proj": "intermediate.dense",
            "mlp.down_proj": "output.dense",
            "output_layernorm": "output.LayerNorm",
        },
        canonical_layers="layers",
    ),
}

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
        if value is None and entry.default is _REQUIRED:
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


def family_of(config: ModelConfig) -> Family:
    """The row of the config's family."""
    return (ENCODERS if isinstance(config, EncoderConfig) else FAMILIES)[config.family]


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
