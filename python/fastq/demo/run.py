"""`fastq demo`: the shipped model in its own precision and in INT8, side by side."""

from __future__ import annotations

import copy
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__, ops
from ..evaluation import nats_per_token, windows
from ..evaluation.speed import weight_bytes
from ..nn import Int8Linear
from ..progress import OnProgress, counter
from ..provenance import device_name
from ..quantization import quantize
from ..runtime import CausalLM, Tokenizer, generate_tokens, load_model
from . import corpus

MODEL_FOLDER = Path(__file__).parent / "model"
PROMPT = '''import os


def find_files(folder, pattern):
    """Return the paths of the files'''
SEED = 1
SAMPLING = {"temperature": 0.6, "top_k": 40, "top_p": 0.95}
_WARM_UP_TOKENS = 4


@dataclass
class Figures:
    """What one precision gives."""

    precision: str
    perplexity: float
    weight_bytes: int
    linear_weight_bytes: int
    scored_tokens_per_second: float
    generated_tokens_per_second: float
    sample: str


def pick_device(requested: str | None = None) -> tuple[torch.device, str | None]:
    """The device to run on, and why not the GPU where there is one that fastq cannot use."""
    if requested is not None:
        if torch.device(requested).type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device is {requested}, but torch sees no GPU: see `fastq doctor`")
        return torch.device(requested), None
    if not torch.cuda.is_available():
        return torch.device("cpu"), None
    cuda = ops.describe()["cuda"]
    if cuda is None or not cuda["devices"]:
        return torch.device("cpu"), "fastq cannot use this machine's GPU: see `fastq doctor`"
    return torch.device("cuda", torch.cuda.current_device()), None


def run_demo(
    *,
    device: str | None = None,
    max_tokens: int = 64,
    folder: Path = MODEL_FOLDER,
    stdlib: Path | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Measures both precisions and returns every figure; the keys are those of `--json`.

    `on_progress` is told of each part's tokens. The held-out text is read from `stdlib`, by default
    the running Python's.
    """
    begin = time.perf_counter()
    chosen, note = pick_device(device)
    threads = torch.get_num_threads()
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer(folder)
    dtype = None if computes_bfloat16(chosen) else torch.float32
    model = load_model(folder, device=chosen, dtype=dtype)
    tokens = held_out_tokens(tokenizer, model, stdlib)
    report = on_progress or (lambda label, done, total: None)
    int8_model = quantize(copy.deepcopy(model))
    own = str(model.dtype).removeprefix("torch.")
    torch_threads = _faster_thread_count(model, tokens)
    torch.set_num_threads(torch_threads)
    try:
        results = [
            _measure(own, model, tokenizer, tokens, max_tokens, report),
            _measure("int8", int8_model, tokenizer, tokens, max_tokens, report),
        ]
    finally:
        torch.set_num_threads(threads)
    ratio = results[1].perplexity / results[0].perplexity
    return {
        "fastq": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": str(chosen),
        "device_name": device_name(chosen),
        "threads": ops.get_num_threads(),
        "torch_threads": torch_threads,
        "note": note,
        "card": card,
        "held_out_tokens": len(tokens) - 1,
        "prompt": PROMPT,
        "max_tokens": max_tokens,
        "results": [asdict(figures) for figures in results],
        "int8_perplexity_change": ratio - 1,
        "seconds": time.perf_counter() - begin,
    }


@torch.no_grad()
def _faster_thread_count(model: CausalLM, tokens: Tensor) -> int:
    """How many threads torch itself is fastest with: all of them, or one.

    OpenMP's threads spin while they wait for each other. Where another program has the cores, a
    step of a small model then takes many times longer on all threads than on one.
    """
    threads = torch.get_num_threads()
    if model.device.type != "cpu" or threads == 1:
        return threads
    inputs = windows(tokens[:257], 256)[0]
    seconds = {}
    for count in (threads, 1):
        torch.set_num_threads(count)
        model(inputs)
        begin = time.perf_counter()
        for _ in range(3):
            model(inputs)
        seconds[count] = time.perf_counter() - begin
    torch.set_num_threads(threads)
    return min(seconds, key=seconds.__getitem__)


def held_out_tokens(tokenizer: Tokenizer, model: CausalLM, stdlib: Path | None = None) -> Tensor:
    """The held-out modules one after the other, each behind the token that begins a text."""
    begin = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    ids = []
    texts = list(corpus.held_out_texts(stdlib).values())
    for text_ids in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += begin + text_ids
    return torch.tensor(ids, dtype=torch.int64, device=model.device)


def _measure(
    precision: str,
    model: CausalLM,
    tokenizer: Tokenizer,
    tokens: Tensor,
    max_tokens: int,
    report: OnProgress,
) -> Figures:
    context = model.config.max_position_embeddings
    prompt = [model.config.bos_token_id, *tokenizer.encode(PROMPT)]
    # torch loads and plans its GPU kernels for each length that it meets first: on a GPU all of the
    # work is done once before it is timed, or the precision that comes first would pay for both.
    on_gpu = model.device.type == "cuda"
    list(_generate(model, prompt, max_tokens if on_gpu else _WARM_UP_TOKENS))
    warm_up = tokens if on_gpu else tokens[: 8 * context]
    nats_per_token(model, warm_up, context)

    begin = _synchronised_time(model.device)
    count = counter(report, f"{precision}: perplexity", len(tokens) - 1)
    nats = nats_per_token(model, tokens, context, on_progress=count)
    scoring = _synchronised_time(model.device) - begin

    begin = _synchronised_time(model.device)
    generated = []
    for step in _generate(model, prompt, max_tokens):
        generated.append(step.tokens[0])
        report(f"{precision}: generation", len(generated), max_tokens)
    generating = _synchronised_time(model.device) - begin

    ends = model.config.eos_token_ids
    end = next((i for i, token in enumerate(generated) if token in ends), len(generated))
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, Int8Linear))]
    linear = [m for m in linear if m is not model.lm_head]
    return Figures(
        precision=precision,
        perplexity=math.exp(nats),
        weight_bytes=weight_bytes(model),
        linear_weight_bytes=weight_bytes(nn.ModuleList(linear)),  # parts of one weight together
        scored_tokens_per_second=(len(tokens) - 1) / scoring,
        generated_tokens_per_second=max_tokens / generating,
        sample=tokenizer.decode(generated[:end]),
    )


def _generate(model: CausalLM, prompt: list[int], max_tokens: int):
    return generate_tokens(
        model, prompt, max_new_tokens=max_tokens, stop_token_ids=(), seed=SEED, **SAMPLING
    )


def _synchronised_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are as fast as float32 ones; on an older CPU they crawl."""
    if device.type != "cpu":
        return True
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch built without oneDNN
        return False
