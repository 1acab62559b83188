"""Meshes of simulated devices (see conftest.py), arrays placed on them, and a call as a function of its arrays."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import draw, floats_of

from ejk_ragged import ragged_decode_attention
from ejk_ragged.testing import TextbookBackend


# Other tests are about what one device computes. The textbook compiles quickly.
call = functools.partial(ragged_decode_attention, backend=TextbookBackend())

SPECS = {
    "whole": P(),
    "batch": P("x"),
    "heads": P(None, None, "x"),
    "sequence": P(None, "x"),
    "two axes": P(None, ("y", "x")),
    "all": P("x", "y", "z"),
}


def make_mesh(*kinds, sizes=(2, 2, 2)):
    """A mesh with the axes x, y and z. Each kind is "Auto" or "Explicit"."""
    axis_types = tuple(AxisType[kind] for kind in kinds)
    return jax.make_mesh(sizes, ("x", "y", "z"), axis_types=axis_types, devices=jax.devices("cpu"))


def place(mesh, spec, arrays):
    """The arrays, with the cache and its scales per row split by the spec of a cache. The other arrays stay where they are."""
    batch, sequence, heads, *_ = *spec, None, None, None
    specs = {"key": spec, "value": spec}
    specs |= {name: P(batch, heads, sequence) for name in ("key_scale", "value_scale") if name in arrays and arrays[name].ndim == 3}
    return arrays | {name: put(mesh, spec, arrays[name]) for name, spec in specs.items()}


def put(mesh, spec, x):
    """`x` on a mesh. An array of NumPy is cut without a program."""
    return jax.device_put(x if isinstance(x, Tracer) else np.asarray(x), NamedSharding(mesh, spec))


def placed(case, mesh, spec):
    """A case's arrays, with the cache on a mesh."""
    return place(mesh, spec, draw(case)[0])


def loss(call, arrays):
    out, lse = call(**arrays, return_lse=True)
    return jnp.sum(jnp.cos(out.astype(jnp.float32))) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0))


def gradients(arrays, call: Callable = call):
    """The gradients of `loss`, by the name of the argument."""
    floats = {name: arrays[name] for name in floats_of(arrays)}
    return jax.grad(lambda floats: loss(call, arrays | floats))(floats)
