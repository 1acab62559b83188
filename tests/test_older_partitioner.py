"""With XLA's older partitioner in place of Shardy (JAX_USE_SHARDY_PARTITIONER=0): automatic axes give the answer of one device."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import call, gradients, make_mesh, place, placed, put, SPECS
from support import assert_close, assert_right, draw, stack

from ejk_ragged.testing import Case


RANGES = ("ranges", (0, 64), (-5, 1000), (9, 9), (20, 37))
CASE = Case("", 4, 64, 8, 4, 16, lengths=RANGES, sinks=("query", 2))
TOKENS = Case("", 4, 64, 8, 4, 16, "float32", RANGES, 0.3, (25, 0), 1.5, ("kv", 1), 3, (3, 2, 3, 1), "int8", "row")


@pytest.fixture(autouse=True)
def older():
    jax.config.update("jax_use_shardy_partitioner", False)
    yield
    jax.config.update("jax_use_shardy_partitioner", True)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("case", [CASE, TOKENS], ids=["one", "tokens"])
def test_right(case, auto, spec):
    assert_right(lambda **arrays: call(**place(auto, spec, arrays)), case.draw(poison=True))


def test_one_device():
    assert_right(call, CASE.draw(poison=True))


def test_constrained_inside_jit(auto):
    """The partitioner learns the cache's sharding inside jit. The gradients are split as the cache is."""
    arrays, _ = draw(CASE)

    def function(arrays):
        cut = lambda x: jax.lax.with_sharding_constraint(2 * x, NamedSharding(auto, P("x", "y")))
        return gradients(arrays | {name: cut(arrays[name]) for name in ("key", "value")})

    got = jax.jit(function)(arrays)
    assert_close(got, gradients(arrays | {name: 2 * arrays[name] for name in ("key", "value")}))


def test_gradients_are_split_as_the_cache_is(auto):
    got = jax.jit(gradients)(placed(CASE, auto, P("x", "y", "z")))
    spec = NamedSharding(auto, P("x", "y", "z"))
    assert all(got[name].sharding.is_equivalent_to(spec, 4) for name in ("key", "value"))


def test_mapped(auto):
    arrays, _ = draw(CASE)
    names = ("query", "key", "value")
    stacked = arrays | {name: stack(arrays[name], -np.asarray(arrays[name])) for name in names}
    spec = {"query": P("x"), "key": P("x", None, None, "y"), "value": P("x", None, None, "y")}
    split = {name: put(auto, spec.get(name, P()), x) for name, x in stacked.items()}
    function = lambda arrays: jax.vmap(gradients, ({name: 0 if name in names else None for name in arrays},))(arrays)
    assert_close(jax.jit(function)(split), function(stacked))


def test_what_cannot_work_is_an_error(auto):
    """Python raises the error, as with Shardy."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="must not be split along head_dim"):
        call(**placed(CASE, auto, P("x", None, None, "y")))


def test_explicit_axes():
    arrays = placed(CASE, make_mesh("Explicit", "Explicit", "Explicit"), P("x", "y", "z"))
    assert_close(jax.jit(gradients)(arrays), gradients(draw(CASE)[0]))
