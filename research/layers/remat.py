"""Rematerialisation of blocks: activations computed again in the backward pass instead of being kept."""

import jax
from flax import linen as nn


def rematerialised(block: type[nn.Module], remat: bool | str) -> type[nn.Module]:
    """`block`, a module called as `block(...)(x, train)`, with activation checkpointing.

    Args:
      remat: False for none, True to keep only the block's input, or the name of a policy in `jax.checkpoint_policies`
        such as `dots_saveable` (keep the results of matrix products).
    Raises:
      ValueError: no policy of that name.
    """
    if not remat:
        return block
    policy = None if remat is True else getattr(jax.checkpoint_policies, str(remat), None)
    if remat is not True and policy is None:
        known = [name for name in dir(jax.checkpoint_policies) if not name.startswith("_")]
        raise ValueError(f"remat: {remat!r} is no name in jax.checkpoint_policies ({', '.join(known)}), true or false")
    return nn.remat(block, policy=policy, static_argnums=(2,))
