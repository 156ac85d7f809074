"""Post-training quantisation of whole models."""

from ..progress import progress_bar
from .calibration import calibration_batches
from .model import quantize
from .outliers import plant_outliers
from .plan import LinearPlan, quantize_linear
from .planning import uncalibrated_plans
from .selection import DEFAULT_SKIP, SCHEMES
from .sensitivity import sensitivity

__all__ = [
    "DEFAULT_SKIP",
    "SCHEMES",
    "LinearPlan",
    "calibration_batches",
    "plant_outliers",
    "progress_bar",
    "quantize",
    "quantize_linear",
    "sensitivity",
    "uncalibrated_plans",
]
