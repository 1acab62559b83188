"""What a call is, as static facts: the tuning hints, the settings that travel with an operation, and the `Problem` that
backends look at to say whether they can do it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class FwdParams:
    """Tuning hints. They change how fast an answer comes and how it is rounded, never what it means.

    Every field may be None, which leaves the choice to the backend, and a backend ignores a hint that has no meaning for it.

    Attributes:
        block_size_heads: query heads of one group that a program works on together.
        block_size_keys: keys of one tile, or of one chunk.
        num_key_splits: pieces that every sequence's live range is cut into, whatever else the batch holds. With it given, the
            bits of a sequence's result do not depend on its neighbours.
        num_warps: warps of one program, on a GPU.
        num_stages: depth of the software pipeline, on a GPU.

    Raises:
        TypeError: a field is neither None nor an integer.
        ValueError: a field is less than 1.
    """

    block_size_heads: int | None = None
    block_size_keys: int | None = None
    num_key_splits: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if given is None:
                continue
            if isinstance(given, bool) or not isinstance(given, int | np.integer):
                raise TypeError(f"FwdParams.{field.name} must be a positive integer or None, got {given!r}.")
            if given < 1:
                raise ValueError(f"FwdParams.{field.name} must be a positive integer or None, got {given}.")
            object.__setattr__(self, field.name, int(given))

    def over(self, defaults: "FwdParams") -> "FwdParams":
        """These hints, with `defaults` where one is None."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(defaults, **given)


GIVEN = frozenset({"start", "end", "sink"})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static half of a call that does not depend on shapes; it travels with the operation through every transformation."""

    softmax_scale: float
    logits_soft_cap: float | None = None
    fwd_params: FwdParams = FwdParams()
    matmul_precision: str | None = None
    backend: Any = None  # None, a name, or a Backend
    given: frozenset[str] = GIVEN
    partial: bool = False
    tuned: Any = None  # a `_hints.Tuned`, or None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One decode operation as a backend meets it: B sequences, each query attending to its live range of a padded cache.

    Sizes are integers, or symbolic dimensions while a function is exported with symbolic shapes.

    Attributes:
        batch: sequences, B.
        seq_len: rows of the padded cache, S.
        num_q_heads: query heads, Hq, a multiple of `num_kv_heads`.
        num_kv_heads: key/value heads, Hkv.
        head_dim: head dimension, D.
        dtype: dtype of query, key and value.
        softmax_scale: factor on the logits.
        logits_soft_cap: cap of the logits, or None.
        fwd_params: tuning hints.
        matmul_precision: what `jax.default_matmul_precision` asks for, or None.
        given: which of "start", "end" and "sink" say something; the others hold 0, seq_len and -inf, and need not be read.
        partial: whether output and d_query go on to be merged with those of other keys, and are not rounded before.
        tuned: what the tuner found, for the registry to look into; backends see the hints in `fwd_params`.
    """

    batch: int
    seq_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: np.dtype
    softmax_scale: float
    logits_soft_cap: float | None = None
    fwd_params: FwdParams = FwdParams()
    matmul_precision: str | None = None
    given: frozenset[str] = GIVEN
    partial: bool = False
    tuned: Any = dataclasses.field(default=None, repr=False)

    @classmethod
    def of(cls, query, key, settings: Settings) -> "Problem":
        """The problem of arrays (or their shapes) `query` [B, Hq, D] and `key` [B, S, Hkv, D]."""
        batch, seq_len, num_kv_heads, head_dim = key.shape
        return cls(
            batch=batch,
            seq_len=seq_len,
            num_q_heads=query.shape[1],
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=np.dtype(query.dtype),
            softmax_scale=settings.softmax_scale,
            logits_soft_cap=settings.logits_soft_cap,
            fwd_params=settings.fwd_params,
            matmul_precision=settings.matmul_precision,
            given=settings.given,
            partial=settings.partial,
            tuned=settings.tuned,
        )

    @property
    def group(self) -> int:
        """Query heads that share a kv head, G."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def accum_dtype(self) -> np.dtype:
        """Dtype of logits, softmax statistics and partial sums."""
        return accum_dtype(self.dtype)

    @property
    def out_dtype(self) -> np.dtype:
        """Dtype in which output and d_query are returned."""
        return self.accum_dtype if self.partial else self.dtype

    def __str__(self):
        cap = "" if self.logits_soft_cap is None else f", soft cap {self.logits_soft_cap:g}"
        return (
            f"B {self.batch}, S {self.seq_len}, heads {self.num_q_heads}:{self.num_kv_heads}, D {self.head_dim}, "
            f"{self.dtype.name}{cap}"
        )


def accum_dtype(dtype) -> np.dtype:
    """The dtype in which sums over values of `dtype` are held: float32, or float64 for float64."""
    return np.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
