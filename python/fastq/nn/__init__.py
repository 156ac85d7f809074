"""Quantised modules."""

from .int8_linear import Int8Linear
from .outlier_linear import OutlierLinear

__all__ = ["Int8Linear", "OutlierLinear"]
