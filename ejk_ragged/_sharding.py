"""One operation on many devices. The sharding of the cache decides how the work is split, and the other operands follow the cache.

- Split by batch or by heads: each device does its own share. Devices do not communicate.
- Split along the sequence axis: each device works on the rows that it holds. One collective merges the results of the devices.
  The cache is never communicated.

The sharding of the cache comes from XLA's partitioner (plain `jax.jit`), from the type of the cache (a mesh with explicit axes), or
from the caller (`shard_map`).
"""

import contextlib
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ._merge import merge_stacked
from ._problem import Cache, Queries
from ._registry import registry


# A layout has one letter per axis of an operation's operands and results. Operands are (queries, cache, ...).
_NAMES = {"b": "batch", "t": "num_tokens", "h": "num_q_heads", "d": "head_dim", "s": "seq_len", "k": "num_kv_heads"}
_NAMES |= {"n": "num_pages", "p": "page_size", "c": "pages of a sequence", "e": "the value's head_dim"}

QUERIES = Queries("bthd", "bt", "bt", "bth")  # pyright: ignore[reportArgumentType]
PER_TOKEN = ("bth", "bthe", "bth")  # lse, d_out and delta, which the backward operation takes


def cache_letters(cache: Cache) -> Cache:
    """The letters of a padded cache, or of a pool and its page table."""
    pages, row = ("b", "s") if cache.page_table is None else ("n", "p")
    rows, scale = f"{pages}{row}k", f"{pages}k{row}"
    return Cache(f"{rows}d", f"{rows}e", scale, scale, "bc")  # pyright: ignore[reportArgumentType]


class Rows(NamedTuple):
    """A split of the cache's rows: the mesh axes that split them, and the number of rows on all devices together."""

    axes: tuple[str, ...]
    seq_len: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The letters of the axes of operands and results. Axes with the same letter are split alike."""

    operands: Any
    results: tuple[str, ...]
    writes_cache: bool = False  # whether results are shaped like the cache: sums over a kv head's query heads, on one device

    def split(self, mesh, args) -> dict[str, Any]:
        """The entry of a partition spec per letter, from the specs of the arguments. An axis of size 1 is not split.

        The cache decides how sequences, rows and kv heads are split. The queries decide about axes that the cache does not have:
        the sequences if the cache is a pool, and query heads that share the only kv head.
        """
        queries, cache = args[:2]
        query, key = spec_of(queries.query)[-4:], spec_of(cache.key)
        axes = zip(self.operands[1].key, cache.key.shape[-4:], key[-4:], strict=True)
        split = {axis: None if n == 1 else entry for axis, n, entry in axes}
        used = {name for entry in key for name in _axes(entry)}

        def free(entry, size):
            return None if used.intersection(_axes(entry)) or size % _devices(mesh, entry) else entry

        batch, _, heads, _ = queries.query.shape[-4:]
        if "b" not in split:
            split["b"] = free(query[0] or spec_of(cache.page_table)[-2], batch)
            used.update(_axes(split["b"]))
        split["h"] = split["k"] if cache.key.shape[-2] > 1 or self.writes_cache else free(query[2], heads)
        return dict.fromkeys(_NAMES) | split

    def specs(self, mesh, args):
        """The partition specs of operands and results. Mapped axes come first."""
        mapped, split = spec_of(args[1].key)[:-4], self.split(mesh, args)

        def spec(letters, x=None):
            sizes = [0] * len(letters) if x is None else x.shape[len(mapped) :]
            return PartitionSpec(*mapped, *(None if n == 1 else split[axis] for axis, n in zip(letters, sizes, strict=True)))

        operands = jax.tree.map(lambda letters, x: None if x is None else spec(letters, x), self.operands, args)
        return operands, [spec(letters) for letters in self.results]

    def rule(self, args) -> tuple[str, dict[str, Any]]:
        """The layout as a sharding rule for Shardy: the text of the rule, and the sizes of its factors.

        For a padded cache, the rule ties key, value and results together, so that Shardy propagates a split between them. The query
        is tied to the results only by query heads that share the only kv head. If it were tied by other axes, too, a query with
        another split would leave d_key and d_value without a sharding, and XLA would gather them. A pool has no gradient. Its rule
        ties the sequences of the results to the query and the page table.
        """
        queries, cache = args[:2]
        mapped = [f"m{i}" for i in range(cache.key.ndim - 4)]
        kv_heads = cache.key.shape[-2]
        group = queries.query.shape[-2] // kv_heads
        heads = "k" if group == 1 else "(k g)" if kv_heads > 1 else "h"  # Shardy accepts no factor of size 1 together with another
        of_cache = {axis: axis for axis in ("b", "s", "k", *mapped)}
        of_results, of_queries = of_cache | {"h": heads}, {"h": "h"} if heads == "h" else {}
        if cache.page_table is not None:
            of_queries["b"] = of_cache.pop("b")

        def factors(number, letters, tied):
            own = {axis: f"{axis}_{number}" for axis in (*mapped, *letters)}
            return " ".join((own | tied)[axis] for axis in own)

        def tied(x):
            if x is cache.key or x is cache.value:
                return of_cache
            return of_queries if x is queries.query or x is cache.page_table else {}

        letters = jax.tree.leaves(jax.tree.map(lambda letters, x: None if x is None else letters, self.operands, args))
        leaves = jax.tree.leaves(args)
        operands = [factors(i, axes, tied(x)) for i, (axes, x) in enumerate(zip(letters, leaves, strict=True))]
        results = [factors(len(operands) + i, axes, of_results) for i, axes in enumerate(self.results)]
        rule = ", ".join(operands) + " -> " + ", ".join(results)
        return rule, {"g": group} if "(k g)" in rule else {}


def align(args, layout: Layout):
    """The arguments, resharded so that their types agree on how they are split over a mesh. JAX differentiates the resharding.

    Raises:
        ValueError: the types of the arguments state shardings that cannot work together.
    """
    mesh = _mesh(args)
    if AxisType.Explicit in mesh.axis_types:
        _check_cache(mesh, args[1])
        specs, _ = layout.specs(mesh, args)
        wanted_spec = specs[0].query
        for given, wanted, axis in zip(spec_of(args[0].query), wanted_spec, layout.operands[0].query, strict=True):
            if given != wanted and _devices(mesh, given) > 1:
                raise ValueError(
                    f"query must be split along {_NAMES[axis]} by {_named(wanted)}, as key is, or not at all; got {_named(given)}. "
                    f"Reshard it to {wanted_spec}, or key and value to match it."
                )
        args = _reshard(mesh, specs, args)
    return _vary_alike(args, args)


def spread(name, part, layout: Layout, fold):
    """The function `run(request, *args)`, which runs `part(rows, request, *args)` on each device. `args` come from `align`.

    `rows` says how the cache's rows are split, or is None. `fold` adds a rule for `vmap`, which may add leading axes to `args`.
    """

    def run(request, *args):
        mesh = _mesh(args)
        if AxisType.Explicit in mesh.axis_types:
            results = fold(_explicit(part, layout))(request, *args)
            return _vary_alike(results, args)  # callers of vjp choose how their cotangents vary
        if AxisType.Manual in mesh.axis_types:
            return fold(functools.partial(part, None))(request, *args)
        return fold(_automatic(name, part, layout))(request, *args)

    return run


def _mesh(args):
    return jax.typeof(args[1].key).sharding.mesh


def _reshard(mesh, specs, args):
    return jax.tree.map(lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), args, specs)


def _vary_alike(arrays, others):
    """Inside a `shard_map`: the arrays, marked as varying over each mesh axis over which any of `others` varies."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(others)))

    def vary(x):
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, arrays)


