"""Loads a Hugging Face folder: config.json and model.safetensors, in one file or in shards.

Every name and shape is checked against the config before any weight is read, so a foreign or
damaged checkpoint gives one clear error and no half-loaded model. Files are memory-mapped and read
tensor by tensor: beside the weights themselves, one tensor at a time is in memory. What a
checkpoint holds of quantised layers, `fastq.checkpoints` knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import ModelConfig, read_json
from .families import family_of
from .layout import StoredTensor, stored_module, stored_tensors
from .model import CausalLM

if TYPE_CHECKING:
    from ..checkpoints import Quantization, Stored, StoredLinear

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Location(NamedTuple):
    """The file that holds a tensor, and its name there."""

    path: Path
    name: str


_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Old exports hold the rotary frequencies, which the config already fixes, and causal masks.
_IGNORED = re.compile(
    r"(\S+\.)?(h|layers)\.\d+\.\w+\.(rotary_emb\.inv_freq|masked_bias)"
    r"|(\S+\.)?(h|layers)\.\d+\.(attn|attention)\.bias"
    r"|(\S+\.)?(decoder\.version|embeddings\.position_ids)"
)


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    scheme: str | None = None,
    convert: Callable[[str, nn.Module], nn.Module] | None = None,
    **options: Any,
) -> CausalLM:
    """Loads a decoder of any family in `families.py` for inference, float or quantised.

    Linear layers that the checkpoint holds in INT8, as :func:`fastq.save_quantized` and
    llm-compressor write it (compressed-tensors, W8A8) or bitsandbytes (LLM.int8()), become
    :class:`fastq.nn.Int8Linear` and :class:`fastq.nn.OutlierLinear`.

    Args:
        folder: holds config.json and model.safetensors, or the shards that
            model.safetensors.index.json names.
        dtype: float32, float16 or bfloat16; None keeps the one that config.json names, else
            float32.
        device: where the weights go.
        scheme: quantises every linear layer on the device as soon as it is there, as
            :func:`fastq.quantize` would: at most the quantised weights and one more layer are in
            memory. A scheme without calibration: "w8a8", "w8a8_tensor" or "llm_int8".
        convert: called with the name of every float linear layer and the layer, as soon as its
            weights are on the device and before any later one's are; what it returns takes its
            place. So a model may be quantised that is larger than the device. An output projection
            tied to the embedding is passed last.
        options: of a scheme: `skip`, `overrides`, `rotation`, `threshold` and `per_tensor_weight`
            of :func:`fastq.quantize`.

    Returns:
        The model in eval mode, its parameters without gradients.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a file is damaged, or its tensors are not those of the config; the message
            names the file, the tensor, what was expected and what came. A scheme that needs
            calibration, or for a checkpoint that is quantised already.
        NotImplementedError: a model or a quantisation that the runtime does not compute.
    """
    folder = Path(folder)
    config_file = find_config(folder)
    raw = read_json(config_file)
    config = ModelConfig.from_dict(raw, source=str(config_file))
    dtype = resolve_dtype(dtype, config.dtype, config_file)
    with torch.device("meta"):
        model = CausalLM(config)
    if scheme is not None or options:
        if raw.get("quantization_config") is not None:
            raise ValueError(
                f"load_model: scheme is {scheme!r}, expected None: {config_file} says that the "
                "checkpoint is quantised already"
            )
        convert = _quantiser(model, scheme, options, convert)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    family = family_of(config)
    head, embedding = (
        f"{stored_module(family, module)}.weight" for module in ("lm_head", "model.embed_tokens")
    )
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    tensors = stored_tensors(family, config.head_dim, shapes)
    locations = locate_tensors(folder, tensors, family.prefix)
    tied_head = locations.pop(head, None) if config.tie_word_embeddings else None
    quantised = Quantised.take(tensors, raw, config_file, model, locations)
    check_tensors(folder, tensors, locations, quantised.tensors)
    if tied_head is not None:
        _check_tied_head(tied_head, locations[embedding])
    quantised.fill(model, locations, torch.device(device))
    parameters = read_tensors(tensors, locations, dtype, device, lasting=convert is None)
    fill_parameters(model, parameters, convert)
    if config.tie_word_embeddings:
        model.tie_weights()
        if convert is not None:
            model.lm_head = convert("lm_head", model.lm_head)
    return model.eval().requires_grad_(False)


def _quantiser(
    model: CausalLM,
    scheme: str | None,
    options: dict[str, Any],
    convert: Callable[[str, nn.Module], nn.Module] | None,
) -> Callable[[str, nn.Module], nn.Module]:
    """A `convert` of `load_model` that quantises by a scheme."""
    if scheme is None:
        raise TypeError(f"load_model: {next(iter(options))} is given, expected it with a scheme")
    if convert is not None:
        raise TypeError("load_model: scheme and convert are both given, expected one of them")
    from ..quantization import quantize_linear, uncalibrated_plans

    plans = uncalibrated_plans(model, scheme, **options)
    return lambda name, linear: quantize_linear(linear, plans[name]) if name in plans else linear


class Quantised(NamedTuple):
    """The quantised layers of a checkpoint, and the `tensors` that it holds of them."""

    quantization: Quantization | None = None
    linears: list[StoredLinear] = []
    tensors: dict[str, Stored] = {}

    @classmethod
    def take(
        cls,
        tensors: dict[str, StoredTensor],
        raw: dict[str, Any],
        config_file: Path,
        model: nn.Module,
        locations: dict[str, Location],
    ) -> Quantised:
        """Takes the layers that config.json, which is `raw`, names out of the float `tensors`."""
        if raw.get("quantization_config") is None:
            return cls()
        # Here: `runtime` may be imported by itself, to train a float model.
        from ..checkpoints import expected_tensors, quantised_linears, quantization_of

        quantization = quantization_of(raw, str(config_file))
        linears = quantised_linears(quantization, model, lambda name: _dtype_of(locations, name))
        expected = {}
        for linear in linears:
            expected |= expected_tensors(quantization, linear)
            for leaf in ("weight", "bias"):
                tensors.pop(f"{linear.name}.{leaf}", None)
        return cls(quantization, linears, expected)

    def fill(self, model: nn.Module, locations: dict[str, Location], device: torch.device) -> None:
        """Puts the layers in their places, one after the other."""
        from ..checkpoints import build_linears

        def tensor(name: str) -> Tensor | None:
            return _read(locations[name]) if name in self.tensors and name in locations else None

        for linear in self.linears:
            for path, module in build_linears(self.quantization, linear, tensor, device).items():
                model.set_submodule(path, module)


def find_config(folder: Path) -> Path:
    """The folder's config.json. Raises FileNotFoundError."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file}: no such file; expected a Hugging Face folder")
    return config_file


