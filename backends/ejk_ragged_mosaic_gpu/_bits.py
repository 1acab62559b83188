"""What the warpgroup that widens does with bits of numbers. JAX has no operations for this, so it is written in Mosaic GPU's own
operations. In the interpreter, JAX's operations do it.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxlib.mlir.dialects import llvm  # jax.extend.mlir does not have it

from ._jax import BYTES, IN_EACH_WARP, plgpu, WORDS


SCALAR = plgpu.Layout.WG_SPLAT(())
FIRST_BIT = 23  # of the exponent of a float32
EXPONENT = 0xFF << FIRST_BIT


def bits_of(power):
    """The bits of a power of two, known when the kernel is made, as a float32."""
    return int(np.float32(power).view(np.int32))


def inverse(bits, exponent=0):
    """The bits of 2 ** exponent, divided by the power of two that has these bits."""
    return bits_of(1) - bits + bits_of(1) + (exponent << FIRST_BIT)


def largest_exponent(x, interpreted):
    """The largest exponent of numbers laid out as `IN_EACH_WARP`, whatever their signs: the bits of the largest power of two that
    is at most as large as the largest number. A maximum of integers over a warp takes one instruction."""
    if interpreted:
        return jnp.max(lax.bitcast_convert_type(x, jnp.int32) & EXPONENT)

    @plgpu.inline_mgpu(arg_types=(IN_EACH_WARP,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def largest(_, numbers):
        word = ir.IntegerType.get_signless(32)
        words = [vector.bitcast(ir.VectorType.get((1,), word), number) for number in numbers.registers.flat]
        exponent = arith.constant(word, EXPONENT)
        exponents = [arith.andi(vector.extract(one, [], [0]), exponent) for one in words]
        of_thread = functools.reduce(arith.maxsi, exponents)
        of_warp: Any = llvm.inline_asm(word, [of_thread], "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(of_warp, (), is_signed=True)

    return largest(x)


def float_of(bits, interpreted):
    """The float32 of these 32 bits, a number."""
    if interpreted:
        return lax.bitcast_convert_type(bits, jnp.float32)

    @plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=SCALAR))
    def cast_bits(_, bits):
        return mgpu.FragmentedArray.splat(arith.bitcast(ir.F32Type.get(), bits.registers.item()), ())

    return cast_bits(bits)


def widened(x, dtype, interpreted):
    """A matrix of 8 bits, laid out as `BYTES`, in a dtype of 16 bits that holds each of its numbers, laid out as `WORDS`."""
    dtype = jnp.dtype(dtype)
    if x.dtype == jnp.int8 and not interpreted:
        return _in_words(x, dtype, of_int8(dtype))
    if x.dtype != jnp.int8 and dtype != jnp.float16:  # of floats, the GPU widens by way of float16 alone
        x = x.astype(jnp.float16).astype(jnp.float32)
    x = x.astype(dtype)
    return x if interpreted else _in_words(x, dtype, lambda words: words)


def _in_words(x, dtype, convert):
    """`convert` of the words of 32 bits in which a thread has 16 numbers of a matrix. It gives the 8 words of 16 wide numbers."""

    @plgpu.inline_mgpu(arg_types=(BYTES,), return_type=plgpu.ShapeDtypeStruct(x.shape, dtype, layout=WORDS))
    def relaid(_, matrix):
        word, wide = ir.IntegerType.get_signless(32), (ir.F16Type if dtype == jnp.float16 else ir.BF16Type).get()
        *blocks, vectors, one = matrix.registers.shape
        registers = np.empty((*blocks, 2 * vectors, one), object)
        for (*place, i, _), numbers in np.ndenumerate(matrix.registers):
            count = 16 * x.dtype.itemsize // 4
            words = vector.bitcast(ir.VectorType.get((count,), word), numbers)
            words = convert([vector.extract(words, [], [n]) for n in range(count)])
            for half in range(2):
                four = vector.from_elements(ir.VectorType.get((4,), word), words[4 * half : 4 * half + 4])
                registers[(*place, 2 * i + half, 0)] = vector.bitcast(ir.VectorType.get((8,), wide), four)
        return mgpu.FragmentedArray(_registers=registers, _layout=WORDS.to_mgpu(), _is_signed=None)

    return relaid(x)


def of_int8(dtype):
    """A function of words of 4 numbers of int8 that gives words of 2 numbers of a dtype of 16 bits, in a few instructions.

    For float16, a byte plus 128 becomes the low bits of a number between 1024 and 1280, and 1152 is taken away again. The method is
    that of FasterTransformer's `FastInterleavedAndBiasedNumericArrayConverter`. A bfloat16 has fewer bits, so the highest bit of
    the byte becomes part of a number of its own: 256 in place of 128. The method is that of JAX's Mosaic GPU.
    """

    def convert(words):
        above, assembly = FROM_INT8[dtype.name]
        above = llvm.inline_asm(ir.IntegerType.get_signless(32), [], KNOWN_LATE.format(above), "=r")
        return _pairs_of(words, assembly, above)

    return convert


def of_float8(narrow, dtype):
    """The same for words of 4 numbers of float8, which the GPU widens by way of float16 alone."""
    kind = {"float8_e4m3fn": "e4m3x2", "float8_e5m2": "e5m2x2"}[jnp.dtype(narrow).name]
    return lambda words: _pairs_of(words, FROM_FLOAT8[dtype.name].format(kind))


def _pairs_of(words, assembly, *others):
    """Two words for each word, by assembly with two results, the word, and the other operands."""
    word = ir.IntegerType.get_signless(32)
    two, constraints = llvm.StructType.get_literal([word, word]), ",".join(["=r", "=r", "r", *["r"] * len(others)])
    pairs: list[Any] = [llvm.inline_asm(two, [numbers, *others], assembly, constraints) for numbers in words]
    return [llvm.extractvalue(word, pair, [i]) for pair in pairs for i in range(2)]


# A constant that the assembler does not know: t (t + 1) is even. It would write a known constant to a register for each use.
KNOWN_LATE = """{{
.reg .b32 t;
mov.u32 t, %clock;
mad.lo.u32 t, t, t, t;
and.b32 t, t, 1;
add.u32 $0, t, {};
}}"""
# The constant above each byte, and the conversion of $2, in which $3 is this constant.
FROM_INT8 = {
    "float16": (
        0x64,
        """{
.reg .b32 bytes, low, high, offset;
xor.b32 bytes, $2, 0x80808080;
mov.b32 offset, 0x64806480;
prmt.b32 low, bytes, $3, 0x4140;
prmt.b32 high, bytes, $3, 0x4342;
sub.f16x2 $0, low, offset;
sub.f16x2 $1, high, offset;
}""",
    ),
    "bfloat16": (
        0x43,
        """{
.reg .b32 low, high, numbers, signs;
prmt.b32 low, $2, $3, 0x4140;
prmt.b32 high, $2, $3, 0x4342;
and.b32 numbers, low, 0xff7fff7f;
and.b32 signs, low, 0xff80ff80;
sub.bf16x2 $0, numbers, signs;
and.b32 numbers, high, 0xff7fff7f;
and.b32 signs, high, 0xff80ff80;
sub.bf16x2 $1, numbers, signs;
}""",
    ),
}
FROM_FLOAT8 = {
    "float16": """{{
.reg .b16 low, high;
mov.b32 {{low, high}}, $2;
cvt.rn.f16x2.{0} $0, low;
cvt.rn.f16x2.{0} $1, high;
}}""",
    "bfloat16": """{{
.reg .b16 low, high, a, b;
.reg .b32 pair;
.reg .f32 x, y;
mov.b32 {{low, high}}, $2;
cvt.rn.f16x2.{0} pair, low;
mov.b32 {{a, b}}, pair;
cvt.f32.f16 x, a;
cvt.f32.f16 y, b;
cvt.rn.bf16x2.f32 $0, y, x;
cvt.rn.f16x2.{0} pair, high;
mov.b32 {{a, b}}, pair;
cvt.f32.f16 x, a;
cvt.f32.f16 y, b;
cvt.rn.bf16x2.f32 $1, y, x;
}}""",
}
