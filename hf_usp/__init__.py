"""hf_usp: train any Hugging Face causal LM on sequences far longer than one device holds.

Importing it registers `attn_implementation="usp"` with Transformers and does nothing else. See the README.
"""

from .attention import usp_attention
from .batch import Layout
from .errors import UspBatchError, UspConfigError, UspError, UspKernelError, UspMaskError, UspModelError, UspRankError
from .mesh import UspMesh
from .models.modeling import register
from .models.recurrent import shard_recurrent_layers
from .parallelism import UspParallelismConfig
from .recompute import keep_attention
from .shard import shard
from .unshard import unshard
from .versions import check_versions

__version__ = "0.1.0"
__all__ = [
    "Layout",
    "UspBatchError",
    "UspConfigError",
    "UspError",
    "UspKernelError",
    "UspMaskError",
    "UspMesh",
    "UspModelError",
    "UspParallelismConfig",
    "UspRankError",
    "keep_attention",
    "shard",
    "shard_recurrent_layers",
    "unshard",
    "usp_attention",
]

check_versions()
register()