def resolve_dtype(dtype: torch.dtype | None, named: str | None, config_file: Path) -> torch.dtype:
    """The dtype asked for, else the one that config.json names, else float32."""
    if dtype is None:
        if named is not None and named not in _DTYPES:
            raise NotImplementedError(
                f"{config_file}: dtype {named!r} is not supported; expected one of "
                f"{', '.join(_DTYPES)}"
            )
        return _DTYPES[named or "float32"]
    if dtype not in _DTYPES.values():
        raise TypeError(f"load_model: dtype is {dtype}, expected one of {', '.join(_DTYPES)}")
    return dtype


def locate_tensors(
    folder: Path, tensors: dict[str, StoredTensor], prefix: str
) -> dict[str, Location]:
    """Where each tensor of the checkpoint is, by its full name: one saved without its head may
    leave out `prefix`. Old exports call a norm's weight gamma and its bias beta."""
    files = _locate_files(folder)
    bare = not any(name.startswith(prefix) for name in files)
    modules = {name.rpartition(".")[0] for name in tensors}
    locations = {}
    for stored, path in files.items():
        name = stored.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if bare and prefix + name.rpartition(".")[0] in modules:
            name = prefix + name
        locations[name] = Location(path, stored)
    return locations


def _locate_files(folder: Path) -> dict[str, Path]:
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


