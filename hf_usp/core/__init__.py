"""One attention call over the mesh, on tensors: heads to tokens (ulysses), the ring, tokens to heads, and back."""
