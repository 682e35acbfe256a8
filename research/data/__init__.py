"""Input: sources of examples, transforms, and deterministic pipelines addressed by a global index."""
