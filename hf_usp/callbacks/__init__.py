"""A training report in the Trainer's own log.

from hf_usp.callbacks import UspMetricsCallback
"""

from .metrics import UspMetricsCallback

__all__ = ["UspMetricsCallback"]
