"""What runs on the device for kernels/triton.py; triton_work.py lays `work` out.

Sizes that differ from call to call are never specialized on, so that no call compiles anew.
"""

import torch
import triton
import triton.language as tl

FORMATS = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
    torch.int8: tl.int8, torch.float8_e4m3fn: tl.float8e4nv,
}  # fmt: skip
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_AT_ONCE = tl.constexpr(16)  # splits joined
# Of weights multiplied by the scales of V: they are then no larger than V, which fp16 can hold, and
# no smaller than half of it. fp8 needs none: the 256 that `_real` leaves out does as much.
_LIFT = tl.constexpr(64.0)
_FP8, _INT8 = tl.constexpr(tl.float8e4nv), tl.constexpr(tl.int8)
_FP8_UNIT = tl.constexpr(256.0)


@triton.jit(do_not_specialize=["splits_at", "first_split", "split_size", "rows", "group"])
def attend_split(
    query, work, partial, partial_lse,
    head_step, token_step, splits_at, first_split, split_size, rows, group, scale, softcap,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    STORED: tl.constexpr, PRODUCT: tl.constexpr,
    ALIGNED: tl.constexpr, HIDING: tl.constexpr, CAPPED: tl.constexpr,
    BIASED: tl.constexpr, ASKED: tl.constexpr,
):  # fmt: skip
    """A tile of a lane's rows over one split: output [S, G N, D] and log-sum-exp [S, G N]. Zeros
    and a number near fp32's lowest for a row that sees nothing.

    Scales are applied to scores and weights: of these there are fewer than numbers in K and V, and
    no format of the arithmetic rounds a number of int8 or fp8. ASKED: each segment says where the
    queries lie."""
    scaled: tl.constexpr = STORED.primitive_bitwidth == 8
    is_fp8: tl.constexpr = STORED == _FP8
    loaded: tl.constexpr = tl.int8 if is_fp8 else STORED
    unit: tl.constexpr = _FP8_UNIT if is_fp8 else 1.0
    lift: tl.constexpr = _LIFT if STORED == _INT8 else 1.0
    line: tl.constexpr = 128 // STORED.primitive_bitwidth  # numbers in 16 bytes
    split = first_split + tl.program_id(0)
    lane = tl.load(work + splits_at + 4 * split)
    begin = tl.load(work + splits_at + 4 * split + 1) * split_size
    first_segment = tl.load(work + splits_at + 4 * split + 2).to(tl.int32)
    last_segment = tl.load(work + splits_at + 4 * split + 3).to(tl.int32)

    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    token = row // group
    newest = tl.minimum((tl.program_id(1) + 1) * ROWS - 1, rows - 1) // group  # of the tile
    d = tl.arange(0, WIDTH)
    is_d = (d < D)[None, :]
    at = (lane * group + row % group) * head_step + token * token_step
    q = tl.load(query + at[:, None] + d[None, :], mask=is_row[:, None] & is_d, other=0.0)
    q = q.to(PRODUCT)

    highest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, WIDTH], tl.float32)
    for number in range(first_segment, last_segment):
        segment = work + 17 * number
        tokens = tl.load(segment + 1)
        before = tl.load(segment + 2)
        keys = tl.load(segment + 3).to(tl.pointer_type(loaded))
        values = tl.load(segment + 4).to(tl.pointer_type(loaded))
        key_scales = tl.load(segment + 5).to(tl.pointer_type(tl.bfloat16))
        value_scales = tl.load(segment + 6).to(tl.pointer_type(tl.bfloat16))
        mask_at = tl.load(segment + 9)
        keys_step = tl.load(segment + 10)
        values_step = tl.load(segment + 11)
        mask_step = tl.load(segment + 12)
        causal = tl.load(segment + 16)
        if ASKED:
            own = tl.load(segment + 8).to(tl.pointer_type(query.dtype.element_ty))
            at = row % group * tl.load(segment + 14) + token * tl.load(segment + 15)
            q = tl.load(own + at[:, None] + d[None, :], mask=is_row[:, None] & is_d, other=0.0)
            q = q.to(PRODUCT)
        if BIASED:
            bias_at = tl.load(segment + 7)
            is_biased = row < tl.where(bias_at != 0, rows, 0)
            biases = bias_at.to(tl.pointer_type(tl.float32))
            biases = biases + token[:, None] * tl.load(segment + 13)
        if ALIGNED:  # lets a thread load 16 bytes at once
            keys = tl.multiple_of(keys, 16)
            values = tl.multiple_of(values, 16)
            keys_step = tl.multiple_of(keys_step, line)
            values_step = tl.multiple_of(values_step, line)
        if HIDING:
            tokens = tl.where(causal != 0, tl.minimum(tokens, newest + 1), tokens)
            last_seen = tl.where(causal != 0, token, tokens)
            is_masked = row < tl.where(mask_at != 0, rows, 0)
            flags = mask_at.to(tl.pointer_type(tl.int8)) + token[:, None] * mask_step
        start = tl.maximum(begin - before, 0).to(tl.int32)
        stop = tl.minimum(begin + split_size - before, tokens).to(tl.int32)
        for tile in range(start, stop, TOKENS):
            t = tl.arange(0, TOKENS)
            is_t = tile + t < stop
            here = is_t[:, None] & is_d
            k_at = t[:, None] * keys_step.to(tl.int32) + d[None, :]
            k = tl.load(keys + tile * keys_step + k_at, mask=here, other=0.0)
            k = _real(k, STORED, PRODUCT)
            k_scales = key_scales + tile + t
            scores = _scores(q, k, scale, softcap, k_scales, is_t, scaled, unit, CAPPED)
            seen = is_t[None, :]
            if BIASED:
                added = seen & is_biased[:, None]
                scores += tl.load(biases + tile + t[None, :], mask=added, other=0.0)
            if HIDING:
                seen = seen & (tile + t[None, :] <= last_seen[:, None])
                asked = seen & is_masked[:, None]
                seen = seen & (tl.load(flags + tile + t[None, :], mask=asked, other=1) != 0)
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            shrunk = tl.exp(highest - higher)
            v_at = t[:, None] * values_step.to(tl.int32) + d[None, :]
            v = tl.load(values + tile * values_step + v_at, mask=here, other=0.0)
            v = _real(v, STORED, PRODUCT)
            output = output * shrunk[:, None]
            total = total * shrunk + tl.sum(weights, 1)
            if scaled:
                value_scale = tl.load(value_scales + tile + t, mask=is_t, other=0.0)
                weights = weights * (value_scale.to(tl.float32) * unit * lift)[None, :]
            output += tl.dot(weights.to(PRODUCT), v, input_precision="ieee")
            highest = higher

    total = tl.maximum(total, _TINY)
    output = output / lift
    place = split.to(tl.int64) * rows + row
    tl.store(partial_lse + place, highest + tl.log(total), mask=is_row)
    out = partial + place[:, None] * D + d[None, :]
    tl.store(out, output / total[:, None], mask=is_row[:, None] & is_d)


