"""Small helpers that know nothing of sequence parallelism."""
