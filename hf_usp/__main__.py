"""`python -m hf_usp` and `torchrun -m hf_usp` are the command `hf-usp`."""

import sys

from .tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
