"""Which examples a batch-dependent computation sees.

Batch norm, batch-relational losses and mixup depend on the batch they are given. Under `jit` an array is the global
batch; under `pmap` it is one device's share. The functions here make both mean the same: the engine names the mapped
axis while it traces (`batch_axis`), and code that needs the other examples asks for them (`mean`, `gather`). Published
PyTorch runs saw one GPU's share instead: `by_group` gives that meaning, in groups of N consecutive examples, on any
number of devices.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

_axis: contextvars.ContextVar[str | None] = contextvars.ContextVar("batch_axis", default=None)


@contextlib.contextmanager
def batch_axis(name: str | None) -> Iterator[None]:
    """Names the mapped axis over which the batch is split, for the code traced inside."""
    token = _axis.set(name)
    try:
        yield
    finally:
        _axis.reset(token)


def axis() -> str | None:
    """The mapped batch axis of the code being traced, or None where arrays hold the whole batch."""
    return _axis.get()


def mean(tree):
    """Mean over the shares of the batch of every leaf; the identity where arrays hold the whole batch."""
    return tree if axis() is None else jax.lax.pmean(tree, axis())


def total(tree):
    """Sum over the shares of the batch of every leaf; the identity where arrays hold the whole batch."""
    return tree if axis() is None else jax.lax.psum(tree, axis())


def gather(tree):
    """The whole batch of every leaf (b, ...) -> (B, ...), in global order."""
    return tree if axis() is None else jax.lax.all_gather(tree, axis(), tiled=True)


def local(tree):
    """The own share of every gathered leaf (B, ...) -> (b, ...): the inverse of `gather`."""
    if axis() is None:
        return tree
    index, size = jax.lax.axis_index(axis()), jax.lax.axis_size(axis())

    def share(x):
        rows = x.shape[0] // size
        return jax.lax.dynamic_slice_in_dim(x, index * rows, rows)

    return jax.tree.map(share, tree)


def by_group(loss: Callable[..., jax.Array], group: int | None, *arrays) -> jax.Array:
    """Mean of a scalar `loss(*arrays)` over groups of `group` consecutive examples.

    Args:
      loss: function of arrays with a leading batch axis, giving a scalar.
      group: examples a group; None takes the global batch as one group.
      *arrays: pytrees of (b, ...) arrays; None leaves pass through.
    Raises:
      ValueError: the batch at hand does not divide into groups.
    """
    if group is None:
        return loss(*gather(arrays))
    batch = jax.tree.leaves(arrays)[0].shape[0]
    if batch % group:
        raise ValueError(
            f"a batch of {batch} examples does not divide into groups of {group}: change `group` or `batch_size`"
        )
    split = jax.tree.map(lambda x: x.reshape(batch // group, group, *x.shape[1:]), arrays)
    return jnp.mean(jax.vmap(loss)(*split))
