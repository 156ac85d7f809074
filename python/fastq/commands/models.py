"""Loads what a command line names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..demo.run import MODEL_FOLDER, computes_bfloat16, pick_device
from ..runtime import Tokenizer, load_model
from ..runtime.checkpoint import find_config
from ..runtime.config import read_json
from ..runtime.families import ENCODERS
from .arguments import DEMO


def model_folder(name: str) -> Path:
    """The folder that MODEL means. Raises FileNotFoundError."""
    folder = MODEL_FOLDER if name == DEMO else Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: no such folder; expected a model's folder, or {DEMO!r}")
    return folder


def is_encoder(args: argparse.Namespace) -> bool:
    """Whether MODEL is an encoder, such as BERT, and no decoder."""
    return read_json(find_config(model_folder(args.model))).get("model_type") in ENCODERS


def load(
    args: argparse.Namespace,
    *,
    loader: Callable[..., Any] = load_model,
    for_speed: bool = True,
    **options: Any,
) -> Any:
    """The model that `args` names, on its device and in its dtype; `for_speed` takes float32 where
    the device is slow in the checkpoint's own. `options` are those of `loader`: `load_model` or
    `load_encoder`."""
    device, note = pick_device(args.device)
    if note is not None:
        print(note, file=sys.stderr)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    if for_speed and dtype is None and not computes_bfloat16(device):
        dtype = torch.float32
    return loader(model_folder(args.model), device=device, dtype=dtype, **options)


def load_tokenizer(args: argparse.Namespace) -> Tokenizer:
    return Tokenizer(model_folder(args.model))


def read_text(path: str) -> str:
    """A text file, or standard input for "-". Raises ValueError where it is not UTF-8."""
    try:
        if path == "-":
            return sys.stdin.read()
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, {error}") from None
