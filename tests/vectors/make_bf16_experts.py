"""Makes bf16-experts.safetensors: four experts of layer 2 as the bf16 model has them, and their part of the layer's output.

    python3 make_bf16_experts.py BF16_MODEL_FOLDER

y is the weighted sum over the experts 8..11 alone, for the first 64 tokens of models/novels-18m-golden.safetensors (tale.layer2.x,
topk_idx, topk_weight), in fp64 from the bf16 weights with no rounding in between, rounded once to F32. Needs numpy; independent of
the library. The weights keep their names in the model.
"""
import json
import pathlib
import struct
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE.parent.parent / "models" / "novels-18m-golden.safetensors"
LAYER, EXPERTS, TOKENS = 2, range(8, 12), 64
NUMPY = {"F32": "<f4", "I32": "<i4", "BF16": "<u2"}


def read(path):
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(raw[8 + n + t["data_offsets"][0] : 8 + n + t["data_offsets"][1]], NUMPY[t["dtype"]]).reshape(t["shape"])
        for name, t in header.items()
        if t["dtype"] in NUMPY
    }


def write(path, tensors):
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        raw = array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def main():
    model = {}
    for shard in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
        model.update(read(shard))
    golden = read(GOLDEN)
    x, ids, weights = (golden[f"tale.layer{LAYER}.{name}"][:TOKENS] for name in ("x", "topk_idx", "topk_weight"))
    x, weights, y, out = bf16(x), weights.astype(np.float64), 0.0, {}
    for e in EXPERTS:
        w = {}
        for proj in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.{LAYER}.mlp.experts.{e}.{proj}.weight"
            out[name] = ("BF16", model[name])
            w[proj] = bf16(model[name])
        g, u = x @ w["gate_proj"].T, x @ w["up_proj"].T
        o = (g / (1 + np.exp(-g)) * u) @ w["down_proj"].T
        y = y + o * (weights * (ids == e)).sum(axis=1, keepdims=True)
    out["y"] = ("F32", y.astype("<f4"))
    write(HERE / "bf16-experts.safetensors", out)


main()
