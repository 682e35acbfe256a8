"""Official checkpoints in and out, and the check of our numerics against golden arrays."""
