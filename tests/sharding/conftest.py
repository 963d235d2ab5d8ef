"""Property tests draw their examples from a fixed seed and have no deadline: a run says the same thing everywhere.

`make fast` draws a fifth of them: HYPOTHESIS_PROFILE=fast.
"""

import os

from hypothesis import settings

settings.register_profile("hf_usp", deadline=None, derandomize=True, max_examples=100, print_blob=True)
settings.register_profile("fast", settings.get_profile("hf_usp"), max_examples=20)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "hf_usp"))
