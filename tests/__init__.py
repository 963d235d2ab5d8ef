"""The tests. A package, so that a folder named like an installed package (`kernels`) does not hide it."""
