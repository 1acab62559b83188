"""The waist: one forward and one backward operation on canonical arguments, and how JAX's transformations meet them.

From the outside in: `custom_vjp` (both directions are backend operations with the same residuals), `custom_vmap` (mapped axes join
the batch or the heads), what spreads an operation over devices (`_sharding`), and a primitive of our own whose lowering asks the
registry, platform by platform.

Canonical arguments, B sequences, Hq query heads on Hkv kv heads, S rows of cache:
    query [B, Hq, D]; key, value [B, S, Hkv, D];
    start, end int32 [B], empty when start >= end, and clipped to [0, S] before a backend sees them, unless it does so itself;
    sink [B, Hq], one logit in the softmax's denominator, -inf for none.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from . import _registry, _sharding
from ._problem import accum_dtype, Problem, Settings


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which gradients are asked for: d_query, and d_key with d_value."""

    query: bool = True
    key_value: bool = True


# ---------------------------------------------------------------------------------------------------------------------------
# The primitives


def _primitive(name, direction, abstract_eval) -> Primitive:
    """A primitive that each platform lowers through the backend selected for it."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract_eval)

    def select(platform, query, key, settings):
        return _registry.select(platform, Problem.of(query, key, settings), settings.backend, direction)

    def lower(ctx, *args, platform=None, settings, **params):
        platform = platform or ctx.module_context.platforms[0]
        chosen = select(platform, ctx.avals_in[0], ctx.avals_in[1], settings)

        def run(*args):
            results = _run(chosen, direction, *args, **params)
            _check_results(chosen, direction, results, ctx.avals_out)
            return results

        # Of how arrays vary over the devices of a mesh, a backend hears nothing: it need not say it of what it makes.
        ctx = ctx.replace(avals_in=[ShapedArray(x.shape, x.dtype) for x in ctx.avals_in])
        with chosen.backend.lowering(chosen.target), _sharding.wide(ctx.avals_in[0].dtype):
            return mlir.lower_fun(run, multiple_results=True)(ctx, *args)

    mlir.register_lowering(primitive, lower)
    for platform in _registry.KNOWN_PLATFORMS:  # one rule each, so that an artifact for several holds each one's own backend
        mlir.register_lowering(primitive, functools.partial(lower, platform=platform), platform=platform)

    @primitive.def_impl
    def _(*args, settings, **params):  # only reached under jax.disable_jit: the backend, operation by operation
        device, *_ = args[0].devices()
        chosen = select(_registry.platform_of(device), args[0], args[1], settings)
        with chosen.backend.lowering(chosen.target):
            return _run(chosen, direction, *args, **params)

    return primitive


def _run(chosen, direction, query, key, value, start, end, *args, **params):
    if not chosen.backend.clips_lengths:
        start, end = (jnp.clip(x, 0, key.shape[1]) for x in (start, end))
    operation = getattr(chosen.backend, direction)
    return operation(chosen.problem, chosen.target, query, key, value, start, end, *args, **params)


def _check_results(chosen, direction, results, avals):
    """What a backend returns is what its contract says."""
    got, wanted = ([f"{x.dtype.name}{list(x.shape)}" for x in arrays] for arrays in (results, avals))
    if got != wanted:
        raise TypeError(
            f"The backend {chosen.backend.name!r} must return {', '.join(wanted)} from {direction}, got {', '.join(got)}."
        )


def _forward_aval(query, key, value, start, end, sink, *, settings):
    del value, start, end, sink
    out_dtype = Problem.of(query, key, settings).out_dtype
    per_head = NamedSharding(query.sharding.mesh, PartitionSpec(*query.sharding.spec[:2]))
    lse = query.update(shape=query.shape[:2], dtype=accum_dtype(query.dtype), sharding=per_head, weak_type=False)
    return [query.update(dtype=out_dtype, weak_type=False), lse]


def _backward_aval(query, key, value, start, end, lse, d_out, delta, *, settings, wanted):
    del start, end, lse, d_out, delta
    out_dtype = Problem.of(query, key, settings).out_dtype
    return [query.update(dtype=out_dtype, weak_type=False)] * wanted.query + [key, value] * wanted.key_value


forward_p = _primitive("ragged_decode_forward", "forward", _forward_aval)
backward_p = _primitive("ragged_decode_backward", "backward", _backward_aval)


# ---------------------------------------------------------------------------------------------------------------------------
# Mapped axes and many devices

# Both operations take (query, key, value, start, end, *per_head): positions of what belongs to the cache, [B, ...].
_CACHE = range(1, 5)
_FORWARD = _sharding.Layout(("bhd", "bskd", "bskd", "b", "b", "bh"), ("bhd", "bh"))
_BACKWARD = _sharding.Layout((*_FORWARD.operands, "bhd", "bh"), ())


def _forward(settings: Settings, *args):
    part = functools.partial(_sharding.forward_part, functools.partial(_bind, forward_p), settings)
    return _sharding.spread(part, _FORWARD, _batched, *args)


def _backward(settings: Settings, wanted: Wanted, *args):
    layout = dataclasses.replace(_BACKWARD, results=("bhd",) * wanted.query + ("bskd", "bskd") * wanted.key_value)
    part = functools.partial(_sharding.backward_part, functools.partial(_bind, backward_p, wanted=wanted), settings, wanted)
    return _sharding.spread(part, layout, functools.partial(_batched, writes_cache=wanted.key_value), *args)


def _bind(primitive, *args, **params):
    """The primitive, on arguments with any number of axes in front: they join the batch, which on one device is no copy."""
    batch = args[0].shape[:-2]
    results = primitive.bind(*(x.reshape(math.prod(batch), *x.shape[len(batch) :]) for x in args), **params)
    return [x.reshape(*batch, *x.shape[1:]) for x in results]


def _batched(op, writes_cache=False):
    """`op` with a rule for vmap; `writes_cache` says whether results are shaped like the cache.

    A mapped cache is one more axis in front. Where only queries are mapped they become more heads of each group, so that a shared
    cache is read once and never copied; what remains (mapped lengths on a shared cache, say) is done one after another.
    """
    op = jax.custom_batching.custom_vmap(op)

    @op.def_vmap
    def rule(size, mapped, *args):
        cache = [mapped[i] for i in _CACHE]
        if cache[0] and cache[1]:  # key and value
            results = op(*(_broadcast(size, m, x) for m, x in zip(mapped, args, strict=True)))
        elif not any(cache) and not writes_cache:
            results = _fold_into_heads(op, size, mapped, args)
        else:
            results = _one_by_one(op, mapped, args)
        return results, [True] * len(results)

    return op


def _broadcast(size, mapped, x):
    return x if mapped else jnp.broadcast_to(x, (size, *x.shape))


def _fold_into_heads(op, size, mapped, args):
    kv_heads, heads_axis = args[1].shape[-2], args[1].ndim - 3

    def fold(m, x):  # [M, ..., B, Hkv * G, ...] -> [..., B, Hkv * M * G, ...]
        x = _broadcast(size, m, x)
        before, after = x.shape[1 : heads_axis + 1], x.shape[heads_axis + 2 :]
        x = jnp.moveaxis(x.reshape(size, *before, kv_heads, -1, *after), 0, heads_axis + 1)
        return x.reshape(*before, -1, *after)

    def unfold(x):
        before, after = x.shape[:heads_axis], x.shape[heads_axis + 1 :]
        x = jnp.moveaxis(x.reshape(*before, kv_heads, size, -1, *after), heads_axis + 1, 0)
        return x.reshape(size, *before, -1, *after)

    query, *per_head = (fold(m, x) for i, (m, x) in enumerate(zip(mapped, args, strict=True)) if i not in _CACHE)
    return [unfold(x) for x in op(query, *(args[i] for i in _CACHE), *per_head)]


def _one_by_one(op, mapped, args):
    def one(mapped_args):
        remaining = iter(mapped_args)
        return op(*(next(remaining) if m else x for m, x in zip(mapped, args, strict=True)))

    return jax.lax.map(one, [x for m, x in zip(mapped, args, strict=True) if m])


# ---------------------------------------------------------------------------------------------------------------------------
# Gradients


def decode(
    settings: Settings,
    query: Float[Array, "batch num_q_heads head_dim"],
    key: Float[Array, "batch seq_len num_kv_heads head_dim"],
    value: Float[Array, "batch seq_len num_kv_heads head_dim"],
    start: Int32[Array, " batch"],
    end: Int32[Array, " batch"],
    sink: Float[Array, "batch num_q_heads"],
) -> tuple[Float[Array, "batch num_q_heads head_dim"], Float[Array, "batch num_q_heads"]]:
    """Output and log-sum-exp of one decode step on canonical arguments; differentiable in all but the lengths.

    Raises:
        ValueError: shardings that cannot work together, where types state them.
    """
    return _decode(settings, *_sharding.align(_FORWARD, (query, key, value, start, end, sink)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(settings, query, key, value, start, end, sink):
    out, lse = _forward(settings, query, key, value, start, end, sink)
    return out, lse


def _decode_fwd(settings, query, key, value, start, end, sink):
    wanted = Wanted(query.perturbed, key.perturbed or value.perturbed)
    args = [x.value for x in (query, key, value, start, end, sink)]
    out, lse = _forward(settings, *args)
    return (out, lse), (wanted, *args, out, lse)


def _decode_bwd(settings, residuals, cotangents):
    wanted, query, key, value, start, end, sink, out, lse = residuals
    d_out, d_lse = (
        jnp.zeros_like(primal) if isinstance(x, jax.custom_derivatives.SymbolicZero) else x
        for primal, x in zip((out, lse), cotangents, strict=True)
    )
    # With p_j the probability of key j: d_logit_j = p_j (d_out . v_j - delta), and the sink is a key without a value.
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - d_lse
    d_sink = jnp.where(sink > -jnp.inf, -jnp.exp(sink - jnp.maximum(lse, sink)) * delta, 0)
    d_query = d_key = d_value = None
    if wanted.query or wanted.key_value:
        gradients = _backward(settings, wanted, query, key, value, start, end, lse, d_out, delta)
        if wanted.query:
            d_query, *gradients = gradients
        if wanted.key_value:
            d_key, d_value = gradients
    return d_query, d_key, d_value, None, None, d_sink


_decode.defvjp(_decode_fwd, _decode_bwd, symbolic_zeros=True)
