"""Writes a quantised model as a folder of Hugging Face."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import bitsandbytes, compressed_tensors
from .atomic_folder import replaced_folder
from .shards import Part, bytes_of, write_shards
from .stored_linears import QUANTISED, StoredLinear, stored_linears, stored_tensors

# What goes with a model but for its weights and config.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def save_quantized(
    model: nn.Module,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    scale_dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a quantised model, as a whole or not at all.

    A model of :class:`fastq.nn.Int8Linear` layers is written in the format "int-quantized" of
    compressed-tensors, which transformers and vLLM load (vLLM only with scales for each token or
    static ones), one of :class:`fastq.nn.OutlierLinear` layers in that of bitsandbytes.
    :func:`fastq.runtime.load_model` gives the same model again, bit for bit.

    An older checkpoint in `folder` is replaced at the end, in one step where the system can. Until
    then, and where anything fails, it stays as it was.

    Args:
        model: a :class:`fastq.runtime.CausalLM`, or a model of transformers, on any device.
        folder: a new folder, or one that holds a checkpoint and nothing else.
        source: the folder that the model came from: its config.json is kept, but for the
            quantisation and the dtype, and its tokenizer is copied. None: the model's config alone.
        max_shard_size: bytes, or text such as "5GB"; so much memory is needed at a time.
        scale_dtype: float32 keeps scales as they are. llm-compressor writes them in the model's
            dtype, to which transformers rounds them in any case; a 16-bit dtype makes the file such
            a one.

    Raises:
        TypeError: not a module, or one without a config and no source.
        ValueError: nothing is quantised, or both ways; or layers that the checkpoint holds as one
            differ; or a source of another model.
        NotImplementedError: what the format cannot hold: rotation, smoothing that is not folded
            into the norms, kept float columns, layers that are no ``nn.Linear`` in transformers.
        FileExistsError: the folder holds something else.
        FileNotFoundError: the folder's parent or the source is absent.

    Source: compressed-tensors 0.20, bitsandbytes 0.50 and transformers 5.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"save_quantized: model is a {kind}, expected a torch.nn.Module")
    if scale_dtype not in _SCALE_DTYPES:
        raise TypeError(
            f"save_quantized: scale_dtype is {scale_dtype}, expected one of float32, float16, "
            "bfloat16"
        )
    max_bytes = bytes_of(max_shard_size)
    if getattr(model, "_weight_conversions", None):
        raise NotImplementedError(
            f"save_quantized: {type(model).__name__} is stored under other names than its own; "
            "expected a model without weight conversions"
        )
    linears = stored_linears(model)
    parameters = _parameters(model)
    dtype = _dtype(parameters)
    config = _config(model, source, dtype)
    tied = _settle_head(model, config)
    quantization, write = _format(linears, scale_dtype)
    config["quantization_config"] = quantization
    parts = [
        _quantised_part(linear, write, dtype) for linear in linears.values() if linear.is_quantised
    ]
    parts += _float_parts(model, {k: v for k, v in parameters.items() if k not in tied})
    with replaced_folder(folder) as fresh:
        write_shards(fresh, parts, max_bytes)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (fresh / "config.json").write_text(text, encoding="utf-8")
        for name in _COPIED if source is not None else ():
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, fresh / name)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of the modules that are not quantised."""
    parameters = {}
    for prefix, module in model.named_modules():
        if isinstance(module, QUANTISED):
            continue
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        own |= {k: v for k, v in buffers if k not in module._non_persistent_buffers_set}
        parameters |= {f"{prefix}.{name}".lstrip("."): tensor for name, tensor in own.items()}
    return parameters


def _dtype(parameters: dict[str, Tensor]) -> torch.dtype:
    floats = [t.dtype for t in parameters.values() if t.is_floating_point()]
    return floats[0] if floats else torch.float32


def _config(model: nn.Module, source: str | Path | None, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of the model, of its dtype."""
    from ..runtime.config import ModelConfig

    own = getattr(model, "config", None)
    if source is not None:
        file = Path(source) / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        if isinstance(own, ModelConfig):
            found = type(own).from_dict(config, source=str(file))
            if replace(found, dtype=own.dtype) != own:
                raise ValueError(
                    f"save_quantized: {file} describes {found}, expected the model's {own}"
                )
    elif isinstance(own, ModelConfig):
        config = own.to_dict()
    elif hasattr(own, "to_json_string"):
        config = json.loads(own.to_json_string(use_diff=False))
        config["architectures"] = [type(model).__name__]
    else:
        raise TypeError(
            f"save_quantized: {type(model).__name__} has no config of fastq's runtime or of "
            "transformers; expected one, or a source"
        )
    name = str(dtype).removeprefix("torch.")
    return config | {
        key: name for key in ("dtype", "torch_dtype") if key in config or key == "dtype"
    }


def _settle_head(model: nn.Module, config: dict[str, Any]) -> set[str]:
    """The parameters that are left out since the head is the embedding. Where the head is
    quantised, it is not: the config says so, then."""
    own = getattr(model, "config", None)  # which knows what the file leaves to a default
    if not getattr(own, "tie_word_embeddings", config.get("tie_word_embeddings")):
        return set()
    seen: dict[int, str] = {}
    tied = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if seen.setdefault(id(parameter), name) != name:
            tied.add(name)
    config["tie_word_embeddings"] = bool(tied)
    return tied


def _format(linears: dict[str, StoredLinear], scale_dtype: torch.dtype) -> tuple[dict, Any]:
    """config.json's quantization_config, and what writes a layer."""
    schemes, thresholds = {}, {}
    for name, linear in linears.items():
        first = next(iter(linear.modules.values()))
        if linear.is_quantised:
            schemes[name] = getattr(first, "scheme", "llm_int8")
            thresholds[name] = getattr(first, "threshold", None)
    floats = [n for name, own in linears.items() if name not in schemes for n in own.names]
    if not schemes:
        raise ValueError("save_quantized: no layer of the model is quantised; expected one")
    if "llm_int8" not in schemes.values():
        write = partial(compressed_tensors.write, scale_dtype=scale_dtype)
        return compressed_tensors.write_config(schemes, floats), write
    found = {
        scheme if thresholds[name] is None else f"{scheme} with threshold {thresholds[name]:g}"
        for name, scheme in schemes.items()
    }
    if len(found) > 1:
        raise ValueError(
            "save_quantized: bitsandbytes' format has LLM.int8() with one threshold, got "
            + " and ".join(sorted(found))
        )
    threshold = next(iter(thresholds.values()))
    return bitsandbytes.write_config(threshold, floats), bitsandbytes.write


def _quantised_part(linear: StoredLinear, write: Any, dtype: torch.dtype) -> Part:
    def make() -> dict[str, Tensor]:
        state = linear.state()
        tensors = write(linear.name, state)
        if state.bias is not None:
            # In the model's dtype, as everybody writes it, if that is exact.
            rounded = state.bias.to(dtype)
            is_exact = torch.equal(rounded.float(), state.bias)
            tensors[f"{linear.name}.bias"] = rounded if is_exact else state.bias
        return tensors

    size = sum(m.in_features * m.out_features + 8 * m.out_features for m in linear.modules.values())
    return Part(size, make)


def _float_parts(model: nn.Module, parameters: dict[str, Tensor]) -> list[Part]:
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    parts = []
    for name, tensor in stored_tensors(model, shapes).items():
        own = [parameters[part] for part in tensor.parts]
        size = sum(t.numel() * t.element_size() for t in own)
        parts.append(Part(size, partial(_join, name, tensor, parameters)))
    return parts


def _join(name: str, tensor: Any, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.join(parameters)}
