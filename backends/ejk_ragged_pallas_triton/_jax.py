"""Workarounds for JAX's Pallas-Triton backend."""

import contextlib

import jax
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, ManualAxisType

from ejk_ragged_schedule.warning_filters import ignore_warning


@contextlib.contextmanager
def lowering(target):
    """The context in which a kernel is lowered for `target`."""
    # JAX 0.11 deprecates this lowering, with a warning at each call. Users can do nothing about the warning.
    ignore_warning("The Pallas Triton backend is deprecated", DeprecationWarning)
    with contextlib.ExitStack() as stack:
        if target.device is None:
            # Export for cuda without a GPU. Pallas asks for a device, to learn the compute capability. The capability does not
            # enter the kernel's code, which is compiled for the real device when the program is loaded.
            device = AbstractDevice("NVIDIA H100", None, "gpu")
            stack.enter_context(jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)))
        yield


def compiler_params(num_warps, num_stages):
    # Every kernel passes these parameters. Without them, the choice of the compiler depends on the version of JAX.
    return plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)


def array(shape, dtype):
    """The type of an array that a kernel writes."""
    # Inside a `shard_map`, Pallas asks how results vary over the mesh. A backend's operands do not say how they vary (see
    # `ejk_ragged/_op.py`), so the results say nothing, either.
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType())
