"""The waist: one forward and one backward operation on canonical operands, and how JAX's transformations meet them.

From the outside in: `custom_vjp` (both directions are backend operations with the same residuals), `custom_vmap` (mapped axes join
the batch or the tokens), what spreads an operation over devices (`_sharding`), and a primitive of our own whose lowering asks the
registry, platform by platform. Operands are trees, `Queries` and `Cache` and what has a row for each token and head; the primitive
binds their leaves.
"""

import contextlib
import dataclasses
import functools
import math

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
from ._problem import accum_dtype, Cache, Problem, QUANTISED_DTYPES, Queries
from ._registry import KNOWN_PLATFORMS, platform_of, registry, Request


# ---------------------------------------------------------------------------------------------------------------------------
# The primitives


def _primitive(name, direction: Direction, result_types) -> Primitive:
    """A primitive on the leaves of `tree` that each platform lowers through the backend selected for it."""
    primitive = Primitive(name)
    primitive.multiple_results = True

    @primitive.def_abstract_eval
    def _(*leaves, tree, request, **params):
        return result_types(request, *tree.unflatten(leaves), **params)

    def plan(platform, leaves, tree, request, params):
        """What surrounds the work on operands of such types, and a function that does it."""
        types = tree.unflatten([ShapedArray(x.shape, x.dtype) for x in leaves])
        results = result_types(request, *types, **params)
        if any(0 in x.shape for x in results):  # a map over nothing
            return contextlib.nullcontext(), lambda *leaves: [jnp.zeros(x.shape, x.dtype) for x in results]
        problem = Problem.of(types[0], types[1], request.settings)
        chosen = registry.select(platform, problem, request.backend, direction, request.tuned)

        def run(*leaves):
            return _checked(chosen, direction, results, _run(chosen, direction, *tree.unflatten(leaves), **params))

        return chosen.backend.lowering(chosen.target), run

    def lower(ctx, *leaves, platform=None, tree, request, **params):
        surrounding, run = plan(platform or ctx.module_context.platforms[0], ctx.avals_in, tree, request, params)
        # Of how arrays vary over the devices of a mesh, a backend hears nothing: it need not say it of what it makes.
        ctx = ctx.replace(avals_in=[ShapedArray(x.shape, x.dtype) for x in ctx.avals_in])
        with surrounding, _sharding.wide(ctx.avals_in[0].dtype):
            return mlir.lower_fun(run, multiple_results=True)(ctx, *leaves)

    mlir.register_lowering(primitive, lower)
    for platform in KNOWN_PLATFORMS:  # one rule each, so that an artifact for several holds each one's own backend
        mlir.register_lowering(primitive, functools.partial(lower, platform=platform), platform=platform)

    @primitive.def_impl
    def _(*leaves, tree, request, **params):  # only reached under jax.disable_jit: the backend, operation by operation
        device, *_ = leaves[0].devices()
        surrounding, run = plan(platform_of(device), leaves, tree, request, params)
        with surrounding:
            return run(*leaves)

    return primitive


def _run(chosen, direction: Direction, queries, cache, *per_token, **params):
    if not chosen.backend.clips_lengths:
        start, end = (jnp.clip(x, 0, cache.key.shape[1]) for x in (queries.start, queries.end))
        queries = dataclasses.replace(queries, start=start, end=end)
    return getattr(chosen.backend, direction)(chosen.problem, chosen.target, queries, cache, *per_token, **params)


def _checked(chosen, direction: Direction, types, results):
    """What a backend returns is what its contract says."""
    got, wanted = ([f"{x.dtype.name}{list(x.shape)}" for x in arrays] for arrays in (results, types))
    if got != wanted:
        raise TypeError(
            f"The backend {chosen.backend.name!r} must return {', '.join(wanted)} from {direction}, got {', '.join(got)}."
        )
    return results


def _forward_types(request, queries, cache):
    query = queries.query
    per_head = NamedSharding(query.sharding.mesh, PartitionSpec(*query.sharding.spec[:-1]))
    out_dtype = Problem.of(queries, cache, request.settings).out_dtype
    lse = query.update(shape=query.shape[:-1], dtype=accum_dtype(query.dtype), sharding=per_head, weak_type=False)
    return [query.update(dtype=out_dtype, weak_type=False), lse]


def _backward_types(request, queries, cache, lse, d_out, delta, *, wanted):
    del lse, d_out, delta
    out_dtype = Problem.of(queries, cache, request.settings).out_dtype
    return [queries.query.update(dtype=out_dtype, weak_type=False)] * wanted.query + [cache.key, cache.value] * wanted.key_value


