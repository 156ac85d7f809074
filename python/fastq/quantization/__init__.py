"""Post-training quantisation of whole models."""

from .linear import quantize

__all__ = ["quantize"]
