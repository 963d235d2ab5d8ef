"""Process groups: the mesh, messages, failures of other ranks, losses over ranks."""
