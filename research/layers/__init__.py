"""Flax building blocks that two or more backbones share."""
