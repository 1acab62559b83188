"""Continuous batching: requests share one pool of pages and one batch of slots, and come and go between two steps.

`Engine.submit` takes a request, and `Engine.step` goes on with all requests. `Engine.stream` does both, and gives the tokens of one
request. The device runs three programs, whatever the requests are: a chunk of one prompt, a token (and a draft) of every slot, and
the copy of a page. Everything else is lists of numbers on the host; `pages.py` beside this file keeps the lists of pages.

In float32 each request gets the tokens that it would get alone. For this all shapes are fixed, and attention is batch-invariant.
"""

import collections
import dataclasses
import functools
from collections.abc import Generator

import jax
import numpy as np
from llama import ours, step, without_rows
from pages import Pages
from smollm2 import accepted, look_up

from ejk_ragged import FwdParams, KVCache


# With `num_key_splits` given, the bits of a sequence's attention do not depend on its neighbours.
ATTENTION = functools.partial(ours, fwd_params=FwdParams(num_key_splits=4))


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt, and the tokens `new` that are written after it. The newest request has the largest number."""

    number: int
    prompt: list[int]
    tokens: int  # how many to write
    new: list[int] = dataclasses.field(default_factory=list)
    done: bool = False
    pages: list[int] = dataclasses.field(default_factory=list)
    rows: int = 0  # how many tokens of `text` the pages hold

    @property
    def text(self) -> list[int]:
        return self.prompt + self.new

    @property
    def unread(self) -> int:
        """How many tokens of `text` the pages do not hold. A request with 1 decodes, and a request with more is still read."""
        return len(self.prompt) + len(self.new) - self.rows


@dataclasses.dataclass
class Counts:
    """What happened so far."""

    steps: int = 0
    put_back: int = 0
    shared_rows: int = 0  # rows that another request had, so that they were not computed again
    most_pages: int = 0


class Engine:
    """Writes the likeliest tokens, for many requests at a time.

    Args:
        model: a `llama.Model`, stacked.
        slots: how many requests run at a time.
        num_pages: pages of the pool.
        page_size: rows per page.
        rows: the most rows of one request, its prompt and what is written.
        chunk: tokens of a prompt that are read in one step.
        drafts: the most tokens that are guessed, by prompt lookup, and verified in one step. 0 is none.
        dtype: of the pages, as `KVCache.zeros` takes it.
        stop: the token that ends a text.
    """

    def __init__(self, model, *, slots=8, num_pages=128, page_size=16, rows=512, chunk=32, drafts=0, dtype="float32", stop=None):
        sizes = {"slots": slots, "num_pages": num_pages, "page_size": page_size, "rows": rows, "chunk": chunk}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if drafts < 0:
            raise ValueError(f"drafts must be at least 0, got {drafts}.")
        self.model, self.chunk, self.drafts, self.stop = model, chunk, drafts, stop
        self.pages = Pages(num_pages, page_size)
        self.width = min(self.pages.of(rows), num_pages)  # pages of the longest request
        self.waiting: collections.deque[Request] = collections.deque()
        self.slots: list[Request | None] = [None] * slots
        self.counts, self.number = Counts(), 0
        # The model's two programs: batch, tokens of each sequence, and how many of these may be a draft.
        self.read, self.decode = (1, chunk, 0), (slots, 1 + drafts, drafts)
        # One pool for all layers: page p of layer i is page i * num_pages + p.
        c = model.config
        self.first_pages = np.arange(c.layers, dtype=np.int32) * num_pages
        self.pool = without_rows(KVCache.zeros(c.layers * num_pages, page_size, c.kv_heads, c.head_dim, dtype=dtype))

    # -- Requests

    def submit(self, prompt: list[int], tokens: int) -> Request:
        """Takes a request for up to `tokens` tokens after a prompt. `step` appends these tokens to the request's `new`.

        Raises:
            ValueError: an empty prompt, no tokens to write, or more rows than a request may have.
        """
        if not prompt:
            raise ValueError("prompt must have at least one token, got an empty one.")
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}.")
        rows, most = len(prompt) + tokens - 1, self.width * self.pages.size  # the last token is never read
        if rows > most:
            raise ValueError(
                f"prompt and tokens must fit into {most} rows, {self.width} pages of {self.pages.size}; got a prompt of "
                f"{len(prompt)} tokens and {tokens} to write, which take {rows} rows. Shorten the prompt, ask for fewer tokens, or "
                "give the engine more rows and pages."
            )
        request = Request(self.number, list(prompt), tokens)
        self.number += 1
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request early. The request keeps its tokens and gives back its pages. Other requests go on as before."""
        request.done = True
        if request in self.waiting:
            self.waiting.remove(request)
        self._leave(request)

    def stream(self, prompt: list[int], tokens: int) -> Generator[int, None, None]:
        """A generator of a new request's tokens. Each `next` runs as many steps, of all requests, as its token needs. Closing the
        generator cancels the request. Errors are those of `submit`."""

        def tokens_of(request):
            try:
                yield -1  # taken below: only a generator that has begun gets here when it is closed
                sent = 0
                while not (request.done and sent == len(request.new)):
                    if sent == len(request.new):
                        self.step()
                    yield from request.new[sent:]
                    sent = len(request.new)
            finally:
                self.cancel(request)

        stream = tokens_of(self.submit(prompt, tokens))
        next(stream)
        return stream

    @property
    def running(self) -> list[Request]:
        """The requests that have a slot, the oldest first."""
        return sorted((request for request in self.slots if request), key=lambda request: request.number)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    # -- A step

    def step(self) -> list[tuple[Request, list[int]]]:
        """Admits requests, reads a chunk of one prompt, and decodes the other requests. Returns each request that has new tokens,
        with these tokens."""
        self._admit()
        pieces: dict[Request, tuple[list[int], list[int]]] = {}  # what each request feeds: tokens of its text, and a draft
        for request in self.running:
            piece = request.text[request.rows : request.rows + self.chunk], self._draft(request)
            if self._provide(request, sum(map(len, piece))):
                pieces[request] = piece
        reading = dict(enumerate(request for request in pieces if request.unread > 1))  # the newest, or none
        decoding = {slot: request for slot, request in enumerate(self.slots) if request in pieces and request.unread == 1}
        written = []
        for batch, program in ((reading, self.read), (decoding, self.decode)):
            best = self._run(batch, pieces, *program) if batch else []
            for b, request in batch.items():
                certain, draft = pieces[request]
                fresh = accepted(draft, best[b], self.stop) if len(certain) == request.unread else []
                request.rows += len(certain) + max(len(fresh) - 1, 0)
                request.new += fresh
                written += [(request, fresh)] * bool(fresh)
                if fresh and (len(request.new) == request.tokens or fresh[-1] == self.stop):
                    request.done = True
                    self._leave(request)
        self.counts.steps += 1
        return written

    def warm_up(self) -> None:
        """Compiles all programs. Changes no request."""
        for program in (self.read, self.decode):
            self._run({}, {}, *program)
        self._copy(0, 0)

    def _admit(self) -> None:
        """Gives slots to waiting requests, in order, while there are pages. One prompt is read at a time, so that a request that
        begins like this prompt can share the pages once they are filled."""
        while self.waiting and None in self.slots and not any(request.unread > 1 for request in self.running):
            request = self.waiting[0]
            text = request.text
            known, other = max(
                ((_alike(text[:-1], other.text[: other.rows]), other) for other in self.running),
                key=lambda pair: pair[0],
                default=(0, request),
            )
            request.pages = self.pages.share(other.pages, known)
            # A spare page for each running request, so that the new one is not put back at once.
            if not self.pages.provide(request.pages, known, len(text), self._copy, spare=len(self.running)):
                self.pages.release(request.pages)
                return
            request.rows = known
            self.counts.shared_rows += known
            self.slots[self.slots.index(None)] = self.waiting.popleft()

    def _draft(self, request: Request) -> list[int]:
        room = min(self.drafts, request.tokens - len(request.new) - 1)
        return look_up(request.text, room) if request.unread == 1 and room > 0 else []

    def _provide(self, request: Request, count: int) -> bool:
        """Gives a request the pages for `count` more rows. While too few pages are free, puts back the newest request. Returns
        False if that is this request."""
        while request in self.slots:
            if self.pages.provide(request.pages, request.rows, request.rows + count, self._copy):
                self.counts.most_pages = max(self.counts.most_pages, self.pages.count - len(self.pages.free))
                return True
            newest = self.running[-1]
            self._leave(newest)
            self.waiting.appendleft(newest)
            self.counts.put_back += 1
        return False

    def _leave(self, request: Request) -> None:
        """Frees the slot and the pages. The request keeps its text, which is read like a prompt if the request comes back."""
        if request in self.slots:
            self.slots[self.slots.index(request)] = None
            self.pages.release(request.pages)
            request.rows = 0

    # -- What the device does

    def _run(self, batch, pieces, size, width, drafts):
        """One step of the model, for `batch`: the requests by their index in a batch of `size`. Returns the likeliest next tokens
        [size][1 + drafts], after the last token of each text and after each token of its draft."""
        table = np.zeros((size, len(self.first_pages), self.width), np.int32)
        tokens, wanted = np.zeros((size, width), np.int32), np.zeros((size, 1 + drafts), np.int32)
        lengths, count = np.zeros((2, size), np.int32)
        for b, request in batch.items():
            certain, draft = pieces[request]
            lengths[b], count[b] = request.rows, len(certain) + len(draft)
            tokens[b, : count[b]] = certain + draft
            wanted[b] = np.minimum(len(certain) - 1 + np.arange(1 + drafts), count[b] - 1)
            table[b, :, : len(request.pages)] = self.first_pages[:, None] + np.array(request.pages, np.int32)
        cache = dataclasses.replace(self.pool, page_table=table.reshape(size, -1))  # one layer's rows after another's
        best, cache = step(self.model, cache, tokens, lengths, count, wanted, attention=ATTENTION)
        self.pool = dataclasses.replace(cache, page_table=None)
        return np.asarray(best).tolist()

    def _copy(self, source: int, target: int) -> None:
        self.pool = copy_page(self.pool, source + self.first_pages, target + self.first_pages)


@functools.partial(jax.jit, donate_argnames="pool")
def copy_page(pool, source, target):
    """The pool with pages `source` [layers] copied to pages `target` [layers]: one page of each layer."""
    return jax.tree.map(lambda x: x.at[target].set(x[source]), pool)


def _alike(text, other):
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
