"""Tiles of 8 bits as the first operand of a product, in registers.

A product of the tensor cores says which thread has which rows and columns of an operand in registers. A thread loads the bytes that
it finds side by side, and takes them for the columns that the product wants it to have. So columns of the keys stand in another
order, in which `store_in_order_of_keys` puts those of the query. So do the rows of V^T, which `sums_by_column` puts right. In the
interpreter, columns and rows keep their order.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxlib.mlir.dialects import llvm  # jax.extend.mlir does not have it

from ._bits import of_float8, of_int8, SCALAR
from ._jax import KEY_BYTES, plgpu, QUERY_LOADED, QUERY_STORED, store, SUMS, TILE, VALUE_BYTES


def query_of(ref, dims, heads, group, before, interpreted):
    """A query [query rows, dims], laid out for `store_in_order_of_keys`.

    Args:
        ref: the query in shared memory [query rows, dims], or with the dimensions of one kv head only. A query row then gets zeros
            in all other dimensions.
        dims: dimensions of all joined kv heads, and more if they do not fill lines.
        heads: how many kv heads are joined.
        group: query rows of a token.
        before: how many columns of zeros come before those of the first kv head: int32.
        interpreted: whether Pallas' interpreter runs the kernel.
    """
    if ref.shape[1] == dims:
        return plgpu.load(ref, layout=QUERY_LOADED)
    (rows, own_dims), dtype = ref.shape, ref.dtype
    if interpreted:
        row, column = (lax.broadcasted_iota(jnp.int32, (rows, dims), axis) for axis in (0, 1))
        head = lax.div(lax.rem(row, group), group // heads)
        again = jnp.tile(ref[...], (1, -(-dims // own_dims)))[:, :dims]
        return jnp.roll(jnp.where(lax.div(column, own_dims) == head, again, jnp.zeros_like(again)), before, 1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR), return_type=plgpu.ShapeDtypeStruct((rows, dims), dtype, layout=QUERY_LOADED)
    )
    def among_zeros(_, query, before):
        layout, element = QUERY_LOADED.to_mgpu(), ir.MemRefType(query.type).element_type
        eight, number = ir.VectorType.get((8,), element), lambda n: arith.constant(ir.IndexType.get(), n)
        zeros = arith.constant(eight, ir.DenseElementsAttr.get_splat(eight, ir.FloatAttr.get(element, 0.0)))
        begin, before = mgpu.utils.memref_ptr(query), arith.index_cast(ir.IndexType.get(), before.registers.item())
        registers = np.empty(layout.registers_shape((rows, dims)), object)
        for place, (row, column) in zip(np.ndindex(registers.shape), layout.thread_idxs((rows, dims)), strict=True):
            column, own = _own_column(row, column, own_dims, heads, group, before)
            offset = arith.addi(arith.muli(row, number(own_dims)), arith.select(own, column, number(0)))
            offset = arith.index_cast(ir.IntegerType.get_signless(32), offset)
            numbers = llvm.load(eight, mgpu.utils.getelementptr(begin, [offset], element))
            registers[place] = arith.select(own, numbers, zeros)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return among_zeros(ref, before)


def store_in_order_of_keys(x, target, interpreted):
    """Stores what `query_of` gives into shared memory, with its columns in the order of `keys_of`."""
    if interpreted:
        target[...] = x
        return

    @plgpu.inline_mgpu(arg_types=(QUERY_LOADED,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=QUERY_STORED))
    def relaid(_, matrix):
        layout = QUERY_STORED.to_mgpu()
        registers = np.empty(layout.registers_shape(x.shape), object)
        word = ir.IntegerType.get_signless(32)
        for (row, column, *_), numbers in np.ndenumerate(matrix.registers):
            words = vector.bitcast(ir.VectorType.get((4,), word), numbers)
            for i in range(4):
                place = [row, column, *[0] * (registers.ndim - 2)]
                place[-4], place[-3] = divmod(i, 2)
                registers[tuple(place)] = _pair(vector.extract(words, [], [i]), x.dtype)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    store(target, relaid(x))


def keys_of(ref, dtype, interpreted, optimized=True):
    """A tile of keys [64, D] in a dtype of 16 bits that holds each of its numbers. Its columns have an order of their own."""
    x = plgpu.load(ref, layout=KEY_BYTES, optimized=optimized)
    if interpreted:
        return x.astype(jnp.float32).astype(dtype)

    @plgpu.inline_mgpu(arg_types=(KEY_BYTES,), return_type=plgpu.ShapeDtypeStruct(x.shape, dtype, layout=TILE))
    def relaid(_, matrix):
        convert = _conversion(x.dtype, dtype)
        registers = np.empty((x.shape[0] // 64, x.shape[1] // 8, 1, 1, 2, 1, 1, 1, 1), object)
        for (block, columns, _, _, half, _, _, vector_number, _), numbers in np.ndenumerate(matrix.registers):
            words = convert(_words(numbers, 4))
            for i, word in enumerate(words):
                registers[block, columns * 16 + vector_number * 8 + i, 0, 0, half] = _pair(word, dtype)
        return mgpu.FragmentedArray(_registers=registers, _layout=TILE.to_mgpu(), _is_signed=None)

    return relaid(x)


def bytes_of_values(ref, optimized=True):
    """A tile of values [64, Dv] as it is."""
    return plgpu.load(ref, layout=VALUE_BYTES, optimized=optimized)


def values_of(x, interpreted):
    """What `bytes_of_values` gives in float16, transposed. Its rows have an order of their own."""
    dtype = jnp.dtype(jnp.float16)
    if interpreted:
        return x.astype(dtype).T

    shape = x.shape[::-1]

    @plgpu.inline_mgpu(arg_types=(VALUE_BYTES,), return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=TILE))
    def relaid(_, matrix):
        convert = _conversion(x.dtype, dtype)
        registers = np.empty((shape[0] // 64, shape[1] // 8, 1, 1, 2, 1, 1, 1, 1), object)
        rows, columns = matrix.registers.shape[:2]
        for row, column in np.ndindex(rows, columns):
            first, second = (_words(matrix.registers[row, column, 0, 0, 0, 0, i, 0], 1)[0] for i in range(2))
            mixed = [_permuted(first, second, order) for order in (0x5140, 0x7362)]
            for i, word in enumerate(convert(mixed)):
                registers[2 * column + i // 2, row, 0, 0, i % 2] = _pair(word, dtype)
        return mgpu.FragmentedArray(_registers=registers, _layout=TILE.to_mgpu(), _is_signed=None)

    return relaid(x)


def sums_by_column(acc, interpreted):
    """The sums of an output [Dv, query rows], laid out for a store, with the rows of `values_of` in the order of the columns."""
    if interpreted:
        return acc

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=SUMS))
    def relaid(_, matrix):
        four = ir.VectorType.get((4,), ir.F32Type.get())
        registers = np.empty((acc.shape[0] // 128, acc.shape[1] // 8, 1, 1, 1, 1, 1, 2), object)
        for block, columns, one in np.ndindex(*registers.shape[:2], 2):
            numbers = [
                vector.extract(matrix.registers[2 * block + i // 2, columns, 0, 0, i % 2, 0, 0, 0, 0], [], [one]) for i in range(4)
            ]
            registers[block, columns, 0, 0, 0, 0, 0, one] = vector.from_elements(four, numbers)
        return mgpu.FragmentedArray(_registers=registers, _layout=SUMS.to_mgpu(), _is_signed=None)

    return relaid(acc)


def store_own_sums(ref, sums, first, own_dims, heads, group, before):
    """Stores what `sums_by_column` gives into memory [query rows, dims], from dimension `first` on. Of each query row only the
    dimensions of its own kv head are stored, because the second kernel reads no others.

    Args:
        own_dims: dimensions of one kv head.
        heads, group, before: as in `query_of`.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SUMS, SCALAR))
    def stored(_, target, matrix, before):
        number = lambda n: arith.constant(ir.IndexType.get(), n)
        begin, element = mgpu.utils.memref_ptr(target), ir.F32Type.get()
        (stride, _), _ = ir.MemRefType(target.type).get_strides_and_offset()
        before = arith.index_cast(ir.IndexType.get(), before.registers.item())
        # Without a zero that the compiler does not know, it computes all places before the tiles, and has no registers for them.
        word = ir.IntegerType.get_signless(32)
        unknown: Any = llvm.inline_asm(word, [], "mov.b32 $0, 0;", "=r", has_side_effects=True)
        zero = arith.index_cast(ir.IndexType.get(), unknown)
        for numbers, (dim, row) in zip(matrix.registers.flat, SUMS.to_mgpu().thread_idxs(sums.shape), strict=True):
            dim, row = arith.addi(dim, number(first)), arith.addi(row, zero)
            _, own = _own_column(row, dim, own_dims, heads, group, before)
            offset = arith.index_cast(word, arith.addi(arith.muli(row, number(stride)), dim))
            place = mgpu.utils.getelementptr(begin, [offset], element)
            four = [vector.extract(numbers, [], [i]) for i in range(4)]
            asm = "@$5 st.global.v4.f32 [$0], {$1, $2, $3, $4};"
            llvm.inline_asm(ir.Type.parse("!llvm.void"), [place, *four, own], asm, "l,f,f,f,f,b", has_side_effects=True)

    stored(ref, sums, before)


