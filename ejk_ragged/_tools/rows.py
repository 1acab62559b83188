"""Realistic decode steps, of shapes that strain different things and of known models: what is explained, timed and tuned.

Each can also be had with several query tokens a sequence, and with a quantised cache.
"""

import dataclasses
from collections.abc import Sequence

from ejk_ragged.testing import Case


ROWS = (
    Case("full", 8, 32768, 32, 8, 128, "bfloat16"),
    Case("ragged", 64, 16384, 32, 8, 128, "bfloat16", ("uniform", 2048, 16384)),
    Case("skew", 32, 32768, 64, 8, 128, "bfloat16", ("skew", 128, 1023)),
    Case("one", 1, 131072, 32, 8, 128, "bfloat16"),
    Case("small", 1, 4096, 32, 8, 128, "bfloat16"),
    Case("many-small", 16, 1024, 32, 8, 128, "bfloat16", ("uniform", 128, 1024)),
    Case("mha", 16, 4096, 32, 32, 128, "bfloat16", ("uniform", 512, 4096)),
    Case("mqa", 64, 8192, 32, 1, 128, "bfloat16", ("uniform", 1024, 8192)),
    Case("window", 32, 32768, 64, 8, 64, "bfloat16", ("uniform", 4096, 32768), sliding_window=(4096, 0)),
    Case("cap", 16, 8192, 16, 8, 256, "bfloat16", ("uniform", 1024, 8192), logits_soft_cap=50.0),
    Case("llama-3-8b", 32, 8192, 32, 8, 128, "bfloat16", ("uniform", 1024, 8192)),
    Case("llama-3-70b", 16, 8192, 64, 8, 128, "bfloat16", ("uniform", 1024, 8192)),
    Case("qwen-2.5-7b", 32, 16384, 28, 4, 128, "bfloat16", ("uniform", 512, 16384)),
    Case("mistral-7b", 32, 16384, 32, 8, 128, "bfloat16", ("uniform", 512, 16384), sliding_window=(4095, 0)),
    Case("gemma-2-9b", 16, 4096, 16, 8, 256, "bfloat16", ("uniform", 512, 4096), logits_soft_cap=50.0),
    Case("gpt-oss-120b", 64, 8192, 64, 8, 64, "bfloat16", ("uniform", 64, 8192), sliding_window=(127, 0), sinks=("query", 1)),
)

# A step that two CPU cores do in a fraction of a second.
CPU_STEP = Case("cpu-step", 8, 4096, 32, 8, 128, "float32", ("skew", 100, 700))

# What the benchmark measures on a CPU. The two of few live tokens have the same lengths in caches of two sizes.
CPU_ROWS = (
    Case("cpu-full", 8, 4096, 32, 8, 128, "float32"),
    Case("cpu-full-bf16", 8, 4096, 32, 8, 128, "bfloat16"),
    Case("cpu-skew", 8, 4096, 32, 8, 128, "float32", ("skew", 100, 700)),
    Case("cpu-short-4096", 8, 4096, 32, 8, 128, "float32", ("uniform", 100, 700)),
    Case("cpu-short-32768", 8, 32768, 32, 8, 128, "float32", ("uniform", 100, 700)),
)

GROUPS = {"shapes": ROWS[:10], "models": ROWS[10:], "cpu": CPU_ROWS}
# What is measured of a group only for some of its rows; a row that is named has all that is asked for.
GRADIENT_ROWS = {"full", "ragged", "mha", "cap", "skew", "cpu-full"}
SPLIT_ROWS = {"full", "one", "cpu-full"}
TOKEN_ROWS = {"full", "ragged", "mha", "cpu-full"}

SHORT = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
SCALES = ("row", "sequence", "head", "number")  # as `Case.scales` has them


def named(names: Sequence[str]) -> list[Case]:
    """The rows of names and of groups of names.

    Raises:
        ValueError: a name that is neither.
    """
    known = {row.name: [row] for row in (*ROWS, *CPU_ROWS)} | GROUPS
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{', '.join(unknown)} not known; choose from {', '.join(known)}")
    return list(dict.fromkeys(row for name in names for row in known[name]))


def variants(case: Case, tokens: Sequence[int] = (), cache_dtypes: Sequence[str] = (), scales: str = "row") -> list[Case]:
    """`case` itself first; then with several tokens, with a quantised cache, and with both."""
    return [
        dataclasses.replace(case, num_tokens=count, cache_dtype=held, scales=held and scales)
        for held in (None, *dict.fromkeys(cache_dtypes))
        for count in (None, *dict.fromkeys(tokens))
    ]


def variant(case: Case) -> str:
    """What distinguishes it from the row of its name, in words; nothing of the row itself."""
    words = [] if case.cache_dtype is None else [SHORT.get(case.cache_dtype, case.cache_dtype)]
    words += [] if case.scales in (None, "row") else [f"scales by {case.scales}"]
    words += [] if case.num_tokens is None else [f"T {case.num_tokens}"]
    return ", ".join(words)


def label(case: Case) -> str:
    """Its name, and which variant it is."""
    return " ".join(filter(None, (case.name, variant(case))))
