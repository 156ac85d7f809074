"""A minimal runtime for LLaMA-style checkpoints in Hugging Face form.

from fastq import runtime
model = runtime.load_model(folder)
tokenizer = runtime.Tokenizer(folder)
ids = runtime.generate(model, tokenizer.encode("def "), max_new_tokens=64)
print(tokenizer.decode(ids[0].tolist()))
"""

from .checkpoint import load_model
from .config import ModelConfig
from .generation import generate, generate_tokens, sample
from .kv_cache import KVCache
from .model import CausalLM
from .tokenizer import Tokenizer

__all__ = [
    "CausalLM",
    "KVCache",
    "ModelConfig",
    "Tokenizer",
    "generate",
    "generate_tokens",
    "load_model",
    "sample",
]
