"""The engine: experiments, the loop, sharding, checkpoints, optimisers, metrics and cost. It knows no method."""