_forward_p = _primitive("ragged_decode_forward", "forward", _forward_types)
_backward_p = _primitive("ragged_decode_backward", "backward", _backward_types)


# ---------------------------------------------------------------------------------------------------------------------------
# Mapped axes and many devices

# Operands by the letters of their axes (see `_sharding.Layout`).
_OPERANDS = (Queries("bthd", "bt", "bt", "bth"), Cache("bskd", "bskd", "bks", "bks"))  # pyright: ignore[reportArgumentType]
_PER_TOKEN = ("bth", "bthd", "bth")  # of the backward operation: lse, d_out, delta


def _forward(request: Request, *args):
    layout = _sharding.Layout(_OPERANDS, ("bthd", "bth"))
    part = functools.partial(_sharding.forward_part, functools.partial(_bind, _forward_p))
    return _once(_sharding.spread(part, layout, _batched))(request, *args)


def _backward(request: Request, wanted: Wanted, *args):
    layout = _sharding.Layout((*_OPERANDS, *_PER_TOKEN), ("bthd",) * wanted.query + ("bskd", "bskd") * wanted.key_value)
    part = functools.partial(_sharding.backward_part, functools.partial(_bind, _backward_p, wanted=wanted), wanted)
    return _once(_sharding.spread(part, layout, functools.partial(_batched, writes_cache=wanted.key_value)))(request, *args)


def _bind(primitive, request, *args, **params):
    """The primitive, on operands with any number of axes in front: they join the batch, which on one device is no copy."""
    *front, batch = args[1].key.shape[:-3]

    def join(x):
        rest = x.shape[len(front) + 1 :]
        return jnp.broadcast_to(x, (*front, batch, *rest)).reshape(math.prod(front) * batch, *rest) if front else x

    leaves, tree = jax.tree.flatten(args)
    results = primitive.bind(*map(join, leaves), tree=tree, request=request, **params)
    return [x.reshape(*front, batch, *x.shape[1:]) for x in results]


def _once(op):
    """`op`, whose own derivative is an error: it belongs to a `custom_vjp` already."""
    op = jax.custom_jvp(op)

    @op.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            "ragged_decode_attention is differentiated once, in reverse mode (jax.grad, jax.vjp, jax.jacrev). Second derivatives "
            "(jax.hessian, the gradient of a gradient) and forward mode (jax.jvp, jax.jacfwd) are not supported."
        )

    return op


def _batched(op, writes_cache=False):
    """`op` with a rule for vmap; `writes_cache` says whether results are shaped like the cache.

    A mapped cache is one more axis in front. Where the cache is shared, what is mapped becomes more tokens, each with bounds of its
    own, so that the cache is read once and never copied. What remains is done one after another: a key that is mapped without its
    value, say, or gradients of a shared cache, of which each map has its own.
    """
    op = jax.custom_batching.custom_vmap(op)

    @op.def_vmap
    def rule(size, mapped, request, *args):
        _, *mapped = mapped
        cache = mapped[1]
        if cache.key and cache.value:
            results = op(request, *jax.tree.map(functools.partial(_broadcast, size), tuple(mapped), args))
        elif not any(jax.tree.leaves(cache)) and not writes_cache:
            results = _fold_into_tokens(op, size, mapped, request, *args)
        else:
            results = _one_by_one(functools.partial(op, request), mapped, args)
        return results, [True] * len(results)

    return op


def _broadcast(size, mapped, x):
    return x if mapped else jnp.broadcast_to(x, (size, *x.shape))


def _fold_into_tokens(op, size, mapped, request, queries, cache, *per_token):
    num_tokens = queries.query.shape[-3]

    def fold(letters, mapped, x, alike=False):
        """[M, ..., T, ...] as [..., M * T, ...]; what is alike for all tokens may stay so."""
        axis = letters.index("t") - len(letters)
        if alike and not mapped and x.shape[axis] == 1:
            return x
        shape = [*x.shape[:axis], num_tokens, *x.shape[axis:][1:]]
        x = jnp.broadcast_to(x, shape if mapped else (size, *shape))
        x = jnp.moveaxis(x, 0, axis - 1)
        return x.reshape(*x.shape[: axis - 1], size * num_tokens, *x.shape[axis:][1:])

    def unfold(letters, x):
        axis = letters.index("t") - len(letters)
        x = x.reshape(*x.shape[:axis], size, num_tokens, *x.shape[axis:][1:])
        return jnp.moveaxis(x, axis - 1, 0)

    if mapped[0].start or mapped[0].end:
        request = dataclasses.replace(request, settings=dataclasses.replace(request.settings, gaps=True))
    letters = vars(_OPERANDS[0])
    queries = Queries(
        **{name: fold(letters[name], getattr(mapped[0], name), x, alike=name != "query") for name, x in vars(queries).items()}
    )
    per_token = map(fold, _PER_TOKEN, mapped[2:], per_token)
    return list(map(unfold, ("bthd", "bth"), op(request, queries, cache, *per_token)))


