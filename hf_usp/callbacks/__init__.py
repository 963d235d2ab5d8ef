"""A training report in the Trainer's own log.

from hf_usp.report import UspMetricsCallback
"""

from .metrics import UspMetricsCallback

__all__ = ["UspMetricsCallback"]
