"""Loads a Hugging Face folder: config.json and model.safetensors, in one file or in shards.

Every name and shape is checked against the config before any weight is read, so a foreign or
damaged checkpoint gives one clear error and no half-loaded model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import ModelConfig
from .model import CausalLM

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOATS = {"F64", "F32", "F16", "BF16"}
# Old exports hold the rotary frequencies, which the config already fixes.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CausalLM:
    """Loads a LLaMA-style model for inference.

    Args:
        folder: holds config.json and model.safetensors, or the shards that
            model.safetensors.index.json names.
        dtype: float32, float16 or bfloat16; None keeps the one that config.json names, else
            float32.
        device: where the weights go.

    Returns:
        The model in eval mode, its parameters without gradients.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a file is damaged, or its tensors are not those of the config; the message
            names the file, the tensor, what was expected and what came.
        NotImplementedError: a model that the runtime does not compute.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file}: no such file; expected a Hugging Face folder")
    config = ModelConfig.from_file(config_file)
    dtype = _resolve_dtype(dtype, config, config_file)
    with torch.device("meta"):
        model = CausalLM(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    locations = _locate_tensors(folder)
    _check_names(expected, locations, config, folder)
    state = _read_tensors(expected, locations, dtype, torch.device(device))
    _settle_tied_head(state, config, folder)
    model.load_state_dict(state, assign=True, strict=not config.tie_word_embeddings)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _resolve_dtype(
    dtype: torch.dtype | None, config: ModelConfig, config_file: Path
) -> torch.dtype:
    if dtype is None:
        if config.dtype is not None and config.dtype not in _DTYPES:
            raise NotImplementedError(
                f"{config_file}: dtype {config.dtype!r} is not supported; expected one of "
                f"{', '.join(_DTYPES)}"
            )
        return _DTYPES[config.dtype or "float32"]
    if dtype not in _DTYPES.values():
        raise TypeError(f"load_model: dtype is {dtype}, expected one of {', '.join(_DTYPES)}")
    return dtype


def _locate_tensors(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of the checkpoint."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return dict.fromkeys(_tensor_names(single), single)
    if not index.is_file():
        found = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; found {found[0]}, which is a pickle: convert it to safetensors" if found else ""
        raise FileNotFoundError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}{hint}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index}: expected JSON with a weight_map of tensor to file name, got {error!r}"
        ) from None
    locations = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: expected the name of a file beside it, got {shard!r}")
        path = folder / shard
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, but {INDEX_FILE} names it")
        locations.update(dict.fromkeys(_tensor_names(path), path))
    absent = sorted(name for name in weight_map if name not in locations)
    if absent:
        name = absent[0]
        raise ValueError(
            f"{folder / weight_map[name]}: missing tensor {name}, which {INDEX_FILE} places there"
        )
    return locations


def _tensor_names(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _open(path: Path):
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a complete safetensors file, got {path.stat().st_size} bytes that "
            f"do not parse ({error})"
        ) from None


def _check_names(
    expected: dict[str, torch.Size], locations: dict[str, Path], config: ModelConfig, folder: Path
) -> None:
    missing = sorted(expected.keys() - locations.keys())
    if config.tie_word_embeddings and "lm_head.weight" in missing:
        missing.remove("lm_head.weight")
    if missing:
        file = next(iter(locations.values()), folder / SINGLE_FILE)
        raise ValueError(
            f"{file}: missing tensor {missing[0]}{_more(missing)}; config.json asks for "
            f"{len(expected)} tensors, got {len(locations)}"
        )
    extra = sorted(n for n in locations.keys() - expected.keys() if not _IGNORED.fullmatch(n))
    if extra:
        raise ValueError(
            f"{locations[extra[0]]}: unexpected tensor {extra[0]}{_more(extra)}; config.json "
            f"describes a model without it"
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _read_tensors(
    expected: dict[str, torch.Size],
    locations: dict[str, Path],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    by_file: dict[Path, list[str]] = {}
    for name in expected:
        if name in locations:
            by_file.setdefault(locations[name], []).append(name)
    for path, names in by_file.items():
        with _open(path) as file:
            for name in names:
                _check_tensor(path, name, file.get_slice(name), expected[name])
    state = {}
    for path, names in by_file.items():
        with _open(path) as file:
            for name in names:
                state[name] = file.get_tensor(name).to(device=device, dtype=dtype)
    return state


def _check_tensor(path: Path, name: str, stored, shape: torch.Size) -> None:
    if tuple(stored.get_shape()) != tuple(shape):
        raise ValueError(
            f"{path}: tensor {name} has shape {tuple(stored.get_shape())}, expected "
            f"{tuple(shape)} by config.json"
        )
    if stored.get_dtype() not in _FLOATS:
        raise ValueError(
            f"{path}: tensor {name} has dtype {stored.get_dtype()}, expected one of "
            f"{', '.join(sorted(_FLOATS))}"
        )


def _settle_tied_head(state: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    if not config.tie_word_embeddings:
        return
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state["model.embed_tokens.weight"]):
        raise ValueError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight, expected equal "
            "ones because config.json says tie_word_embeddings"
        )