def _one_by_one(op, mapped, args):
    leaves, tree = jax.tree.flatten(args)
    mapped = jax.tree.leaves(mapped)

    def one(mapped_leaves):
        remaining = iter(mapped_leaves)
        return op(*tree.unflatten([next(remaining) if m else x for m, x in zip(mapped, leaves, strict=True)]))

    return jax.lax.map(one, [x for m, x in zip(mapped, leaves, strict=True) if m])


# ---------------------------------------------------------------------------------------------------------------------------
# Gradients


def decode(
    request: Request, queries: Queries, cache: Cache
) -> tuple[Float[Array, "batch num_tokens num_q_heads head_dim"], Float[Array, "batch num_tokens num_q_heads"]]:
    """Output and log-sum-exp of one decode step on canonical operands; differentiable in query, sink and a cache of floats.

    Raises:
        ValueError: a named backend that cannot do it; shardings that cannot work together, where types state them; a gradient of a
            quantised cache or its scales.
    """
    _typed(**vars(queries), **vars(cache))
    registry.check_named(request.backend, Problem.of(queries, cache, request.settings))
    return _decode(request, *_sharding.align((queries, cache), _sharding.Layout(_OPERANDS, ())))


def _typed(
    query: Float[Array, "batch num_tokens num_q_heads head_dim"],
    start: Int32[Array, " batch #num_tokens"],
    end: Int32[Array, " batch #num_tokens"],
    sink: Float[Array, " #batch #num_tokens num_q_heads"],
    key: Shaped[Array, "batch seq_len num_kv_heads head_dim"],
    value: Shaped[Array, "batch seq_len num_kv_heads head_dim"],
    key_scale: Float[Array, " #batch #num_kv_heads #seq_len"] | None,
    value_scale: Float[Array, " #batch #num_kv_heads #seq_len"] | None,
):
    """Does nothing; where jaxtyping's import hook is on, as in the tests, it holds the operands to their types together."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(request, queries, cache):
    out, lse = _forward(request, queries, cache)
    return out, lse


def _decode_fwd(request, queries, cache):
    wanted = Wanted(queries.query.perturbed, cache.key.perturbed or cache.value.perturbed)
    _refuse_gradients_of_quantised(cache)
    queries, cache = jax.tree.map(lambda x: x.value, (queries, cache))
    # The backward pass takes delta from the output. What rounding takes away from that one multiplies what all keys share.
    wide = dataclasses.replace(request, settings=dataclasses.replace(request.settings, partial=True))
    out, lse = _forward(wide, queries, cache)
    return (out.astype(queries.query.dtype), lse), (wanted, queries, cache, out, lse)


def _refuse_gradients_of_quantised(cache):
    for name, x in vars(cache).items():
        if x is not None and x.perturbed and cache.key.value.dtype.name in QUANTISED_DTYPES:
            raise ValueError(
                f"{name} of a quantised cache has no gradient, but one is asked for: pass jax.lax.stop_gradient({name}). Query and "
                "softmax_aux have theirs."
            )


def _decode_bwd(request, residuals, cotangents):
    wanted, queries, cache, out, lse = residuals
    sink = queries.sink
    d_out, d_lse = (
        jnp.zeros_like(residual, dtype=dtype) if isinstance(x, SymbolicZero) else x
        for residual, dtype, x in zip((out, lse), (queries.query.dtype, lse.dtype), cotangents, strict=True)
    )
    # With p_j the probability of key j: d_logit_j = p_j (d_out . v_j - delta), and the sink is a key without a value.
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - d_lse
    d_sink = jnp.where(sink > -jnp.inf, -jnp.exp(sink - jnp.maximum(lse, sink)) * delta, 0)
    alike = tuple(axis for axis, size in enumerate(sink.shape) if size == 1)
    d_sink = jnp.sum(d_sink, axis=alike, keepdims=True)
    d_query = d_key = d_value = None
    if wanted.query or wanted.key_value:
        gradients = _backward(request, wanted, queries, cache, lse, d_out, delta)
        if wanted.query:
            d_query, *gradients = gradients
        if wanted.key_value:
            d_key, d_value = gradients
    return Queries(d_query, None, None, d_sink), Cache(d_key, d_value)  # pyright: ignore[reportArgumentType]


_decode.defvjp(_decode_fwd, _decode_bwd, symbolic_zeros=True)
