"""The waist of the package: the forward and the backward operation on canonical operands, with rules for transformations.

The layers, from the outermost to the innermost:

- `custom_vjp`: the forward and the backward pass are both backend operations.
- `custom_vmap`: a mapped axis becomes a leading axis, or more tokens, or more sequences.
- `_sharding`: spreads an operation over devices.
- A primitive: its lowering rule asks the registry for a backend, once per platform.

Operands are trees: `Queries`, `Cache`, and arrays with one entry per token and query head. The primitive binds their leaves.
"""

import contextlib
import dataclasses
import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32, Shaped

from . import _sharding
from ._backend import Direction, Wanted
from ._formats import is_quantised
from ._platforms import KNOWN_PLATFORMS, platform_of
from ._problem import Cache, Problem, Queries
from ._registry import registry
from ._reverse import once, reverse_only
from ._selection import Request


def _primitive(name, direction: Direction, result_types) -> Primitive:
    """A primitive on the leaves of `tree`. Each platform lowers the primitive through the backend selected for that platform."""
    primitive = Primitive(name)
    primitive.multiple_results = True

    @primitive.def_abstract_eval
    def _(*leaves, tree, request, **params):
        return result_types(request, *tree.unflatten(leaves), **params)

    def plan(platform, leaves, tree, request, params):
        """For operands of these types: a context manager, and a function that does the work inside the context."""
        types = tree.unflatten([ShapedArray(x.shape, x.dtype) for x in leaves])
        results = result_types(request, *types, **params)
        if any(0 in x.shape for x in results):  # `vmap` over an axis of size 0
            return contextlib.nullcontext(), lambda *leaves: [jnp.zeros(x.shape, x.dtype) for x in results]
        problem = Problem.of(types[0], types[1], request.settings)
        chosen = registry.select(platform, problem, request.backend, direction, request.tuned)
        operation = getattr(chosen.backend, direction)

        def run(*leaves):
            made = operation(chosen.problem, chosen.target, *tree.unflatten(leaves), **params)
            got, wanted = ([f"{x.dtype.name}{list(x.shape)}" for x in arrays] for arrays in (made, results))
            if got != wanted:
                raise TypeError(
                    f"The backend {chosen.backend.name!r} must return {', '.join(wanted)} from {direction}, got {', '.join(got)}."
                )
            return made

        return chosen.backend.lowering(chosen.target), run

    def lower(ctx, *leaves, platform=None, tree, request, **params):
        surrounding, run = plan(platform or ctx.module_context.platforms[0], ctx.avals_in, tree, request, params)
        # The types that a backend sees do not say how arrays vary over a mesh. So a backend need not declare that of its results.
        ctx = ctx.replace(avals_in=[ShapedArray(x.shape, x.dtype) for x in ctx.avals_in])
        with surrounding, _sharding.wide(ctx.avals_in[0].dtype):
            return mlir.lower_fun(run, multiple_results=True)(ctx, *leaves)

    mlir.register_lowering(primitive, lower)
    for platform in KNOWN_PLATFORMS:  # one rule each: an export for several platforms holds a backend for each
        mlir.register_lowering(primitive, functools.partial(lower, platform=platform), platform=platform)

    @primitive.def_impl
    def _(*leaves, tree, request, **params):  # reached only under jax.disable_jit
        device, *_ = leaves[0].devices()
        surrounding, run = plan(platform_of(device), leaves, tree, request, params)
        with surrounding:
            return run(*leaves)

    return primitive


def _forward_types(request, queries, cache):
    query = queries.query
    per_head = NamedSharding(query.sharding.mesh, PartitionSpec(*query.sharding.spec[:-1]))
    problem = Problem.of(queries, cache, request.settings)
    out = query.update(shape=(*query.shape[:-1], problem.value_dim), dtype=problem.out_dtype, weak_type=False)
    return [out, query.update(shape=query.shape[:-1], dtype=problem.accum_dtype, sharding=per_head, weak_type=False)]


def _backward_types(request, queries, cache, lse, d_out, delta, *, wanted):
    out_dtype = Problem.of(queries, cache, request.settings).out_dtype
    d_cache = [x for x in (cache.key, cache.value) if x is not None]
    return [queries.query.update(dtype=out_dtype, weak_type=False)] * wanted.query + d_cache * wanted.key_value


_forward_p = _primitive("ragged_decode_forward", "forward", _forward_types)
_backward_p = _primitive("ragged_decode_backward", "backward", _backward_types)


# ---------------------------------------------------------------------------------------------------------------------------
# Mapped axes and many devices


def _forward(request: Request, *args):
    layout = _sharding.Layout((_sharding.QUERIES, _sharding.cache_letters(args[1])), ("bthe", "bth"))
    part = functools.partial(_sharding.forward_part, functools.partial(_bind, _forward_p, layout))
    return once(_sharding.spread(_forward_p.name, part, layout, functools.partial(_batched, layout)))(request, *args)


