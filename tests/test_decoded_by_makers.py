"""Whole weights of MLX and bitsandbytes stand for what these packages say, to the bit, and keep their bytes.

``decoded_by_makers.json`` has the parts of small weights with random codes, and the digest of what the named package
made of them in float32.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from coded_checkpoints import direction_of

from ablate_shards.kernels.codecs.packing import pack, unpack
from ablate_shards.kernels.rounding.directed import round_directed
from ablate_shards.surgery.checkpoint.headers import TensorInfo
from ablate_shards.surgery.dequantise.decoding import CodedWeight, read_scales

MADE = json.loads((Path(__file__).parent / "decoded_by_makers.json").read_text())


def weight_of(made):
    raw, tensors = {}, {}
    for rest, (dtype, shape, content) in made["parts"].items():
        name, data = f"m.{rest}", bytes.fromhex(content)
        raw[name], tensors[name] = data, TensorInfo(name, dtype, tuple(shape), "shard", 0, len(data))

    def read(tensor):
        return raw[tensor.name][tensor.start : tensor.end]

    scales = read_scales(tensors["m.weight"], tensors, made["config"], read)
    return CodedWeight(tensors["m.weight"], scales, read, "")


@pytest.mark.parametrize("made", MADE, ids=lambda made: made["form"])
def test_a_weight_is_what_its_maker_says_and_unedited_it_keeps_its_bytes(made):
    weight = weight_of(made)
    rows, columns = made["shape"]
    assert (weight.rows, weight.columns()) == (rows, columns)
    spread, raw = weight.spread(0), weight.read_rows(0, slice(0, rows)).copy()
    values = weight.decode(raw, spread, 0, columns)
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() == made["sha256"]
    assert np.array_equal(weight.decode(weight.read_rows(0, slice(1, 3)), spread, 1, columns), values[1:3])

    codes, bits = unpack(raw, spread.grid.bits, columns).copy(), spread.grid.bits
    scales, zeros = spread.part(slice(0, rows), slice(0, columns))
    round_directed(spread.grid, values, codes, scales, direction_of(rows), zeros)
    written = raw.copy()
    pack(codes, bits, written)
    assert np.array_equal(written, raw)
    assert weight.turned_back(raw).tobytes().hex() == made["parts"]["weight"][2]
