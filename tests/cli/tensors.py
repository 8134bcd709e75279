"""Safetensors files and small models for the command-line tests, with nothing but Python's standard library."""
import array
import json
import struct

BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1}
CODE = {"F64": "d", "F32": "f", "I32": "i", "I64": "q", "U8": "B", "I8": "b", "F8_E4M3": "B"}


def pack(dtype, values):
    if dtype == "BF16":  # the values the tests use are exact in bf16, or may be cut
        bits = array.array("I", array.array("f", values).tobytes())
        return array.array("H", [b >> 16 for b in bits]).tobytes()
    if dtype == "F16":
        return struct.pack(f"<{len(values)}e", *values)
    return array.array(CODE[dtype], values).tobytes()


def unpack(dtype, raw):
    if dtype == "BF16":
        return array.array("f", array.array("I", [h << 16 for h in array.array("H", raw)]).tobytes())
    if dtype == "F16":
        return list(struct.unpack(f"<{len(raw) // 2}e", raw))
    return array.array(CODE[dtype], raw)


def write(path, tensors):
    """tensors: {name: (dtype, shape, values)}"""
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        raw = values if isinstance(values, bytes) else pack(dtype, values)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read(path):
    """{name: (dtype, shape, values)}; the header's length, offsets and alignment are asserted."""
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    assert n % 8 == 0
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    out, at = {}, 0
    for name, t in header.items():
        begin, end = t["data_offsets"]
        size = BYTES[t["dtype"]]
        assert begin == at and begin % size == 0, name
        for d in t["shape"]:
            size *= d
        assert end - begin == size, name
        out[name] = (t["dtype"], t["shape"], unpack(t["dtype"], raw[8 + n + begin : 8 + n + end]))
        at = end
    assert 8 + n + at == len(raw)
    return out


def relative_l2(y, wanted):
    num = sum((a - b) ** 2 for a, b in zip(y, wanted))
    return (num / sum(b * b for b in wanted)) ** 0.5


class TinyModel:
    """Two layers, the first dense, bf16; hidden 32, four experts of 16, top 2. Weights are small multiples of 1/64."""

    hidden, intermediate, experts, top_k = 32, 16, 4, 2

    def __init__(self, folder):
        self.folder = folder
        self.tensors, self.seed = {}, 1
        h, n = self.hidden, self.intermediate
        for module in ["model.layers.0.mlp."] + [f"model.layers.1.mlp.experts.{e}." for e in range(self.experts)]:
            for proj, shape in (("gate_proj", (n, h)), ("up_proj", (n, h)), ("down_proj", (h, n))):
                self.tensors[f"{module}{proj}.weight"] = ("BF16", shape, self.numbers(n * h))
        self.tensors["model.layers.1.mlp.gate.weight"] = ("BF16", (self.experts, h), self.numbers(self.experts * h))
        folder.mkdir()
        write(folder / "model.safetensors", self.tensors)
        (folder / "config.json").write_text(json.dumps(self.config()))

    def config(self):
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "moe_intermediate_size": self.intermediate, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": self.experts,
            "num_experts_per_tok": self.top_k, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [0],
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 64, "hidden_act": "silu",
        }  # fmt: skip

    def numbers(self, n):
        out = []
        for _ in range(n):
            self.seed = (self.seed * 1103515245 + 12345) % 2**31
            out.append(((self.seed >> 16) % 65 - 32) / 64)
        return out
