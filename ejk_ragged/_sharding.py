"""One operation on many devices: the cache says how it is split, and everything else follows it.

Split by batch or by heads, every device does its own share and none talks to another. Split along the sequence axis, each does the
rows that it holds, and what they find is merged by one collective over results, never over the cache. Who decides how the cache is
split differs: XLA's partitioner (plain `jax.jit`), the cache's own type (a mesh with explicit axes), or the caller (`shard_map`).
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ._merge import merge_stacked


# An operation's layout has a letter for each axis of its operands and results: batch, heads of the query, sequence, kv heads,
# head_dim. Operands are (query, key, value, start, end, ...).
KEY, VALUE = 1, 2
_NAMES = {"b": "batch", "s": "seq_len", "k": "num_kv_heads", "h": "num_q_heads", "d": "head_dim"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the axes of operands and results belong together."""

    operands: tuple[str, ...]
    results: tuple[str, ...]

    def specs(self, cache):
        """Partition specs of operands and results, for a cache that is split by the spec `cache`, mapped axes in front."""
        mapped, split = cache[:-4], dict(zip("bskd", cache[-4:], strict=True))
        split["h"] = split["k"]
        return [
            [PartitionSpec(*mapped, *(split[axis] for axis in axes)) for axes in arrays] for arrays in (self.operands, self.results)
        ]

    def rule(self, num_mapped, group):
        """The same as a sharding rule for Shardy: its text, and the sizes that it needs.

        Splits spread between cache and results and nowhere else. Were the other operands tied to them, a query that is split in a
        way of its own would leave d_key and d_value without a sharding, and they would be gathered.
        """
        mapped = [f"m{i}" for i in range(num_mapped)]
        tied = {axis: axis for axis in ("b", "s", "k", *mapped)}
        tied["h"] = "(k g)" if group > 1 else "k"

        def factors(number, axes):
            own = {axis: f"{axis}_{number}" for axis in (*mapped, *axes)}
            follows = number in (KEY, VALUE) or number >= len(self.operands)
            return " ".join((own | tied)[axis] if follows else own[axis] for axis in own)

        arrays = [factors(number, axes) for number, axes in enumerate(self.operands + self.results)]
        rule = ", ".join(arrays[: len(self.operands)]) + " -> " + ", ".join(arrays[len(self.operands) :])
        return rule, {"g": group} if "(k g)" in rule else {}


def align(layout: Layout, args):
    """Arguments whose types agree on how they are spread over a mesh; JAX differentiates what it takes to get there.

    Raises:
        ValueError: their types state shardings that cannot work together.
    """
    mesh = jax.typeof(args[KEY]).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        args = _reshard(mesh, _explicit_specs(layout, args), args)
    return _vary_alike(args, args)


def spread(part, layout: Layout, fold, *args):
    """`part(axes, *args)` on each device of whatever mesh there is.

    Args:
        part: what one device does; `axes` are the mesh axes that split the sequence.
        layout: of its arguments and results.
        fold: makes a function of such arguments one that `vmap` may map, by adding axes in front of all arguments.
        *args: as `align` returns them.
    """
    mesh = jax.typeof(args[KEY]).sharding.mesh
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if explicit:
        cache = _spec(jax.typeof(args[KEY]))
        in_specs, out_specs = layout.specs(cache)
        run = fold(functools.partial(part, _axes(cache[-3])))
        # Unchecked: by its type, what is merged on every device differs between them.
        run = jax.shard_map(run, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, axis_names=explicit, check_vma=False)
        return _vary_alike(run(*_reshard(mesh, in_specs, args)), args)  # cotangents come as callers of vjp made them
    if AxisType.Manual in mesh.axis_types:
        return fold(functools.partial(part, ()))(*args)
    return fold(_automatic(part, layout))(*args)


