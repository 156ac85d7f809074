"""A minimal runtime for decoders in Hugging Face form: LLaMA, Mistral, Qwen2, Qwen3, OPT, GPT-2,
GPT-J, GPT-NeoX and BLOOM; and for BERT encoders.

from fastq import runtime
model = runtime.load_model(folder)
tokenizer = runtime.Tokenizer(folder)
ids = runtime.generate(model, tokenizer.encode("def "), max_new_tokens=64)
print(tokenizer.decode(ids[0].tolist()))
"""

from .checkpoint import load_model
from .config import EncoderConfig, ModelConfig
from .encoder import Encoder, EncoderOutput, load_encoder
from .generation import generate, generate_tokens, sample
from .kv_cache import KVCache
from .model import CausalLM
from .tokenizer import Tokenizer

__all__ = [
    "CausalLM",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "KVCache",
    "ModelConfig",
    "Tokenizer",
    "generate",
    "generate_tokens",
    "load_encoder",
    "load_model",
    "sample",
]
