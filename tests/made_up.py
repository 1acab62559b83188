"""Made-up backends and their entry points. A `Registry` takes them in the place of the installed ones."""

import dataclasses
import types
from typing import Any

import numpy as np

from ejk_ragged import Problem, Target
from ejk_ragged.testing import TextbookBackend


FLOAT = np.dtype("float32")
PROBLEM = Problem(
    batch=2, num_tokens=1, seq_len=12, num_q_heads=4, num_kv_heads=2, head_dim=8, dtype=FLOAT, cache_dtype=FLOAT, softmax_scale=1.0
)
CPU = Target("cpu")


@dataclasses.dataclass
class Entry:
    """A made-up entry point, like those of importlib.metadata. If `thing` is an exception, loading raises it."""

    name: str
    thing: Any
    distribution: str | None = "made-up"
    loads: int = 0

    @property
    def value(self):
        return f"made_up:{self.thing}"

    @property
    def dist(self):
        return self.distribution and types.SimpleNamespace(name=self.distribution)

    def load(self):
        self.loads += 1
        if isinstance(self.thing, Exception):
            raise self.thing
        return self.thing


def backend(name, priority: Any = 0, platforms=None, why=None, **methods) -> Any:
    """A Backend class. If `why` is given, the backend refuses every call for this reason."""
    members = {"name": name, "priority": priority, "platforms": platforms, "supports": lambda self, problem, target: why}
    return type(name.title(), (TextbookBackend,), members | methods)


def entries(*classes) -> list[Any]:
    return [Entry(one.name, one) for one in classes]
