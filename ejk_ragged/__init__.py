"""Ragged decode attention for JAX: one call, dispatched to the backend that suits the device."""

from ._api import ragged_decode_attention as ragged_decode_attention
from ._backend import Backend as Backend
from ._backend import Target as Target
from ._backend import Wanted as Wanted
from ._cache import KVCache as KVCache
from ._explain import Choice as Choice
from ._explain import explain as explain
from ._explain import Explanation as Explanation
from ._hints import tuned_hints as tuned_hints
from ._merge import merge as merge
from ._module import RaggedDecodeAttention as RaggedDecodeAttention
from ._problem import Cache as Cache
from ._problem import FwdParams as FwdParams
from ._problem import Problem as Problem
from ._problem import Queries as Queries
from ._quantize import quantize as quantize
from ._registry import backends as backends
from ._selection import BackendInfo as BackendInfo


__version__ = "0.1.0"
