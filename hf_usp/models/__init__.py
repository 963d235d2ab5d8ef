"""Models of Transformers: where one is cut, what its layers are told, what is refused, and how a forward is sharded."""
