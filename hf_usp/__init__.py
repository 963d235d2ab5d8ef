"""hf_usp: train Hugging Face causal LMs on sequences longer than one device holds.

Importing it registers `attn_implementation="usp"` with Transformers and does nothing else. See the README.
"""

from .attention.functional import usp_attention
from .batch.layout import SequenceLayout
from .batch.shard import shard
from .batch.unshard import unshard
from .compat import check_versions
from .config import UspParallelismConfig
from .distributed.mesh import UspMesh
from .errors import UspBatchError, UspConfigError, UspError, UspKernelError, UspMaskError, UspModelError, UspRankError
from .integrations.accelerate import remove_context_parallel
from .integrations.once import once
from .integrations.transformers import apply_context_parallel, describe
from .memory.activation_checkpointing import save_attention_outputs
from .models.attention_interface import register
from .models.recurrent_layers import shard_recurrent_layers

__version__ = "0.1.0"
__all__ = [
    "SequenceLayout",
    "UspBatchError",
    "UspConfigError",
    "UspError",
    "UspKernelError",
    "UspMaskError",
    "UspMesh",
    "UspModelError",
    "UspParallelismConfig",
    "UspRankError",
    "apply_context_parallel",
    "describe",
    "once",
    "remove_context_parallel",
    "save_attention_outputs",
    "shard",
    "shard_recurrent_layers",
    "unshard",
    "usp_attention",
]

check_versions()
register()
