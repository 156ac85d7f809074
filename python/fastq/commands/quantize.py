"""`fastq quantize`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from .arguments import DTYPES, add_command, add_json, add_model, not_negative, positive

# As fastq.quantization.SCHEMES, which would take torch to import: a test compares them.
SCHEMES = (
    "w8a8",
    "w8a8_tensor",
    "w8a8_static",
    "smoothquant_o1",
    "smoothquant_o2",
    "smoothquant_o3",
    "llm_int8",
)
_CALIBRATED = ("w8a8_static", "smoothquant_o1", "smoothquant_o2", "smoothquant_o3")

_SCHEMES_TEXT = """\
schemes, all with INT8 weights and one scale for each of their output channels:
  w8a8            one scale for each token, found as it comes (ZeroQuant); no calibration
  w8a8_tensor     one scale for a layer's whole input, found as it comes; no calibration
  w8a8_static     one scale a layer, from calibration
  smoothquant_o1, smoothquant_o2, smoothquant_o3
                  the same three behind SmoothQuant's smoothing, which is folded into the norms;
                  from calibration
  llm_int8        outliers in the activations are multiplied apart, in float (LLM.int8());
                  no calibration, unless their weights are to be kept in float, too

OUT is in the format of compressed-tensors, which transformers and vLLM load, and for llm_int8 in
that of bitsandbytes. It is there whole or not at all.

examples:
  fastq quantize Llama-3.2-1B Llama-3.2-1B-w8a8
  fastq quantize demo demo-o3 --scheme smoothquant_o3 --alpha search
  fastq quantize opt-1.3b opt-o1 --scheme smoothquant_o1 --calibration text.txt --keep-worst 4
"""


def _alpha(text: str) -> float | str:
    if text == "search":
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, or search, got {text}")
    return value


def _override(text: str) -> tuple[str, str | None]:
    pattern, separator, scheme = text.rpartition("=")
    if not separator or not pattern or scheme not in (*SCHEMES, "float"):
        raise argparse.ArgumentTypeError(
            f"expected PATTERN=SCHEME, the scheme one of {', '.join(SCHEMES)}, float; got {text}"
        )
    return pattern, None if scheme == "float" else scheme


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "quantize",
        help="write an INT8 checkpoint of a model",
        description="Quantises the linear layers of a model and writes it as a folder that "
        "`fastq generate`, `fastq eval` and `fastq bench` take.",
        epilog=_SCHEMES_TEXT,
    )
    add_model(parser)
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--scheme",
        choices=SCHEMES,
        default="w8a8",
        metavar="SCHEME",
        help="see below (default: w8a8)",
    )
    parser.add_argument(
        "--skip",
        action="append",
        metavar="PATTERN",
        help="leave layers in float by name, such as lm_head or 'layers.0.*'; may be given more "
        "than once (default: lm_head)",
    )
    parser.add_argument(
        "--override",
        action="append",
        type=_override,
        metavar="PATTERN=SCHEME",
        help="another scheme for some layers, or float; the last that matches counts",
    )
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration",
        metavar="FILE",
        help="a text file, or stdlib: the source of Python's standard library (the default); read "
        "where the scheme or --keep-worst needs it",
    )
    calibration.add_argument(
        "--samples", type=positive, default=64, help="pieces of that text (default: 64)"
    )
    calibration.add_argument(
        "--length", type=positive, default=512, help="tokens of a piece (default: 512)"
    )
    calibration.add_argument(
        "--alpha",
        type=_alpha,
        default=0.5,
        help="SmoothQuant's migration strength, 0 to 1, or search: the best for each group of "
        "layers (default: 0.5)",
    )
    calibration.add_argument(
        "--percentile", type=float, help="clip static scales at this percentile, such as 99.9"
    )
    calibration.add_argument(
        "--keep-worst",
        type=not_negative,
        default=0,
        metavar="K",
        help="leave the K layers in float that do the most damage alone",
    )
    parser.add_argument(
        "--threshold", type=float, help="of llm_int8: from where on an activation is an outlier"
    )
    parser.add_argument("--device", help="where to work (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of what stays in float (default: the checkpoint's)"
    )
    add_json(parser, "what was written")
    parser.set_defaults(run=run, check=check)


def check(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments together."""
    if args.percentile is not None and not _needs_text(args):
        return "argument --percentile: expected a scheme with static scales"
    return None


def _needs_text(args: argparse.Namespace) -> bool:
    schemes = [args.scheme, *(scheme for _, scheme in args.override or ())]
    return args.keep_worst > 0 or any(scheme in _CALIBRATED for scheme in schemes)


def run(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    from ..checkpoints import save_quantized
    from ..evaluation.speed import weight_bytes
    from ..progress import progress_bar
    from ..quantization import quantize
    from .models import load, model_folder

    source = model_folder(args.model)
    with progress_bar() as report:
        options = _options(args, source)
        if "calibration" in options:
            model = load(args, for_speed=False)
            model = quantize(model, args.scheme, on_progress=report, **options)
        else:
            # Layer by layer: the model in float may be larger than the device.
            report("quantising", 0, 0)
            model = load(args, for_speed=False, scheme=args.scheme, **options)
        report("writing", 0, 0)
        save_quantized(model, args.out, source=source)
    result = {
        "model": args.model,
        "out": args.out,
        "scheme": args.scheme,
        "quantized_layers": _count(model),
        "weight_bytes_before": _float_bytes(source, model.dtype),
        "weight_bytes": weight_bytes(model),
        "seconds": time.perf_counter() - begin,
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    before, after = (result[name] / 1e6 for name in ("weight_bytes_before", "weight_bytes"))
    print(
        f"{args.out}: {result['quantized_layers']} layers in INT8 ({args.scheme}), "
        f"{before:,.1f} MB of weights became {after:,.1f} MB in {result['seconds']:.0f} s"
    )
    return 0


def _options(args: argparse.Namespace, source: Path) -> dict[str, Any]:
    """The keyword arguments of `fastq.quantize`."""
    from ..quantization import calibration_batches
    from ..runtime import ModelConfig, Tokenizer

    options: dict[str, Any] = {}
    if _needs_text(args):
        config = ModelConfig.from_file(source / "config.json")
        length = min(args.length, config.max_position_embeddings)
        options["calibration"] = calibration_batches(
            args.calibration or "stdlib", Tokenizer(source), samples=args.samples, length=length
        )
        options |= {"alpha": args.alpha, "keep_worst": args.keep_worst}
    if args.skip is not None:
        options["skip"] = args.skip
    if args.override is not None:
        options["overrides"] = dict(args.override)
    for name in ("percentile", "threshold"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    return options


def _float_bytes(source: Path, dtype: Any) -> int:
    """What the model takes in float."""
    import torch

    from ..runtime import CausalLM, ModelConfig

    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_file(source / "config.json"))
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _count(model: Any) -> int:
    from ..nn import Int8Linear, OutlierLinear

    return sum(isinstance(module, (Int8Linear, OutlierLinear)) for module in model.modules())
