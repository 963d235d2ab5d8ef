"""A script ends well although a thread of gloo still holds a tensor when its last line is done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# The thread gets the interpreter's lock only when the main thread waits; a default argument holds the group, as
# DeepSpeed's do.
PROGRAM = """
import sys, torch, torch.distributed as dist
from ending import end_process_groups

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())

def hold(group=dist.group.WORLD): ...

sys.setswitchinterval(60)
dist.all_reduce(torch.ones(1_000_000), async_op=True)
end_process_groups()
"""


def test_threads_let_go_before_python_ends() -> None:
    """With `dist.destroy_process_group` alone it aborts, most times."""
    scripts = Path(__file__).parents[2] / "scripts"
    for _ in range(2):
        result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=scripts, timeout=60, capture_output=True)
        assert result.returncode == 0, result.stderr.decode()
