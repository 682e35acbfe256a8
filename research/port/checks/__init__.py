"""How each golden case is computed by this code: one module a method, `CHECKS = {case: function}`.

A check takes a `research.port.verify.Golden` and returns `{key: array}` for every `y/` key of the file.
"""
