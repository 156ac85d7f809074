"""A minimal runtime for decoders in Hugging Face form: LLaMA, Mistral, Qwen2, Qwen3, OPT, GPT-2,
GPT-J, GPT-NeoX and BLOOM; and for BERT encoders.

from fastq import runtime
model = runtime.load_model(folder)
tokenizer = runtime.Tokenizer(folder)
for piece in runtime.stream_text(model, tokenizer, "def ", max_new_tokens=64):
    print(piece, end="", flush=True)
"""

from .checkpoint import load_model
from .config import EncoderConfig, ModelConfig
from .encoder import Encoder, EncoderOutput, load_encoder
from .generation import Generation, generate, generate_tokens, stream_text
from .kv_cache import KVCache
from .memory import cache_bytes
from .model import CausalLM
from .sampling import SamplingParameters, sample
from .text_stream import TextStream
from .tokenizer import Tokenizer

__all__ = [
    "CausalLM",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "Generation",
    "KVCache",
    "ModelConfig",
    "SamplingParameters",
    "TextStream",
    "Tokenizer",
    "cache_bytes",
    "generate",
    "generate_tokens",
    "load_encoder",
    "load_model",
    "sample",
    "stream_text",
]
