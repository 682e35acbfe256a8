"""Machines one does not sit at: their chips, what a compiled program needs of them, how jobs get there.

Depends on `research.core` only.
"""
