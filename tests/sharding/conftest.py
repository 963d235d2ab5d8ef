"""Property tests draw their examples from a fixed seed and have no deadline: a run says the same thing everywhere."""

from hypothesis import settings

settings.register_profile("hf_usp", deadline=None, derandomize=True, max_examples=100, print_blob=True)
settings.load_profile("hf_usp")
