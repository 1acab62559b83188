"""Realistic decode steps, for `explain`, the benchmark and the tuner. Some strain one thing each, and some are of known models.

Each case has variants: with several query tokens per sequence, with a quantised cache, and with its cache in pages.
"""

import dataclasses
from collections.abc import Sequence

from ejk_ragged.testing import Case


SHAPES = (
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
)
MODELS = (
    Case("llama-3-8b", 32, 8192, 32, 8, 128, "bfloat16", ("uniform", 1024, 8192)),
    Case("llama-3-70b", 16, 8192, 64, 8, 128, "bfloat16", ("uniform", 1024, 8192)),
    Case("qwen-2.5-7b", 32, 16384, 28, 4, 128, "bfloat16", ("uniform", 512, 16384)),
    Case("mistral-7b", 32, 16384, 32, 8, 128, "bfloat16", ("uniform", 512, 16384), sliding_window=(4095, 0)),
    Case("gemma-2-9b", 16, 4096, 16, 8, 256, "bfloat16", ("uniform", 512, 4096), logits_soft_cap=50.0),
    Case("gpt-oss-120b", 64, 8192, 64, 8, 64, "bfloat16", ("uniform", 64, 8192), sliding_window=(127, 0), sinks=("query", 1)),
)


def _latent(name: str, batch: int, seq_len: int, lengths: tuple = ("full",), heads: int = 16) -> Case:
    """MLA, absorbed: rows of 576 columns are the keys, and their first 512 columns are the values."""
    return Case(name, batch, seq_len, heads, 1, 576, "bfloat16", lengths, softmax_scale=192**-0.5, value_columns=(0, 512))


LATENT = (
    _latent("mla", 128, 4096),
    _latent("mla-ragged", 64, 16384, ("uniform", 2048, 16384)),
    _latent("mla-long", 8, 32768),
    _latent("mla-128-heads", 128, 4096, heads=128),
)
WIDTHS = (
    Case("narrow-value", 16, 8192, 32, 8, 192, "bfloat16", value_dim=128),
    Case("narrow-value-mha", 16, 8192, 32, 32, 192, "bfloat16", value_dim=128),
    Case("head-512", 16, 8192, 16, 4, 512, "bfloat16"),
    Case("head-512-mqa", 16, 8192, 8, 1, 512, "bfloat16"),
    Case("head-512-window", 16, 8192, 16, 4, 512, "bfloat16", sliding_window=(1024, 0)),
    Case("head-512-mqa-window", 16, 8192, 8, 1, 512, "bfloat16", sliding_window=(1024, 0)),
    Case("head-80", 8, 5001, 32, 8, 80, "bfloat16"),
    Case("head-96", 16, 4096, 32, 32, 96, "bfloat16"),
    Case("head-112", 16, 4096, 32, 8, 112, "bfloat16"),
)
BATCHES = (
    Case("short", 256, 2048, 32, 8, 128, "bfloat16", ("uniform", 1, 512)),
    Case("many-short", 512, 1024, 32, 2, 128, "bfloat16", ("uniform", 1, 1024)),
)

# A step that two CPU cores do in a fraction of a second.
CPU_STEP = Case("cpu-step", 8, 4096, 32, 8, 128, "float32", ("skew", 100, 700))

# The cases of the benchmark on a CPU. The two short cases have the same lengths, in caches of two sizes.
CPU = (
    Case("cpu-full", 8, 4096, 32, 8, 128, "float32"),
    Case("cpu-full-bf16", 8, 4096, 32, 8, 128, "bfloat16"),
    Case("cpu-skew", 8, 4096, 32, 8, 128, "float32", ("skew", 100, 700)),
    Case("cpu-short-4096", 8, 4096, 32, 8, 128, "float32", ("uniform", 100, 700)),
    Case("cpu-short-32768", 8, 32768, 32, 8, 128, "float32", ("uniform", 100, 700)),
)

GROUPS = {"shapes": SHAPES, "models": MODELS, "latent": LATENT, "widths": WIDTHS, "batches": BATCHES, "cpu": CPU}
# If a group is asked for, only these of its cases have gradients, splits or several tokens. A case that is named has all of them.
GRADIENT_CASES = {"full", "ragged", "mha", "cap", "skew", "cpu-full"}
SPLIT_CASES = {"full", "one", "cpu-full"}
TOKEN_CASES = {"full", "ragged", "mha", "cpu-full"}

SHORT = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
SCALES = ("row", "sequence", "head", "number")  # values of `Case.scales`


def named(names: Sequence[str]) -> list[Case]:
    """The cases with these names. A name may be that of a group.

    Raises:
        ValueError: a name is neither a case nor a group.
    """
    known = {case.name: [case] for group in GROUPS.values() for case in group} | GROUPS
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{', '.join(unknown)} not known; choose from {', '.join(known)}")
    return list(dict.fromkeys(case for name in names for case in known[name]))


def variants(
    case: Case, tokens: Sequence[int] = (), cache_dtypes: Sequence[str] = (), scales: str = "row", page_sizes: Sequence[int] = ()
) -> list[Case]:
    """`case`, then `case` with several tokens, with a quantised cache, and with both. Then the same again in pages."""
    return [
        dataclasses.replace(case, num_tokens=count, cache_dtype=held, scales=held and scales, page_size=page_size)
        for page_size in (None, *filter(None, dict.fromkeys(page_sizes)))
        for held in (None, *dict.fromkeys(cache_dtypes))
        for count in (None, *dict.fromkeys(tokens))
    ]


def variant(case: Case) -> str:
    """The differences from the case with the same name, in words. "" for the case itself."""
    words = [] if case.page_size is None else [f"pages of {case.page_size}"]
    words += [] if case.cache_dtype is None else [SHORT.get(case.cache_dtype, case.cache_dtype)]
    words += [] if case.scales in (None, "row") else [f"scales by {case.scales}"]
    words += [] if case.num_tokens is None else [f"T {case.num_tokens}"]
    return ", ".join(words)


def label(case: Case) -> str:
    """The name of the case, and its variant."""
    return " ".join(filter(None, (case.name, variant(case))))