def _explicit(part, layout: Layout):
    """`part` on each device, where the types of cache and queries say how these are split."""

    def run(request, *args):
        mesh = _mesh(args)
        in_specs, out_specs = layout.specs(mesh, args)
        given, wanted = dataclasses.replace(layout, writes_cache=False).specs(mesh, args)
        local = functools.partial(part, _rows(args[1].key), request)
        if any(entry for spec in (given[0].query, given[1].key) for entry in spec):
            # Over all mesh axes except those that `vmap` uses. `check_vma` is off: all devices compute the same merged result, but
            # its type says that the result varies between devices.
            local = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return _reshard(mesh, wanted, local(*_reshard(mesh, in_specs, args)))

    return run


def _automatic(name, part, layout: Layout):
    """`part` on each device, where XLA's partitioner decides how the cache is split."""

    def shardings(mesh, operands):
        """The shardings of operands and results."""
        return jax.tree.map(functools.partial(NamedSharding, mesh), layout.specs(mesh, operands))

    def partition(request, mesh, operands, results):
        _check_cache(mesh, operands[1])
        of_operands, of_results = shardings(mesh, operands)

        def local(*args):
            with wide(operands[0].query.dtype):
                return part(_rows(operands[1].key), request, *args)

        return mesh, local, of_results, of_operands

    def infer(mesh, operands, results):  # for XLA's older partitioner, which uses no sharding rules
        return shardings(mesh, operands)[1]

    def run(request, *args):
        op = custom_partitioning(functools.partial(part, None, request))
        rule, sizes = layout.rule(args)
        op.def_partition(functools.partial(partition, request), infer, sharding_rule=rule, **sizes)

        def named(*args):
            return op(*args)

        # The partitioner gets the code from a callback. The program contains only the callback's address, which says nothing about
        # the request. The function's name identifies the request, so that JAX's cache on disk keeps programs of different requests
        # apart.
        named.__name__ = f"{name}_{registry.fingerprint(request)}"
        return jax.jit(named)(*args)

    return run


