"""load_model(scheme=...): each linear layer is quantised as soon as it is read."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastq.nn import Int8Linear, OutlierLinear
from fastq.quantization import quantize
from fastq.runtime import load_model
from quantized_folders import IDS, save_float


class PeakBytes(TorchDispatchMode):
    """The most bytes that storages made under it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    families = ("llama", "qwen2", "gpt2", "gpt_neox")
    return {name: save_float(tmp_path_factory.mktemp(name), name) for name in families}


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("w8a8", {}),
        ("w8a8", {"rotation": 8, "skip": ["lm_head", "layers.0.mlp"]}),
        ("w8a8_tensor", {"per_tensor_weight": True}),
        ("llm_int8", {"threshold": 3.0}),
        ("w8a8", {"overrides": {"down_proj": "llm_int8", "layers.1": None, "lm_head": "w8a8"}}),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_is_what_quantize_makes(device, folders, family, scheme, options):
    expected = quantize(load_model(folders[family], device=device), scheme, **options)
    model = load_model(folders[family], device=device, scheme=scheme, **options)
    kinds = {n: type(m) for n, m in expected.named_modules()}
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {Int8Linear, OutlierLinear} & set(kinds.values())
    ids = IDS.to(device)
    assert torch.equal(model(ids), expected(ids))
    assert model.model.embed_tokens.weight.dtype == torch.float32


def test_a_layer_at_a_time(folders, monkeypatch):
    """When a layer is quantised, no float layer before it is left."""
    from fastq import quantization

    alive: list[weakref.ref] = []
    quantize_linear = quantization.quantize_linear

    def count(linear, plan):
        assert not any(layer() is not None for layer in alive)
        alive.append(weakref.ref(linear.weight))
        return quantize_linear(linear, plan)

    monkeypatch.setattr(quantization, "quantize_linear", count)
    load_model(folders["llama"], scheme="w8a8")
    assert len(alive) == 14


def weights_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@pytest.mark.cuda
@pytest.mark.parametrize("scheme", ["w8a8", "llm_int8"])
def test_peak_memory_on_a_gpu(tmp_path, scheme):
    """At most the INT8 model and one layer more."""
    folder = save_float(tmp_path, "llama", torch.bfloat16)
    load_model(folder, device="cuda", scheme=scheme)  # what the backend itself takes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(folder, device="cuda", scheme=scheme)
    peak = torch.cuda.max_memory_allocated() - before
    layers = [m for m in model.modules() if isinstance(m, (Int8Linear, OutlierLinear))]
    largest = max(2 * layer.in_features * layer.out_features for layer in layers)
    rounding = 512 * sum(1 for _ in model.state_dict())  # the allocator's, a tensor
    assert peak <= weights_bytes(model) + largest + rounding


@pytest.mark.parametrize("scheme", ["w8a8", "llm_int8"])
def test_peak_memory(tmp_path, scheme):
    folder = save_float(tmp_path, "llama")
    with PeakBytes() as whole:
        model = load_model(folder)
    float_size = weights_bytes(model)
    assert whole.peak >= float_size  # what the measure sees
    del model
    with PeakBytes() as memory:
        model = load_model(folder, scheme=scheme)
    layers = [m for m in model.modules() if isinstance(m, (Int8Linear, OutlierLinear))]
    # The layer, and its tensor in the file.
    largest = 2 * max(4 * layer.in_features * layer.out_features for layer in layers)
    size = weights_bytes(model)
    assert size + largest < 0.8 * float_size
    assert memory.peak <= size + largest


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheme": "smoothquant_o1"}, ValueError, "calibration is None, expected data with sch"),
        ({"scheme": "int4"}, ValueError, "scheme is 'int4', expected one of 'w8a8'"),
        ({"scheme": "w8a8", "skip": ["x"]}, ValueError, "skip holds 'x', which matches no module"),
        ({"skip": ["mlp"]}, TypeError, "load_model: skip is given, expected it with a scheme"),
        ({"scheme": "w8a8", "alpha": 0.5}, TypeError, "alpha"),
        (
            {"scheme": "w8a8", "convert": lambda name, linear: linear},
            TypeError,
            "scheme and convert are both given",
        ),
    ],
    ids=str,
)
def test_bad_options(folders, options, error, message):
    with pytest.raises(error, match=message):
        load_model(folders["llama"], **options)


def test_a_quantised_checkpoint(folders, tmp_path):
    import fastq

    model = load_model(folders["llama"], scheme="w8a8")
    fastq.save_quantized(copy.deepcopy(model), tmp_path)
    with pytest.raises(ValueError, match=r"scheme is 'w8a8', expected None: .*quantised already"):
        load_model(tmp_path, scheme="w8a8")