@triton.jit
def _scores(
    q, k, scale, softcap, key_scales, is_key,
    SCALED: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """[ROWS, TOKENS] of a tile, before a bias."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SCALED:
        key_scale = tl.load(key_scales, mask=is_key, other=0.0)
        scores = scores * (key_scale.to(tl.float32) * UNIT)[None, :]
    if CAPPED:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
    return scores


@triton.jit
def _real(numbers, STORED: tl.constexpr, PRODUCT: tl.constexpr):
    """What was loaded, in the format of products; fp8, loaded as int8, over 256.

    A number of e4m3 has fp16's layout, but for an exponent shorter by its highest bit: sign and the
    rest moved to their places are fp16, in which exponents count from 8 lower; subnormals alike. No
    GPU is too old for that, and entries hold no NaN, which would become a number."""
    if STORED == _FP8:
        # widened, the sign is in all upper bits: it lands on fp16's, and on the bit to be cleared
        bits = (numbers.to(tl.int16) << 7) & ~0x4000
        numbers = bits.to(tl.float16, bitcast=True)
    return numbers.to(PRODUCT)


@triton.jit(do_not_specialize=["order_at", "bounds_at", "rows", "group"])
def join_splits(
    partial, partial_lse, work, output, order_at, bounds_at, rows, group,
    D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row of a lane over all its splits: into `output`, [Hq, N, D]."""
    row, lane = tl.program_id(0) % rows, tl.program_id(0) // rows
    first = tl.load(work + bounds_at + lane).to(tl.int32)
    last = tl.load(work + bounds_at + lane + 1).to(tl.int32)
    d = tl.arange(0, WIDTH)
    is_d = d < D
    highest = tl.full([1], _LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    joined = tl.zeros([WIDTH], tl.float32)
    for at in range(first, last, _AT_ONCE):
        index = at + tl.arange(0, _AT_ONCE)
        is_split = index < last
        place = tl.load(work + order_at + index, mask=is_split, other=0) * rows + row
        lse = tl.load(partial_lse + place, mask=is_split, other=float("-inf"))
        parts = partial + place[:, None] * D + d[None, :]
        part = tl.load(parts, mask=is_split[:, None] & is_d[None, :], other=0.0)
        higher = tl.maximum(highest, tl.max(lse, 0))
        weights = tl.exp(lse - higher)
        shrunk = tl.exp(highest - higher)
        joined = joined * shrunk + tl.sum(weights[:, None] * part, 0)
        total = total * shrunk + tl.sum(weights, 0)
        highest = higher
    joined = joined / tl.maximum(total, _TINY)
    head, tokens = lane * group + row % group, rows // group
    place = (head.to(tl.int64) * tokens + row // group) * D
    tl.store(output + place + d, joined.to(output.dtype.element_ty), mask=is_d)