def _backward(request: Request, wanted: Wanted, *args):
    cache: Any = _sharding.cache_letters(args[1])
    d_cache = (cache.key, *(() if args[1].value is None else (cache.value,)))
    layout = _sharding.Layout(
        (_sharding.QUERIES, cache, *_sharding.PER_TOKEN),
        ("bthd",) * wanted.query + d_cache * wanted.key_value,
        writes_cache=wanted.key_value,
    )
    part = functools.partial(_sharding.backward_part, functools.partial(_bind, _backward_p, layout, wanted=wanted), wanted)
    return once(_sharding.spread(_backward_p.name, part, layout, functools.partial(_batched, layout)))(request, *args)


def _bind(primitive, layout, request, *args, **params):
    """Binds the primitive to operands with any number of leading axes.

    The leading axes of a pool join its pages, and the entries of the page tables are moved to match. All other leading axes join
    the batch. On one device this copies nothing. The operands are those of one device, so `maps` of the settings has local sizes.
    """
    queries, cache = args[:2]
    front = cache.key.shape[:-4]
    request = dataclasses.replace(request, settings=dataclasses.replace(request.settings, maps=front))
    if front and cache.page_table is not None:
        maps = jnp.arange(math.prod(front), dtype=jnp.int32).reshape(*front, 1, 1)
        cache = dataclasses.replace(cache, page_table=cache.pages() + maps * cache.key.shape[-4])
    sizes = {"b": queries.query.shape[-4], "n": cache.key.shape[-4]}

    def join(letters, x):
        if x is None or not front:
            return x
        rest = x.shape[len(front) + 1 :]
        size = sizes[letters[0]]
        return jnp.broadcast_to(x, (*front, size, *rest)).reshape(math.prod(front) * size, *rest)

    leaves, tree = jax.tree.flatten(jax.tree.map(join, layout.operands, (queries, cache, *args[2:])))
    results = primitive.bind(*leaves, tree=tree, request=request, **params)
    return [x.reshape(*front, sizes["b"], *x.shape[1:]) for x in results]


def _batched(layout, op):
    """`op` with a rule for `vmap`, which depends on what is mapped:

    - Key and value: the mapped axis becomes one more leading axis.
    - A page table, on a shared pool: each map becomes more sequences.
    - Only queries, bounds and sinks, on a shared cache: each map becomes more tokens, which have their own bounds. The cache is
      read once and never copied.
    - Everything else: one map is done after another. Examples are a key that is mapped without its value, and gradients of a
      shared cache, because each map has its own gradients.
    """
    op = jax.custom_batching.custom_vmap(op)

    @op.def_vmap
    def rule(size, mapped, request, *args):
        mapped = tuple(mapped[1:])
        cache = mapped[1]
        of_rows = [x for x in (cache.key, cache.value, cache.key_scale, cache.value_scale) if x is not None]
        if cache.key and cache.value is not False:
            spread = lambda mapped, x: x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            results = op(request, *jax.tree.map(spread, mapped, args))
        elif any(of_rows) or layout.writes_cache:
            each, shared = eqx.partition(args, mapped)
            results = jax.lax.map(lambda one: op(request, *eqx.combine(one, shared)), each)
        else:
            results = _fold("b" if cache.page_table else "t", size, mapped, layout, op, request, args)
        return results, [True] * len(results)

    return op


def _fold(into, size, mapped, layout, op, request, args):
    """`op` with the mapped axis joined to the axis `into`: "t" for the tokens, or "b" for the sequences."""
    own = args[0].query.shape[layout.operands[0].query.index(into) - 4]
    # If sequences are split over devices, each device keeps all maps of its own sequences, unless the maps are split.
    maps_are_split = any(jax.tree.leaves(jax.tree.map(lambda m, x: m and _sharding.spec_of(x)[0], mapped, args)))
    maps_are_inner = into == "b" and not maps_are_split
    sizes, place = ((own, size), 0) if maps_are_inner else ((size, own), -1)

    def fold(letters, mapped, x):
        """[M, ..., T, ...] as [..., M * T, ...]. An array without the axis stays as it is. So does an unmapped array in which the
        axis has size 1 because all its entries are alike."""
        if x is None or into not in letters:
            return x
        axis = letters.index(into) - len(letters)
        if not mapped and x.shape[axis] == 1 != own:
            return x
        shape = [*x.shape[:axis], own, *x.shape[axis:][1:]]
        x = jnp.broadcast_to(x, shape if mapped else (size, *shape))
        x = jnp.moveaxis(x, 0, axis + place)
        return x.reshape(*x.shape[: axis - 1], size * own, *x.shape[axis:][1:])

    def unfold(letters, x):
        axis = letters.index(into) - len(letters)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], *sizes, *x.shape[axis:][1:]), axis + place, 0)

    if into == "t" and (mapped[0].start or mapped[0].end):
        request = dataclasses.replace(request, settings=dataclasses.replace(request.settings, junk_between_tokens=True))
    return list(map(unfold, layout.results, op(request, *jax.tree.map(fold, layout.operands, mapped, args))))