def check_tensors(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    locations: dict[str, Location],
    quantised: Mapping[str, Stored] | None = None,
) -> None:
    """Raises ValueError unless the checkpoint holds these tensors, in their shapes, and no other.
    Reads the files' headers only."""
    quantised = quantised or {}
    required = [*tensors, *(name for name, stored in quantised.items() if stored.required)]
    missing = sorted(set(required) - locations.keys())
    if missing:
        file = next(iter(locations.values()), Location(folder / SINGLE_FILE, "")).path
        raise ValueError(
            f"{file}: missing tensor {missing[0]}{_more(missing)}; config.json asks for "
            f"{len(required)} tensors, got {len(locations)}"
        )
    known = tensors.keys() | quantised.keys()
    extra = sorted(n for n in locations.keys() - known if not _IGNORED.fullmatch(n))
    if extra:
        raise ValueError(
            f"{locations[extra[0]].path}: unexpected tensor {extra[0]}{_more(extra)}; config.json "
            f"describes a model without it"
        )
    by_file: dict[Path, list[str]] = {}
    for name in (*tensors, *quantised):
        if name in locations:
            by_file.setdefault(locations[name].path, []).append(name)
    for path, names in by_file.items():
        with _open(path) as file:
            for name in names:
                stored = file.get_slice(locations[name].name)
                if name in quantised:
                    expected = quantised[name]
                    _check_tensor(path, name, stored, expected.shapes, expected.dtypes)
                else:
                    _check_tensor(path, name, stored, (tensors[name].shape,), _STORED_DTYPES)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _check_tensor(
    path: Path, name: str, stored, shapes: tuple[tuple[int, ...], ...], dtypes: Iterable[str]
) -> None:
    if tuple(stored.get_shape()) not in map(tuple, shapes):
        raise ValueError(
            f"{path}: tensor {name} has shape {tuple(stored.get_shape())}, expected "
            f"{' or '.join(str(tuple(shape)) for shape in shapes)} by config.json"
        )
    if stored.get_dtype() not in dtypes:
        raise ValueError(
            f"{path}: tensor {name} has dtype {stored.get_dtype()}, expected one of "
            f"{', '.join(sorted(dtypes))}"
        )


def _dtype_of(locations: dict[str, Location], name: str) -> str | None:
    """A stored tensor's dtype, in safetensors' names; None where there is none."""
    if name not in locations:
        return None
    with _open(locations[name].path) as file:
        return file.get_slice(locations[name].name).get_dtype()


def read_tensors(
    tensors: dict[str, StoredTensor],
    locations: dict[str, Location],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    lasting: bool,
) -> Iterator[tuple[str, Tensor]]:
    """The canonical parameters, one after the other, contiguous.

    Those that stay as they are stored lie in the mapping of their file, whose pages come in as they
    are used: they share one where they are `lasting`. For a copy, or a tensor soon let go, the file
    is mapped anew, so that its pages go too.
    """
    device = torch.device(device)
    shared = {}
    for name, stored in tensors.items():
        path, stored_name = locations[name]
        file = shared[path] if path in shared else shared.setdefault(path, _open(path))
        stored_dtype = _STORED_DTYPES[file.get_slice(stored_name).get_dtype()]
        if stored.is_plain and device.type == "cpu" and stored_dtype == dtype:
            tensor = file.get_tensor(stored_name) if lasting else _read(locations[name])
            yield next(iter(stored.parts)), tensor
        else:
            yield from stored.split(_read(locations[name]), dtype, device)


def _read(location: Location) -> Tensor:
    with _open(location.path) as file:
        return file.get_tensor(location.name)


def fill_parameters(
    model: nn.Module,
    parameters: Iterator[tuple[str, Tensor]],
    convert: Callable[[str, nn.Module], nn.Module] | None,
) -> None:
    """Puts parameters in the place of those on the meta device, and passes every linear layer that
    has all of its own through `convert`."""
    for name, tensor in parameters:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
        del tensor
        if convert is None or not isinstance(module, nn.Linear):
            continue
        if not any(p.is_meta for p in module.parameters()):
            model.set_submodule(path, convert(path, module))


def _check_tied_head(head: Location, embedding: Location) -> None:
    if not torch.equal(_read(head), _read(embedding)):
        raise ValueError(
            f"{head.path}: {head.name} differs from {embedding.name}, expected equal ones because "
            "config.json says tie_word_embeddings"
        )
