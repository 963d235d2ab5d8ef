"""From a full batch to the local batch of one rank, and back."""
