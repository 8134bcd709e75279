"""docs/numerics.md and its routers in fp64 with numpy: one layer of a checkpoint that make_families.py made. Independent of the library:
it reads the files itself, and shares with the library nothing but the contract."""
import json
import pathlib
import struct
import sys

import numpy as np

import make_families as families

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "vectors"))
import make_codec_vectors as codec  # noqa: E402  (the recipes of numerics.md)

f32, f64 = np.float32, np.float64


def read(path):
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    out = {}
    for name, t in json.loads(raw[8 : 8 + n]).items():
        if name != "__metadata__":
            begin, end = (8 + n + at for at in t["data_offsets"])
            out[name] = np.frombuffer(raw[begin:end], families.NUMPY[t["dtype"]]).reshape(t["shape"])
    return out


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(f32).astype(f64)


def to_bf16(x):
    return from_bf16(codec.bf16_bits(x.astype(f64)))


def from_fp8(bytes_, scale):
    """E4M3 with a scale for each block, of 32 or 128 rows and columns, whichever the shapes say; E8M0 scales are bytes."""
    sign, exponent, mantissa = bytes_ >> 7, (bytes_ >> 3 & 15).astype(int), (bytes_ & 7).astype(f64)
    magnitude = np.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa * 2.0**-9)
    scale = 2.0 ** (scale.astype(f64) - 127) if scale.dtype == np.uint8 else scale.astype(f64)
    for axis in (0, 1):
        n = bytes_.shape[axis]
        (block,) = {b for b in (32, 128) if -(-n // b) == scale.shape[axis]} if scale.shape[axis] > 1 else {n}
        scale = np.repeat(scale, block, axis).take(range(n), axis)
    return np.where(sign, -magnitude, magnitude) * scale


class Matrix:
    """W [N,K] in fp64 without its global factor, which is fp32 as the contract has it."""

    def __init__(self, tensors, name):
        packed = tensors.get(f"{name}.weight_packed")
        fp8 = next((tensors[name + end] for end in (".weight_scale_inv", ".scale") if name + end in tensors), None)
        self.quantized = packed is not None or f"{name}.weight_scale_2" in tensors
        self.factor = self.input_scale = f32(1)
        if fp8 is not None:
            self.w = from_fp8(tensors[f"{name}.weight"], fp8)
            return
        if not self.quantized:
            self.w = from_bf16(tensors[f"{name}.weight"])
            return
        codes = tensors[f"{name}.weight"] if packed is None else packed
        codes = np.stack((codes & 15, codes >> 4), -1).reshape(codes.shape[0], -1, 16)
        self.w = codec.exact(codes, tensors[f"{name}.weight_scale"]).reshape(codes.shape[0], -1)
        if packed is None:
            self.factor, self.input_scale = tensors[f"{name}.weight_scale_2"][0], tensors[f"{name}.input_scale"][0]
        else:
            self.factor = f32(1) / tensors[f"{name}.weight_global_scale"][0]
            self.input_scale = f32(1) / tensors[f"{name}.input_global_scale"][0]

    def __call__(self, rounded):
        x, decode = rounded
        return x @ self.w.T * f64(self.factor) * decode


def rounded(x, mode, quantized, input_scale, amax):
    """x [T,K] fp32 as a product reads it, and its decode factor."""
    if not quantized:
        return x.astype(f64), 1.0
    if mode == "w4a16":
        return to_bf16(x), 1.0
    rows = len(x)
    if mode == "static":
        encode = np.full(rows, min(f32(1) / input_scale, codec.FLT_MAX), f32)
        decode = np.full(rows, input_scale, f32)
    else:
        a = np.abs(x).max(-1) if mode == "token" else np.full(rows, amax, f32)
        encode = codec.first_global("activation", a, False)
        decode = f32(1) / encode
    codes, scale, _ = codec.activation(x.reshape(rows, -1, 16), encode, None)
    return codec.exact(codes, scale).reshape(rows, -1), decode.astype(f64)[:, None]


def activated(spec, g, u):
    if spec["activation"] == "relu2":
        return np.maximum(u, 0) ** 2
    if spec["limit"]:
        g, u = np.minimum(g, spec["limit"]), np.clip(u, -spec["limit"], spec["limit"])
    return g / (1 + np.exp(-g)) * u


class Expert:
    def __init__(self, spec, tensors, prefix):
        gate, up, down = spec["proj"]
        self.spec = spec
        self.gate = Matrix(tensors, prefix + gate) if gate else None
        self.up, self.down = Matrix(tensors, prefix + up), Matrix(tensors, prefix + down)

    def hidden(self, x, mode, amax):
        scale = self.up.input_scale if self.gate is None else max(self.up.input_scale, self.gate.input_scale)
        xq = rounded(x, mode, self.up.quantized, scale, amax)
        return activated(self.spec, None if self.gate is None else self.gate(xq), self.up(xq)).astype(f32)

    def output(self, h, mode, amax):
        return self.down(rounded(h, mode, self.down.quantized, self.down.input_scale, amax))


def route(spec, tensors, prefix, layer, x, token_ids):
    """ids [T,k], weights [T,k] in fp64."""
    config, k = spec["config"], families.TOP_K
    logits = x.astype(f64) @ from_bf16(tensors[f"{prefix}{spec['router']}.weight"]).T
    if spec["scores"] == "softmax":
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits)) if spec["scores"] == "sigmoid" else np.sqrt(np.log1p(np.exp(logits)))
    if layer < spec["hash_layers"]:
        ids = tensors[prefix + spec["table"]][token_ids]
    else:
        choice = scores + (tensors[prefix + spec["bias"]].astype(f64) if spec["bias"] else 0)
        groups, chosen = config.get("n_group", 1), config.get("topk_group", 1)
        if groups > 1:
            by_group = np.sort(choice.reshape(len(x), groups, -1), -1)[..., -2:].sum(-1)
            best = np.argsort(-by_group, -1, kind="stable")[:, :chosen]
            keep = np.zeros((len(x), groups), bool)
            np.put_along_axis(keep, best, True, -1)
            choice = np.where(np.repeat(keep, choice.shape[1] // groups, -1), choice, -np.inf)
        ids = np.argsort(-choice, -1, kind="stable")[:, :k]
    weights = np.take_along_axis(scores, ids, -1)
    return ids, weights / weights.sum(-1, keepdims=True) * config.get("routed_scaling_factor", 1)


class Layer:
    def __init__(self, name, folder, layer):
        self.spec = spec = families.MODELS[name]
        tensors, inputs = read(folder / "model.safetensors"), read(folder.with_suffix(".input.safetensors"))
        self.x = inputs["x"]
        prefix = f"{spec['root']}layers.{layer}."
        self.shared = None
        if spec["kinds"][layer] == "d":
            self.experts = [Expert(spec, tensors, prefix + spec["mlp"])]
            self.ids, self.weights = np.zeros((len(self.x), 1), int), np.ones((len(self.x), 1))
            return
        self.ids, self.weights = route(spec, tensors, prefix, layer, self.x, inputs["token_ids"])
        self.experts = [Expert(spec, tensors, f"{prefix}{spec['experts']}{e}.") for e in range(families.EXPERTS)]
        if spec["shared"]:
            self.shared = Expert(spec, tensors, prefix + spec["shared"])

    def run(self, mode, with_shared):
        """y [T,H] in fp64."""
        x, y = self.x, np.zeros(self.x.shape, f64)
        amax = np.abs(x).max()
        slots = [(t, j) for t in range(len(x)) for j in range(self.ids.shape[1])]
        h = {(t, j): self.experts[self.ids[t, j]].hidden(x[t : t + 1], mode, amax) for t, j in slots}
        largest = max(np.abs(row).max() for row in h.values())
        for t, j in slots:
            y[t] += self.weights[t, j] * self.experts[self.ids[t, j]].output(h[t, j], mode, largest)[0]
        if with_shared:
            row = self.shared.hidden(x, mode, amax)
            y += self.shared.output(row, mode, np.abs(row).max())
        return y