def _reshard(mesh, specs, arrays):
    return [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


def _vary_alike(arrays, others):
    """Inside a `shard_map`: the arrays, as varying over each mesh axis that one of `others` varies over."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in others))
    missing = [tuple(axes - jax.typeof(x).manual_axis_type.varying) for x in arrays]
    return [lax.pcast(x, names, to="varying") if names else x for x, names in zip(arrays, missing, strict=True)]


def _automatic(part, layout: Layout):
    """`part`, with the partitioner deciding how the cache is split."""

    def partition(mesh, operands, results):
        del results
        cache = _spec(operands[KEY])
        _check_cache(cache, _spec(operands[VALUE]))
        in_specs, out_specs = layout.specs(cache)
        shardings = [[NamedSharding(mesh, spec) for spec in specs] for specs in (out_specs, in_specs)]

        def local(*args):
            with wide(operands[KEY].dtype):
                return part(_axes(cache[-3]), *args)

        return mesh, local, shardings[0], tuple(shardings[1])

    def run(*args):
        query, key = args[0], args[KEY]
        op = custom_partitioning(functools.partial(part, ()))
        rule, sizes = layout.rule(key.ndim - 4, query.shape[-2] // key.shape[-2])
        op.def_partition(partition, sharding_rule=rule, **sizes)
        return op(*args)

    return run


def wide(dtype):
    """float64 stays float64 inside: the partitioner calls back from a thread that knows of no `jax.enable_x64` around the call."""
    return jax.enable_x64(True) if dtype == jnp.float64 else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------------
# What one device does. Mapped axes may stand in front of all arguments; `op` takes them too.


def forward_part(op, settings, axes, query, key, value, start, end, sink):
    """Output and log-sum-exp of all keys, from the rows that this device holds of them."""
    if not axes:
        return op(query, key, value, start, end, sink, settings=settings)
    start, end = _own_rows(axes, key, start, end)
    sink = jnp.where(lax.axis_index(axes) == 0, sink, -jnp.inf)  # counted once
    out, lse = op(query, key, value, start, end, sink, settings=dataclasses.replace(settings, partial=True))
    # One collective for both: on GPUs its latency is most of what it costs.
    packed = lax.all_gather(jnp.concatenate([out, lse[..., None]], axis=-1), axes)
    out, lse = merge_stacked(packed[..., :-1], packed[..., -1])
    return [out.astype(query.dtype), lse]


def backward_part(op, settings, wanted, axes, query, key, value, start, end, lse, d_out, delta):
    """The gradients. With lse and delta of all keys, those of a device's own rows need nothing from the others."""
    if not axes:
        return op(query, key, value, start, end, lse, d_out, delta, settings=settings)
    start, end = _own_rows(axes, key, start, end)
    settings = dataclasses.replace(settings, partial=True)
    results = op(query, key, value, start, end, lse, d_out, delta, settings=settings)
    if wanted.query:
        results[0] = lax.psum(results[0], axes).astype(query.dtype)
    return results


def _own_rows(axes, key, start, end):
    """Lengths as seen from the rows that this device holds."""
    rows = key.shape[-3]
    first = lax.axis_index(axes) * rows
    return [jnp.clip(jnp.maximum(x, 0) - first, 0, rows) for x in (start, end)]


# ---------------------------------------------------------------------------------------------------------------------------
# Specs


def _spec(array):
    """The partition spec of an array with a sharding, an entry for each axis."""
    spec = array.sharding.spec
    return tuple(spec) + (None,) * (len(array.shape) - len(spec))


def _axes(entry) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _named(entry):
    return " and ".join(map(repr, _axes(entry))) or "no mesh axis"


def _check_cache(key, value):
    if key != value:
        raise ValueError(f"key and value must be split alike, got {PartitionSpec(*key)} and {PartitionSpec(*value)}.")
    if key[-1] is not None:
        raise ValueError(
            f"key and value must not be split along head_dim, got {PartitionSpec(*key)}. Split them along batch, seq_len or "
            "num_kv_heads."
        )


def _explicit_specs(layout, args):
    """Specs that the arguments should have, by their types; an axis that is not split yet may become so."""
    cache = _spec(jax.typeof(args[KEY]))
    _check_cache(cache, _spec(jax.typeof(args[VALUE])))
    specs, _ = layout.specs(cache)
    for given, wanted, axis in zip(_spec(jax.typeof(args[0])), specs[0], layout.operands[0], strict=True):
        if given not in (None, wanted):
            raise ValueError(
                f"query must be split along {_NAMES[axis]} by {_named(wanted)}, as key is, or not at all; got {_named(given)}. "
                f"Reshard it to {specs[0]}, or key and value to match it."
            )
    return specs
