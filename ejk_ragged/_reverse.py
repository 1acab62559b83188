"""Errors for derivatives that do not exist: forward mode and second derivatives.

JAX has an error of its own for a `custom_vjp` in forward mode, but JAX's error does not name the function. JAX raises it when the
tangents are computed, which is after our functions have returned. So a primitive on the tangents raises the error here.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def _refuse(*args, **params):
    raise NotImplementedError(
        "ragged_decode_attention is differentiated once, in reverse mode (jax.grad, jax.vjp, jax.jacrev). Second derivatives "
        "(jax.hessian, the gradient of a gradient) and forward mode (jax.jvp, jax.jacfwd, jax.linearize) are not supported."
    )


def once(op):
    """`op` with a derivative that raises an error. The `custom_vjp` around `op` gives the only derivative there is."""
    op = jax.custom_jvp(op)
    op.defjvp(_refuse)
    return op


def reverse_only(tree):
    """The arrays of `tree`, unchanged. Differentiation of the arrays in forward mode raises an error."""
    return jax.tree.map(lambda x: _operand_p.bind(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


# Both primitives are the identity. In reverse mode, JAX transposes the primitive on the tangent and never computes the tangent.
# Only forward mode computes the tangent or maps over it.
_operand_p = Primitive("ragged_decode_operand")
_operand_p.def_abstract_eval(lambda x: x)
_operand_p.def_impl(lambda x: x)
mlir.register_lowering(_operand_p, lambda ctx, x: [x])
batching.primitive_batchers[_operand_p] = lambda args, axes: (_operand_p.bind(*args), *axes)
ad.primitive_jvps[_operand_p] = lambda primals, tangents: (_operand_p.bind(*primals), _tangent_p.bind(*tangents))

_tangent_p = Primitive("ragged_decode_tangent")
_tangent_p.def_abstract_eval(lambda x: x)
_tangent_p.def_impl(_refuse)
mlir.register_lowering(_tangent_p, _refuse)
batching.primitive_batchers[_tangent_p] = _refuse
ad.primitive_jvps[_tangent_p] = _refuse
ad.primitive_transposes[_tangent_p] = lambda cotangent, x: [cotangent]
