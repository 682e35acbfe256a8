"""Stillroom: efficient-AI methods as pure functions over Flax modules."""
