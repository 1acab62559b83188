"""Any problem on any mesh, mapped or not. Hypothesis draws it, and the answer must be the oracle's."""

import functools
import math
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import call, make_mesh
from problems import cases
from support import assert_right

from ejk_ragged import ragged_decode_attention


SHAPES = [  # B, S, Hq, Hkv, D; sizes that split evenly, unevenly and not at all
    (1, 5, 3, 1, 8),
    (2, 8, 4, 4, 8),
    (3, 13, 2, 1, 8),
    (4, 16, 8, 4, 8),
    (4, 1, 4, 2, 8),
    (5, 12, 6, 2, 8),
]
CACHE = ("key", "value", "key_scale", "value_scale")
LENGTHS = ("sequence_start", "sequence_end", "query_lengths")


@st.composite
def layouts(draw, case):
    """A mesh, and how arrays are split on it: the axes that split the batch, rows and heads of a cache, and the splits of the
    query and the page table. The query and the table may be split in ways that nothing else follows. A pool is split by heads
    only."""
    kind = draw(st.sampled_from(["Auto", "Explicit"]))
    mesh = make_mesh(*[kind] * 3, sizes=draw(st.sampled_from([(2, 2, 2), (8, 1, 1), (1, 4, 2)])))
    split: list[tuple[str, ...]] = [(), (), ()]
    for name in mesh.axis_names:
        axis = draw(st.sampled_from([None, 2] if case.page_size else [None, 0, 1, 2]), f"what {name} splits")
        if axis is None:
            continue
        devices = math.prod(mesh.shape[other] for other in (*split[axis], name))
        size = (case.batch, case.seq_len, case.num_kv_heads)[axis]
        if size % devices == 0 or (kind == "Auto" and axis != 2):  # an array that is cut unevenly has no type
            split[axis] += (name,)
    sizes = {P("x"): case.batch, P(None, "y"): case.num_tokens or case.num_q_heads}
    if jax.__version_info__ >= (0, 11):
        # JAX 0.11 has no type for a gradient that XLA splits among only some of the devices of an axis.
        sizes = {spec: size for spec, size in sizes.items() if size % mesh.shape[spec[-1]] == 0}
    batch, heads = own_axes(case, mesh, {name for names in split for name in names})
    table = P(draw(st.sampled_from([None, batch]), "what splits the page table"))
    own = draw(st.sampled_from([P(), P(batch), P(batch, *[None] * (case.num_tokens is not None), heads)]), "how the query is split")
    query = draw(st.sampled_from([own, P(), *sizes]), "or in a way that nothing else follows") if kind == "Auto" else own
    return kind, mesh, split, query, table


def own_axes(case, mesh, used):
    """Two axes of the mesh, or None: one for the sequences of a pool, and one for the query heads of one kv head. The cache has
    neither of these axes."""
    free = [name for name in mesh.axis_names if name not in used]

    def take(has, size):
        return next((free.pop(i) for i, name in enumerate(free) if has and size % mesh.shape[name] == 0), None)

    return take(case.page_size, case.batch), take(case.num_kv_heads == 1, case.num_q_heads)


@st.composite
def maps(draw, arguments):
    """Names of the arguments that `vmap` maps, the number of maps, and the map that has the arguments as they are."""
    everything = ("query", "softmax_aux", "page_table", *LENGTHS, *CACHE)
    groups = [("query",), ("softmax_aux",), LENGTHS, CACHE, ("query", *CACHE), everything]
    groups += [("page_table",), ("query", "page_table", *LENGTHS)] * ("page_table" in arguments)
    names = [name for name in draw(st.sampled_from([(), *groups])) if getattr(arguments.get(name), "ndim", 0)]
    return names, 2, draw(st.integers(0, 1))


def on_mesh(call, layout, mapping):
    """A call like `call`, whose cache is split on a mesh. The arguments that `mapping` names are stacked with other values."""
    (kind, mesh, (batch, rows, heads), query_spec, table_spec), (names, size, at) = layout, mapping
    specs = {"query": query_spec, "page_table": table_spec} | {name: P(batch, rows, heads) for name in ("key", "value")}
    specs |= {name: P(batch, heads, rows) for name in ("key_scale", "value_scale")}

    def sharding(name):
        return NamedSharding(mesh, P(None, *specs[name]) if name in names else specs[name])

    def spread(**arguments):
        arrays = {name: x for name, x in arguments.items() if isinstance(x, jax.Array)}
        settings = {name: x for name, x in arguments.items() if name not in arrays}
        arrays |= {name: jnp.stack([x if i == at else x[::-1] for i in range(size)]) for name, x in arrays.items() if name in names}
        split = [name for name in specs if name in arrays and not (name.endswith("scale") and arguments[name].ndim < 3)]

        @jax.jit
        def function(arrays):
            one = functools.partial(call, **settings)
            if kind == "Auto":  # a split may be uneven only inside jit
                arrays |= {name: jax.lax.with_sharding_constraint(arrays[name], sharding(name)) for name in split}
            if not names:
                return one(**arrays)
            axes = {name: 0 if name in names else None for name in arrays}
            return jax.tree.map(lambda x: x[at], jax.vmap(lambda arrays: one(**arrays), (axes,))(arrays))

        if kind == "Explicit":
            arrays |= {name: jax.device_put(arrays[name], sharding(name)) for name in split}
        return function(arrays)

    return spread


def check(data, call, **options):
    case = data.draw(cases(SHAPES, **options), "case")
    seed = data.draw(st.integers(0, 99), "seed")
    arguments = case.draw(seed)
    layout = data.draw(layouts(case), "layout")
    mapping = data.draw(maps(arguments), "maps")
    if not {"page_table", *CACHE, *LENGTHS} & set(
        mapping[0]
    ):  # otherwise other maps see the junk, and it reaches gradients of what they share
        arguments = case.draw(seed, poison=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "softmax_aux of shape", UserWarning)  # N may equal Hq
        assert_right(on_mesh(call, layout, mapping), arguments, seed=seed)


@hypothesis.given(data=st.data())
def test_any_problem_on_any_mesh(data):
    check(data, call, dtypes=("float32", "bfloat16"))


@hypothesis.settings(max_examples=3)
@hypothesis.given(data=st.data())
def test_each_backend(subject, data):
    call = functools.partial(ragged_decode_attention, backend=subject.on_cpus())
    check(data, call, dtypes=[dtype for dtype in subject.dtypes if dtype != "float64"])
