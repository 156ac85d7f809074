"""A minimal runtime for LLaMA-style checkpoints in Hugging Face form.

from fastq import runtime
model = runtime.load_model(folder)
tokenizer = runtime.Tokenizer(folder)
ids = runtime.generate(model, tokenizer.encode("def "), max_new_tokens=64)
print(tokenizer.decode(ids[0].tolist()))
"""

from .checkpoint import load_model
from .config import LlamaConfig
from .generation import generate, generate_tokens, sample
from .kv_cache import KVCache
from .model import LlamaForCausalLM
from .tokenizer import Tokenizer

__all__ = [
    "KVCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "Tokenizer",
    "generate",
    "generate_tokens",
    "load_model",
    "sample",
]
