"""How good a model is: perplexity, and the table of schemes (`table`)."""

from .perplexity import nats_per_token, perplexity, windows

__all__ = ["nats_per_token", "perplexity", "windows"]
