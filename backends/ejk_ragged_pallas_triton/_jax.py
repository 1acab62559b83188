"""What JAX's Pallas-Triton backend needs handled with care, in one place."""

import contextlib

import jax
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, ManualAxisType

from ejk_ragged_schedule.warning_filters import ignore_warning


@contextlib.contextmanager
def lowering(target):
    """Around every lowering of a kernel for `target`."""
    # JAX 0.11 deprecates this lowering with a warning at each call. Users can do nothing about it.
    ignore_warning("The Pallas Triton backend is deprecated", DeprecationWarning)
    with contextlib.ExitStack() as stack:
        if target.device is None:
            # Lowering for cuda without a GPU (export): Pallas asks for a device. What it learns of it, the compute
            # capability, does not enter the kernel's code, which is compiled for the real device when it is loaded.
            device = AbstractDevice("NVIDIA H100", None, "gpu")
            stack.enter_context(jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)))
        yield


def compiler_params(num_warps, num_stages):
    # Always given: which compiler None means has changed between versions of JAX.
    return plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)


def array(shape, dtype):
    """The type of what a kernel writes."""
    # Inside a `shard_map` Pallas wants to know how it varies over the mesh. Types here say nothing of that, in and out.
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType())
