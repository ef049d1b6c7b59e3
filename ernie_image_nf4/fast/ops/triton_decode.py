"""Triton kernels of a decode step beside its products with NF4 weights: attention, the head and sampling.

Each text has what it has alone, to the bit, however many there are: programs of attention and of sampling see one text,
and the head is a product on tensor cores, whose rows don't meet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_launch import on_its_device
from .triton_nf4_rows import INTERPRETED, place_of

WARPS = 4
POSITIONS = 64  # of the cache that are attended to at a time
LEAST_ROWS = 16  # that tensor cores multiply at least
HEAD_COLUMNS = 64  # of the vocabulary that a program of the head computes
HEAD_PART = 128  # of a row of the head's weight that is read at a time
VOCABULARY_PART = 8192  # logits that a program of sampling reads at a time
SAMPLING_WARPS = 32


@triton.jit
def _rotated(pointer, d, cosine, sine, HALF: tl.constexpr):
    """Heads at a position, rounded where upstream rounds. `pointer`: of their first values. `d`: 0, 1, 2 ..."""
    value = tl.load(pointer + d).to(tl.float32)
    exchanged = tl.load(pointer + (d + HALF) % (2 * HALF)).to(tl.float32)
    exchanged = tl.where(d < HALF, -exchanged, exchanged)
    first, second = (value * cosine).to(tl.bfloat16), (exchanged * sine).to(tl.bfloat16)
    return (first.to(tl.float32) + second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _matrix_product(first, second, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter takes bfloat16 for integers
        return tl.dot(first.to(tl.float32), second.to(tl.float32))
    return tl.dot(first, second)


@triton.jit
def _attention(
    qkv_pointer, cosine_pointer, sine_pointer, query_scale_pointer, position_pointer, keys_pointer, values_pointer,
    out_pointer, scaling, capacity, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr,
    QUERIES: tl.constexpr, POSITIONS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attention of the newest token's queries that share a key head, and its key and value into the cache."""
    text, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    query, d = tl.arange(0, QUERIES), tl.arange(0, DIM)
    position = tl.load(position_pointer + text)
    cosine = tl.load(cosine_pointer + text * DIM + d).to(tl.float32)
    sine = tl.load(sine_pointer + text * DIM + d).to(tl.float32)
    qkv = qkv_pointer + text * (HEADS + 2 * KEY_HEADS) * DIM
    # Rows beyond the group's repeat its last one, and are not stored.
    rows = (head * GROUP + tl.minimum(query, GROUP - 1)) * DIM
    q = _rotated(qkv + rows[:, None], d[None, :], cosine[None, :], sine[None, :], DIM // 2)
    q = (q.to(tl.float32) * tl.load(query_scale_pointer + text).to(tl.float32)).to(tl.bfloat16)
    k = _rotated(qkv + (HEADS + head) * DIM, d, cosine, sine, DIM // 2)
    v = tl.load(qkv + (HEADS + KEY_HEADS + head) * DIM + d)
    cache = (text * KEY_HEADS + head) * capacity * DIM
    tl.store(keys_pointer + cache + position * DIM + d, k)
    tl.store(values_pointer + cache + position * DIM + d, v)

    largest = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scaling
    total = tl.full((QUERIES,), 1.0, tl.float32)
    out = tl.zeros((QUERIES, DIM), tl.float32) + v.to(tl.float32)[None, :]
    for start in tl.range(0, position, POSITIONS):
        at = start + tl.arange(0, POSITIONS)
        inside = (at < position)[:, None]
        place = cache + at[:, None] * DIM + d[None, :]
        keys = tl.load(keys_pointer + place, inside, 0.0)
        values = tl.load(values_pointer + place, inside, 0.0)
        scores = _matrix_product(q, tl.trans(keys), INTERPRETED) * scaling
        scores = tl.where((at < position)[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weights, kept = tl.exp(scores - new[:, None]), tl.exp(largest - new)
        total = total * kept + tl.sum(weights, 1)
        out = out * kept[:, None] + _matrix_product(weights.to(tl.bfloat16), values, INTERPRETED)
        largest = new
    column = (head * GROUP + query)[:, None] * DIM + d[None, :]
    at = out_pointer + text * (HEADS * DIM) + place_of(column, HEADS * DIM)
    tl.store(at, (out / total[:, None]).to(tl.bfloat16), (query < GROUP)[:, None])


@triton.jit(do_not_specialize=["texts"])  # one program for any number of them
def _head(
    x_pointer, weight_pointer, out_pointer, texts, vocabulary, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PART: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Logits of a part of the vocabulary. Rows beyond the texts' are nothing, as tensor cores multiply no fewer."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    text, part = tl.arange(0, ROWS), tl.arange(0, PART)
    # Columns beyond the vocabulary repeat its last one, and are not stored.
    place = tl.minimum(column, vocabulary - 1).to(tl.int64) * WIDTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, WIDTH, PART):
        at = start + part
        x = tl.load(x_pointer + text[:, None] * WIDTH + at[None, :], (text < texts)[:, None], 0.0)
        weight = tl.load(weight_pointer + place[:, None] + at[None, :])
        total += _matrix_product(x, tl.trans(weight), INTERPRETED)
    inside = (text < texts)[:, None] & (column < vocabulary)[None, :]
    tl.store(out_pointer + text[:, None] * vocabulary + column[None, :], total.to(tl.bfloat16), inside)


@triton.jit
def _warped(pointer, least, temperature, at, inside):
    """A part of the logits over the temperature, in float32. Those below `least` are out."""
    logits = tl.load(pointer + at, inside, float("-inf")).to(tl.float32)
    return tl.where(logits >= least, logits / temperature, float("-inf"))


@triton.jit
def _sample(
    logits_pointer, noise_pointer, ranked_pointer, temperature_pointer, top_k_pointer, top_p_pointer, token_pointer,
    RANKS: tl.constexpr, VOCABULARY: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One draw from the nucleus of each text's distribution, without sorting it.

    The token that exponential clocks choose, the argmax of probability / noise, is taken if it is in the nucleus: if
    those that are more likely have less than `top_p` together. Else it and all that are no more likely are out, and
    the clocks choose among the rest. That ends with the argmax in the nucleus, at last with the likeliest token.
    """
    text = tl.program_id(0).to(tl.int64)
    logits_pointer += text * VOCABULARY
    noise_pointer += text * VOCABULARY
    part = tl.arange(0, PART)
    top_k = tl.load(top_k_pointer + text)
    least = tl.load(ranked_pointer + text * RANKS + top_k - 1, top_k > 0, float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_pointer + text)
    searching = temperature > 0
    temperature = tl.where(searching, temperature, 1.0)
    largest = tl.full((PART,), float("-inf"), tl.float32)
    where = tl.zeros((PART,), tl.int32)
    for start in tl.range(0, VOCABULARY, PART):
        at = start + part
        logits = _warped(logits_pointer, least, temperature, at, at < VOCABULARY)
        where = tl.where(logits > largest, at, where)
        largest = tl.maximum(largest, logits)
    top = tl.max(largest, 0)
    token = tl.min(tl.where(largest == top, where, VOCABULARY - 1), 0)
    mass = tl.zeros((PART,), tl.float32)
    for start in tl.range(0, VOCABULARY, PART):
        at = start + part
        mass += tl.exp(_warped(logits_pointer, least, temperature, at, at < VOCABULARY) - top)
    nucleus = tl.sum(mass, 0) * tl.load(top_p_pointer + text)

    bound = tl.full((), float("-inf"), tl.float32)  # of logits that are out
    while searching:
        best = tl.full((PART,), -1.0, tl.float32)
        where = tl.zeros((PART,), tl.int32)
        for start in tl.range(0, VOCABULARY, PART):
            at = start + part
            logits = _warped(logits_pointer, least, temperature, at, at < VOCABULARY)
            chance = tl.exp(logits - top) / tl.load(noise_pointer + at, at < VOCABULARY, 1.0)
            chance = tl.where(logits > bound, chance, -1.0)
            where = tl.where(chance > best, at, where)
            best = tl.maximum(best, chance)
        token = tl.min(tl.where(best == tl.max(best, 0), where, VOCABULARY - 1), 0)
        chosen = _warped(logits_pointer, least, temperature, token, True)
        likelier = tl.zeros((PART,), tl.float32)
        for start in tl.range(0, VOCABULARY, PART):
            at = start + part
            logits = _warped(logits_pointer, least, temperature, at, at < VOCABULARY)
            likelier += tl.where(logits > chosen, tl.exp(logits - top), 0.0)
        above = tl.sum(likelier, 0)
        searching = (above > 0) & (above >= nucleus)  # False for NaN, so that it ends
        bound = chosen
    tl.store(token_pointer + text, token.to(tl.int64))


@on_its_device
def attention(qkv, cosine, sine, query_scale, position, keys, values, scaling) -> torch.Tensor:
    """Attention for the newest token of each text, whose key and value are written into the cache.

    Args:
        qkv: (texts, (heads + 2 * key heads) * D) bfloat16: queries, keys and values before rotation.
        cosine: (texts, D) bfloat16, of the newest position.
        sine: As `cosine`.
        query_scale: (texts,) bfloat16, factors of the queries.
        position: (texts,) int64, of the newest token: as many are in the cache.
        keys: (texts, key heads, capacity, D) bfloat16, changed in place.
        values: As `keys`.
        scaling: Of the scores.

    Returns:
        (texts, heads * D) bfloat16, in planes.
    """
    texts, key_heads, capacity, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * key_heads
    out = qkv.new_empty(texts, heads * dim)
    queries = max(LEAST_ROWS, triton.next_power_of_2(heads // key_heads))
    _attention[(texts, key_heads)](
        qkv, cosine.contiguous(), sine.contiguous(), query_scale.contiguous(), position.contiguous(), keys, values,
        out, scaling, capacity, heads, key_heads, dim, queries, POSITIONS, INTERPRETED, num_warps=WARPS,
    )  # fmt: skip
    return out


@on_its_device
def head_product(x, weight) -> torch.Tensor:
    """``x @ weight.T``, (texts, vocabulary) bfloat16.

    Args:
        x: (texts, width) bfloat16, up to `LEAST_ROWS` texts.
        weight: (vocabulary, width) bfloat16.
    """
    texts, width = x.shape
    out = x.new_empty(texts, len(weight))
    _head[(triton.cdiv(len(weight), HEAD_COLUMNS),)](
        x.contiguous(), weight, out, texts, len(weight), width, LEAST_ROWS, HEAD_COLUMNS,
        min(HEAD_PART, width & -width), INTERPRETED, num_warps=WARPS,
    )  # fmt: skip
    return out


@on_its_device
def sample(logits, noise, ranked, temperature, top_k, top_p) -> torch.Tensor:
    """One draw from each distribution, or its likeliest token, (texts, 1) int64.

    Args:
        logits: (texts, vocabulary), any floating dtype.
        noise: (texts, vocabulary) float32, from an exponential distribution.
        ranked: (texts, ranks), the largest logits in descending order, at least `top_k`; None where all of that are 0.
        temperature: (texts, 1) float32, divides the logits; 0 for the likeliest token.
        top_k: (texts, 1) int64, likeliest tokens to draw from; 0 for all.
        top_p: (texts, 1) float32, least mass of the nucleus.
    """
    token = torch.empty(len(logits), 1, dtype=torch.int64, device=logits.device)
    ranks = 0 if ranked is None else ranked.shape[1]
    _sample[(len(logits),)](
        logits.contiguous(), noise, logits if ranked is None else ranked.contiguous(), temperature.contiguous(),
        top_k.contiguous(), top_p.contiguous(), token, ranks, logits.shape[1], VOCABULARY_PART,
        num_warps=SAMPLING_WARPS,
    )  # fmt: skip
    return token