# ---------------------------------------------------------------------------------------------------------------------------
# Gradients


def decode(
    request: Request, queries: Queries, cache: Cache
) -> tuple[Float[Array, "batch num_tokens num_q_heads value_dim"], Float[Array, "batch num_tokens num_q_heads"]]:
    """Output and log-sum-exp of one decode step on canonical operands. Differentiable in query, sink, and a padded cache of floats.

    Raises:
        ValueError: a named backend cannot do the call; the types of the operands state shardings that cannot work together; or a
            gradient is asked for of a quantised cache, of its scales or of a pool of pages.
    """
    _typed(**vars(queries), **vars(cache))
    registry.check_named(request.backend, Problem.of(queries, cache, request.settings))
    layout = _sharding.Layout((_sharding.QUERIES, _sharding.cache_letters(cache)), ())
    return _decode(request, *reverse_only(_sharding.align((queries, cache), layout)))


def _typed(
    query: Float[Array, "batch num_tokens num_q_heads head_dim"],
    start: Int32[Array, " batch #num_tokens"] | None,
    end: Int32[Array, " batch #num_tokens"] | None,
    sink: Float[Array, " #batch #num_tokens num_q_heads"] | None,
    key: Shaped[Array, "pages page_size num_kv_heads row_dim"],
    value: Shaped[Array, "pages page_size num_kv_heads value_dim"] | None,
    key_scale: Float[Array, " #pages #num_kv_heads #page_size"] | None,
    value_scale: Float[Array, " #pages #num_kv_heads #page_size"] | None,
    page_table: Int32[Array, "batch pages_per_sequence"] | None,
):
    """Does nothing, except under jaxtyping's import hook, as in the tests: there the hook checks the operands' shapes together."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(request, queries, cache):
    out, lse = _forward(request, queries, cache)
    return out, lse


def _decode_fwd(request, queries, cache):
    wanted = Wanted(queries.query.perturbed, any(x.perturbed for x in (cache.key, cache.value) if x is not None))
    _refuse_gradients(cache)
    queries, cache = jax.tree.map(lambda x: x.value, (queries, cache))
    # The backward pass computes delta from the output, so the output must not be rounded yet. A rounding error in delta is
    # multiplied by whatever all keys have in common.
    wide = dataclasses.replace(request, settings=dataclasses.replace(request.settings, keeps_accum_dtype=True))
    out, lse = _forward(wide, queries, cache)
    return (out.astype(queries.query.dtype), lse), (wanted, queries, cache, out, lse)


def _refuse_gradients(cache):
    quantised = is_quantised(cache.key.value.dtype)
    if not quantised and cache.page_table is None:
        return
    what = "quantised cache" if quantised else "pool of pages"
    for name, x in vars(cache).items():
        if x is not None and x.perturbed:
            raise ValueError(
                f"{name} of a {what} has no gradient, but one is asked for: pass jax.lax.stop_gradient({name}). Only query "
                "and softmax_aux have gradients here."
            )


def _decode_bwd(request, residuals, cotangents):
    wanted, queries, cache, out, lse = residuals
    d_out, d_lse = (
        jnp.zeros_like(residual, dtype=dtype) if isinstance(x, SymbolicZero) else x
        for residual, dtype, x in zip((out, lse), (queries.query.dtype, lse.dtype), cotangents, strict=True)
    )
    # p_j is the probability of key j, and d_logit_j = p_j (d_out . v_j - delta). A sink is a key whose value is 0.
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - d_lse
    sink, d_sink = queries.sink, None
    if sink is not None:
        d_sink = jnp.where(sink > -jnp.inf, -jnp.exp(sink - jnp.maximum(lse, sink)) * delta, 0)
        d_sink = jnp.sum(d_sink, axis=tuple(axis for axis, size in enumerate(sink.shape) if size == 1), keepdims=True)
    some = wanted.query or wanted.key_value
    gradients = iter(_backward(request, wanted, queries, cache, lse, d_out, delta) if some else ())
    d_query = next(gradients) if wanted.query else None
    return Queries(d_query, None, None, d_sink), Cache(next(gradients, None), next(gradients, None))  # pyright: ignore[reportArgumentType]


_decode.defvjp(_decode_fwd, _decode_bwd, symbolic_zeros=True)
