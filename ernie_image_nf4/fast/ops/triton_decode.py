"""Triton kernels of a decode step beside its products: attention of one query a text, and sampling."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_launch import on_its_device
from .triton_nf4_rows import INTERPRETED

WARPS = 4
POSITIONS = 64  # of the cache that are attended to at a time
LEAST_QUERIES = 16  # rows that tensor cores multiply at least
VOCABULARY_PART = 4096  # logits that a program of sampling reads at a time
SAMPLING_WARPS = 16


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
    at = out_pointer + (text * HEADS + head * GROUP + query)[:, None] * DIM + d[None, :]
    tl.store(at, (out / total[:, None]).to(tl.bfloat16), (query < GROUP)[:, None])


@triton.jit
def _logits(pointer, end_pointer, is_short, temperature, at, inside):
    """A part of the logits over the temperature, in float32. End tokens of a text that is too short have none."""
    logits = tl.load(pointer + at, inside, float("-inf")).to(tl.float32)
    is_end = tl.load(end_pointer + at, inside, 0) != 0
    return tl.where(is_short & is_end, float("-inf"), logits / temperature)


@triton.jit
def _sample(
    logits_pointer, noise_pointer, end_pointer, count_pointer, minimum_pointer, token_pointer, temperature, top_p,
    VOCABULARY: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One draw from the nucleus of each text's distribution, without sorting it.

    The token that exponential clocks choose, the argmax of probability / noise, is taken if it is in the nucleus: if
    those that are more likely have less than `top_p` together. Else it and all that are no more likely are out, and
    the clocks choose among the rest. That ends with the argmax in the nucleus.
    """
    text = tl.program_id(0).to(tl.int64)
    logits_pointer += text * VOCABULARY
    noise_pointer += text * VOCABULARY
    part = tl.arange(0, PART)
    is_short = tl.load(count_pointer) < tl.load(minimum_pointer)
    largest = tl.full((PART,), float("-inf"), tl.float32)
    for start in tl.range(0, VOCABULARY, PART):
        at = start + part
        largest = tl.maximum(largest, _logits(logits_pointer, end_pointer, is_short, temperature, at, at < VOCABULARY))
    top = tl.max(largest, 0)
    mass = tl.zeros((PART,), tl.float32)
    for start in tl.range(0, VOCABULARY, PART):
        at = start + part
        mass += tl.exp(_logits(logits_pointer, end_pointer, is_short, temperature, at, at < VOCABULARY) - top)
    nucleus = tl.sum(mass, 0) * top_p

    bound = tl.full((), float("-inf"), tl.float32)  # of logits that are out
    token = tl.full((), 0, tl.int32)
    searching = True
    while searching:
        best = tl.full((PART,), -1.0, tl.float32)
        where = tl.zeros((PART,), tl.int32)
        for start in tl.range(0, VOCABULARY, PART):
            at = start + part
            logits = _logits(logits_pointer, end_pointer, is_short, temperature, at, at < VOCABULARY)
            chance = tl.exp(logits - top) / tl.load(noise_pointer + at, at < VOCABULARY, 1.0)
            chance = tl.where(logits > bound, chance, -1.0)
            where = tl.where(chance > best, at, where)
            best = tl.maximum(best, chance)
        token = tl.min(tl.where(best == tl.max(best, 0), where, VOCABULARY - 1), 0)
        chosen = _logits(logits_pointer, end_pointer, is_short, temperature, token, True)
        likelier = tl.zeros((PART,), tl.float32)
        for start in tl.range(0, VOCABULARY, PART):
            at = start + part
            logits = _logits(logits_pointer, end_pointer, is_short, temperature, at, at < VOCABULARY)
            likelier += tl.where(logits > chosen, tl.exp(logits - top), 0.0)
        searching = tl.sum(likelier, 0) >= nucleus  # False for NaN, so that it ends
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
        (texts, heads * D) bfloat16.
    """
    texts, key_heads, capacity, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * key_heads
    out = qkv.new_empty(texts, heads * dim)
    queries = max(LEAST_QUERIES, triton.next_power_of_2(heads // key_heads))
    _attention[(texts, key_heads)](
        qkv, cosine.contiguous(), sine.contiguous(), query_scale.contiguous(), position.contiguous(), keys, values,
        out, scaling, capacity, heads, key_heads, dim, queries, POSITIONS, INTERPRETED, num_warps=WARPS,
    )  # fmt: skip
    return out


@on_its_device
def sample(logits, noise, end, count, minimum, temperature, top_p) -> torch.Tensor:
    """One draw from the nucleus of each distribution, (texts, 1) int64.

    Args:
        logits: (texts, vocabulary), any floating dtype.
        noise: (texts, vocabulary) float32, from an exponential distribution.
        end: (vocabulary,) bool, True at end tokens.
        count: () int64, new tokens so far.
        minimum: () int64, new tokens before which no end token may come.
        temperature: Divides the logits.
        top_p: Least mass of the nucleus.
    """
    token = torch.empty(len(logits), 1, dtype=torch.int64, device=logits.device)
    _sample[(len(logits),)](
        logits.contiguous(), noise, end, count, minimum, token, float(temperature), float(top_p), logits.shape[1],
        VOCABULARY_PART, num_warps=SAMPLING_WARPS,
    )  # fmt: skip
    return token
