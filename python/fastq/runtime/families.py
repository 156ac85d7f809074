"""The families of decoders: how each names its config's entries and its tensors.

A family is one row of `FAMILIES`: which entry of `config.json` gives which field of `ModelConfig`,
what the family fixes, and what its checkpoints call the canonical modules (`layout.py` says how
their tensors are laid out, `config_json.py` reads and writes config.json).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .config import EncoderConfig, ModelConfig

REQUIRED: Any = object()


class Entry(NamedTuple):
    """An entry of config.json: its name, its value where it is absent or null, an older name."""

    name: str
    default: Any = REQUIRED
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


def family_of(config: ModelConfig) -> Family:
    """The row of the config's family."""
    return (ENCODERS if isinstance(config, EncoderConfig) else FAMILIES)[config.family]