def wide(dtype):
    """A context in which float64 stays float64. The partitioner's callbacks run in a thread without the caller's `enable_x64`."""
    return jax.enable_x64(True) if dtype == jnp.float64 else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------------
# The work of one device. All arguments may have leading mapped axes, and `op` accepts them.


def forward_part(op, rows: Rows | None, request, queries, cache):
    """Output and log-sum-exp over all keys. Each device contributes the rows that it holds."""
    if rows is None:
        return op(request, queries, cache)
    dtype = None if request.settings.keeps_accum_dtype else queries.query.dtype
    request, queries = _own_rows(rows, request, queries, cache)
    if queries.sink is not None:  # only the first device counts the sink
        sink = jnp.where(lax.axis_index(rows.axes) == 0, queries.sink, -jnp.inf)
        queries = dataclasses.replace(queries, sink=sink)
    out, lse = op(request, queries, cache)
    # One collective for both results, because on GPUs most of its cost is latency. The `[None]` makes the axis along which the
    # devices' results are gathered: if `all_gather` makes that axis, JAX loses the types of explicit axes.
    packed = lax.all_gather(jnp.concatenate([out, lse[..., None]], axis=-1)[None], rows.axes, tiled=True)
    out, lse = merge_stacked(packed[..., :-1], packed[..., -1])
    return [out.astype(dtype or out.dtype), lse]


def backward_part(op, wanted, rows: Rows | None, request, queries, cache, *per_token):
    """The gradients. lse and delta cover all keys, so a device computes the gradients of its own rows alone. d_query is a sum over
    devices."""
    if rows is None:
        return op(request, queries, cache, *per_token)
    dtype = queries.query.dtype
    request, queries = _own_rows(rows, request, queries, cache)
    results = op(request, queries, cache, *per_token)
    if wanted.query:
        results[0] = lax.psum(results[0], rows.axes).astype(dtype)
    return results


def _own_rows(rows: Rows, request, queries, cache):
    """The request and the queries for the rows of this device, with bounds relative to its first row. Where rows do not divide
    evenly, the last devices hold padding beyond the cache, which no bound includes."""
    settings = dataclasses.replace(request.settings, keeps_accum_dtype=True)
    own = cache.key.shape[-3]
    first = lax.axis_index(rows.axes) * own
    start, end = (jnp.clip(x - first, 0, own) for x in queries.bounds(rows.seq_len))
    return dataclasses.replace(request, settings=settings), dataclasses.replace(queries, start=start, end=end)


def spec_of(array) -> tuple:
    """The partition spec of an array's type, with one entry per axis. If the partitioner, which passes shapes, has no spec yet, no
    axis is split."""
    sharding = (array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)).sharding
    spec = getattr(sharding, "spec", None) or ()
    return tuple(spec) + (None,) * (len(array.shape) - len(spec))


def _devices(mesh, entry) -> int:
    """The number of devices over which one entry of a spec splits an axis."""
    return math.prod(mesh.shape[name] for name in _axes(entry))


def _axes(entry) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _rows(key) -> Rows | None:
    """The split of a padded cache's rows, from the type of the key. None if the rows are not split."""
    axes = _axes(spec_of(key)[-3])
    return Rows(axes, key.shape[-3]) if axes else None


def _named(entry):
    return " and ".join(map(repr, _axes(entry))) or "no mesh axis"


def _check_cache(mesh, cache):
    """Checks the split of key and value. Rows and sequences may be split unevenly, but not kv heads."""
    key = spec_of(cache.key)
    value = key if cache.value is None else spec_of(cache.value)
    if key != value:
        raise ValueError(f"key and value must be split alike, got {PartitionSpec(*key)} and {PartitionSpec(*value)}.")
    if key[-1] is not None:
        raise ValueError(
            f"key and value must not be split along head_dim, got {PartitionSpec(*key)}. Split them along batch, seq_len or "
            "num_kv_heads."
        )
    if cache.page_table is not None and (key[-4] is not None or key[-3] is not None):
        raise ValueError(
            f"key and value, pools of pages, must be split along num_kv_heads or not at all, got {PartitionSpec(*key)} for "
            "[num_pages, page_size, num_kv_heads, head_dim]. For a pool that is split by pages, call inside jax.shard_map, where "
            "each device has a page table of its own pages."
        )
    heads, devices = cache.key.shape[-2], _devices(mesh, key[-2])
    if heads % devices:
        raise ValueError(
            f"key and value must be split evenly along num_kv_heads, got {heads} kv heads over {devices} devices by "
            f"{_named(key[-2])}. Split them over fewer devices there, and over the others along batch or seq_len."
        )
