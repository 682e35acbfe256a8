"""Operations with kernels of their own, a folder each: `reference.py` is the meaning, `__init__.py` the public op."""
