"""A training report in the Trainer's own log.

from hf_usp.report import UspReport
"""

from .callback import UspReport

__all__ = ["UspReport"]
