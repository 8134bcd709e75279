"""Makes tests/vectors/oracles.safetensors: what NVIDIA's ModelOpt and compressed-tensors themselves make of the rows x of codec.safetensors.

Needs torch, nvidia-modelopt and compressed-tensors, which are too large for every run of the tests: their results are kept. Made with
torch 2.15.0, nvidia-modelopt 0.47.0 and compressed-tensors 0.20.0, on the CPU, in fp32.
Usage: make_oracle_vectors.py CODEC OUT, or --check CODEC FILE (exit 1 when FILE is not what this program makes, 77 without the packages).
"""
import json
import struct
import sys

try:
    import numpy as np
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
except ImportError as error:
    print(f"skipped, needs torch, nvidia-modelopt and compressed-tensors: {error}")
    sys.exit(77)

KINDS = ("normal", "ties", "outliers", "gaps", "edges", "close", "subnormal", "tiny", "huge", "bits", "zeros")
# Where the packages give up and docs/numerics.md does not:
LEFT_OUT = {
    # 2688 / amax overflows: compressed-tensors takes 1 for it, and loses the tensor
    ("compressed_tensors", "subnormal"), ("compressed_tensors", "tiny"),
    # amax / 2688 is 0: ModelOpt divides 0 by 0
    ("modelopt", "tiny"), ("modelopt_static", "tiny"), ("modelopt", "zeros"), ("modelopt_static", "zeros"),
}


def modelopt(x):
    q, scale, s2 = NVFP4QTensor.quantize(x.clone(), 16)
    return q._quantized_data, scale, s2


class StaticQuantizer:
    """What export reads of a calibrated weight quantizer."""

    def __init__(self, x):
        self.block_sizes = {-1: 16}
        self.global_amax = x.abs().max()
        self._amax = x.reshape(-1, 16).abs().amax(-1)


def modelopt_static(x):
    scale, s2 = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(StaticQuantizer(x), x)
    q, _, _ = NVFP4QTensor.quantize(x.clone(), 16, scale, s2)
    return q._quantized_data, scale, s2


def compressed_tensors(x):
    args = QuantizationArgs(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16,
                            scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn)
    gs = generate_gparam(x.min(), x.max())
    blocks = x.reshape(x.shape[0], -1, 16)
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=gs)
    return quantize_and_pack_fp4(x, scale, global_scale=gs), scale, gs


def read(path):
    data = open(path, "rb").read()
    n, = struct.unpack("<Q", data[:8])
    out = {}
    for name, t in json.loads(data[8:8 + n]).items():
        if name.endswith(".x") and name != "numbers.x":
            raw = data[8 + n + t["data_offsets"][0]:8 + n + t["data_offsets"][1]]
            out[name[:-2]] = np.frombuffer(raw, np.float32).reshape(t["shape"])
    return out


def make(rows):
    out = {}
    for kind in KINDS:
        x = torch.from_numpy(rows[kind].copy())
        for recipe in (modelopt, modelopt_static, compressed_tensors):
            if (recipe.__name__, kind) in LEFT_OUT:
                continue
            cases = {"tensor": [recipe(x)], "row": [recipe(row[None]) for row in x]}
            for name, results in cases.items():
                codes, scales, used = zip(*results)
                prefix = f"{kind}.{recipe.__name__}.{name}"
                out[f"{prefix}.codes"] = torch.cat(codes).numpy()
                out[f"{prefix}.scales"] = torch.cat([s.to(torch.float8_e4m3fn).view(torch.uint8) for s in scales]).numpy()
                out[f"{prefix}.global"] = torch.cat([g.reshape(1) for g in used]).numpy()
    return out


def safetensors(tensors):
    header, data = {}, b""
    for name, t in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        raw = np.ascontiguousarray(t).tobytes()
        header[name] = {"dtype": {"float32": "F32", "uint8": "U8"}[t.dtype.name], "shape": list(t.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def main():
    check = sys.argv[1:2] == ["--check"]
    if len(sys.argv) != 3 + check:
        sys.exit(__doc__)
    codec, file = sys.argv[1 + check:]
    made = safetensors(make(read(codec)))
    if not check:
        open(file, "wb").write(made)
    elif open(file, "rb").read() != made:
        sys.exit(f"{file} is not what {sys.argv[0]} makes")


main()
