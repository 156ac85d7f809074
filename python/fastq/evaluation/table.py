"""The table of schemes that the papers print: one model, quantised every way, by perplexity."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..progress import OnProgress, counter
from ..quantization import plant_outliers, quantize
from ..runtime import CausalLM
from .perplexity import perplexity
from .speed import weight_bytes


@dataclass(frozen=True)
class Row:
    """One line: what `fastq.quantize` is told (no scheme: the model stays in float), and in what
    keys and values are kept."""

    name: str
    scheme: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    is_calibrated: bool = False
    kv_cache: str | None = None


ROWS = (
    Row("float"),
    Row("INT8 per-tensor", "w8a8_tensor", {"per_tensor_weight": True}),
    Row("INT8 per-token", "w8a8", {"per_tensor_weight": True}),
    Row("ZeroQuant W8A8", "w8a8"),
    Row("LLM.int8()", "llm_int8"),
    Row("LLM.int8(), 16-bit outlier weights", "llm_int8", {"keep_outlier_weights": True}, True),
    Row("SmoothQuant O1", "smoothquant_o1", is_calibrated=True),
    Row("SmoothQuant O2", "smoothquant_o2", is_calibrated=True),
    # Static scales meet the inputs that no norm writes, whose few largest elements are far apart.
    Row("SmoothQuant O3, percentile 99.99", "smoothquant_o3", {"percentile": 99.99}, True),
    Row("INT8 KV", kv_cache="int8"),
)


@dataclass
class Line:
    """What a row gave; `change` is relative to the perplexity of the first row."""

    name: str
    scheme: str | None
    options: dict[str, Any]
    kv_cache: str | None
    perplexity: float
    change: float
    weight_bytes: int


def measure_table(
    model: CausalLM,
    tokens: Tensor,
    *,
    calibration: Sequence[Tensor],
    context: int,
    stride: int | None = None,
    batch: int = 16,
    plant: bool = False,
    rows: Sequence[Row] = ROWS,
    on_progress: OnProgress | None = None,
) -> list[Line]:
    """Quantises copies of a float model by each row and measures their perplexity.

    Args:
        model: in float; it stays as it is. A copy of it is in memory beside it.
        tokens: int64 (T,), on the model's device.
        calibration: batches of token ids, for the rows that need them.
        context, stride, batch: as in `nats_per_token`.
        plant: plant outliers first, as `fastq.quantization.plant_outliers` does: 6 channels of
            every norm, 64 times as large.
        rows: what to measure; the first is what the others are compared with.
        on_progress: see `OnProgress`.
    """
    report = on_progress or (lambda label, done, total: None)
    if plant:
        model = copy.deepcopy(model)
        plant_outliers(model)
    lines: list[Line] = []
    for row in rows:
        candidate = model
        if row.scheme is not None:
            candidate = quantize(
                copy.deepcopy(model),
                row.scheme,
                calibration=calibration if row.is_calibrated else None,
                on_progress=lambda what, done, total, name=row.name: report(
                    f"{name}: {what}", done, total
                ),
                **row.options,
            )
        value = perplexity(
            candidate,
            tokens,
            context=context,
            stride=stride,
            batch=batch,
            kv_cache=row.kv_cache,
            on_progress=counter(report, f"{row.name}: perplexity", len(tokens) - 1),
        )
        change = value / lines[0].perplexity - 1 if lines else 0.0
        known = {name: part for name, part in asdict(row).items() if name != "is_calibrated"}
        lines.append(
            Line(**known, perplexity=value, change=change, weight_bytes=weight_bytes(candidate))
        )
    return lines