def _own_column(row, column, own_dims, heads, group, before):
    """A column of a joined kv head, counted from the first column of the query row's own kv head, and whether that head has it."""
    number = lambda n: arith.constant(ir.IndexType.get(), n)
    head = arith.divui(arith.remui(row, number(group)), number(group // heads))
    column = arith.subi(column, arith.addi(arith.muli(head, number(own_dims)), before))
    return column, arith.cmpi(arith.CmpIPredicate.ult, column, number(own_dims))  # what would be negative is large here


def _words(numbers, count):
    """The words of 32 bits of a vector of bytes."""
    word = ir.IntegerType.get_signless(32)
    words = vector.bitcast(ir.VectorType.get((count,), word), numbers)
    return [vector.extract(words, [], [n]) for n in range(count)]


def _pair(word, dtype):
    """Two numbers of 16 bits in a word."""
    wide = (ir.F16Type if dtype == jnp.float16 else ir.BF16Type).get()
    one = vector.from_elements(ir.VectorType.get((1,), word.type), [word])
    return vector.bitcast(ir.VectorType.get((2,), wide), one)


def _permuted(a, b, order):
    """Bytes of two words, by their numbers: 0 to 3 are those of `a`, 4 to 7 those of `b`."""
    word = ir.IntegerType.get_signless(32)
    order = arith.constant(word, order)
    return llvm.inline_asm(word, [a, b, order], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")


def _conversion(narrow, dtype) -> Any:
    dtype = jnp.dtype(dtype)
    return of_int8(dtype) if narrow == jnp.int8 else of_float8(narrow, dtype)
