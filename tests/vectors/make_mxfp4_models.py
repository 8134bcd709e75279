"""Small checkpoints whose experts are MXFP4 or stand in one tensor, as DeepSeek-V4, gpt-oss, Llama-4 and Qwen3-VL ship them, and what their
matrices are worth in fp64. Written against the formats as published, with nothing but Python's standard library.
Usage: make_mxfp4_models.py FOLDER
"""
import json
import pathlib
import random
import struct
import sys

E2M1 = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6]
HIDDEN, INTER, EXPERTS = 64, 32, 3


def mx_value(code, exponent):
    """Exact: a double has room for every E2M1 times every power of two that E8M0 has."""
    return E2M1[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (exponent - 127)


def mxfp4(rng, rows, cols, low, high):
    """(codes as bytes, exponents, values): scales between 2^low and 2^high; one block of zeros has an exponent far away."""
    codes = [rng.randrange(16) for _ in range(rows * cols)]
    exponents = [127 + rng.randint(low, high) for _ in range(rows * cols // 32)]
    exponents[0], exponents[1] = 127 + low, 127 + high
    codes[0], codes[32] = 3, 7
    if len(exponents) > 4:
        codes[64:96] = [rng.choice((0, 8)) for _ in range(32)]
        exponents[2] = 254
    values = [mx_value(c, exponents[i // 32]) for i, c in enumerate(codes)]
    return bytes(codes[i] | codes[i + 1] << 4 for i in range(0, len(codes), 2)), bytes(exponents), values


def bf16(values):
    return b"".join(struct.pack("<f", v)[2:] for v in values)


def wide(rng, n):
    """Values that bf16 has exactly."""
    return [rng.randint(-128, 127) / 64 for _ in range(n)]


def e4m3(byte):
    m, e = byte & 7, byte >> 3 & 15
    return (m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10)) * (-1 if byte & 128 else 1)


def deepseek_v4():
    """(config, tensors, {module: (rows, cols, values)}): experts of MXFP4 in `scale`, shared ones of FP8 with E8M0 factors."""
    rng = random.Random(4)
    tensors, values = {}, {}
    config = {"model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"], "hidden_size": HIDDEN, "vocab_size": 32,
              "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "moe_intermediate_size": INTER,
              "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2, "norm_topk_prob": True,
              "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "num_hash_layers": 0,
              "swiglu_limit": 1.5, "q_lora_rank": 24, "hidden_act": "silu", "num_nextn_predict_layers": 1,
              "quantization_config": {"quant_method": "fp8"}}  # fmt: skip
    spans = {"0.w1": (-12, -3), "0.w3": (-9, 2), "0.w2": (-127, -118), "1.w1": (-20, -4), "1.w3": (-6, -2), "1.w2": (-22, -2),
             "2.w1": (110, 120), "2.w3": (127, 127), "2.w2": (-8, -8)}  # fmt: skip
    for name, (low, high) in spans.items():
        rows, cols = (HIDDEN, INTER) if name.endswith("w2") else (INTER, HIDDEN)
        module = f"layers.0.ffn.experts.{name}"
        codes, exponents, values[module] = mxfp4(rng, rows, cols, low, high)
        values[module] = (rows, cols, values[module])
        tensors[module + ".weight"] = ("I8", [rows, cols // 2], codes)
        tensors[module + ".scale"] = ("F8_E8M0", [rows, cols // 32], exponents)
    for proj, rows, cols in (("w1", INTER, HIDDEN), ("w3", INTER, HIDDEN), ("w2", HIDDEN, INTER)):
        module = f"layers.0.ffn.shared_experts.{proj}"
        raw = bytes(rng.randrange(0x20, 0x50) | rng.choice((0, 128)) for _ in range(rows * cols))
        tensors[module + ".weight"] = ("F8_E4M3", [rows, cols], raw)
        tensors[module + ".scale"] = ("F8_E8M0", [1, 1], bytes([120]))
        values[module] = (rows, cols, [e4m3(b) * 2.0**-7 for b in raw])
    codes, exponents, _ = mxfp4(rng, INTER, HIDDEN, -8, -4)
    tensors["mtp.0.ffn.experts.0.w1.weight"] = ("I8", [INTER, HIDDEN // 2], codes)
    tensors["mtp.0.ffn.experts.0.w1.scale"] = ("F8_E8M0", [INTER, HIDDEN // 32], exponents)
    tensors["layers.0.ffn.gate.weight"] = ("BF16", [EXPERTS, HIDDEN], bf16(wide(rng, EXPERTS * HIDDEN)))
    tensors["embed.weight"] = ("BF16", [32, HIDDEN], bf16(wide(rng, 32 * HIDDEN)))
    return config, tensors, values


def gpt_oss():
    """Experts of MXFP4 in `_blocks` and `_scales`, gate and up every other row, biases likewise."""
    rng = random.Random(20)
    tensors, values = {}, {}
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": 1}
    root = "model.layers.0.mlp.experts."
    for proj, rows, cols in (("gate_up_proj", 2 * INTER, HIDDEN), ("down_proj", HIDDEN, INTER)):
        blocks, scales, biases = b"", b"", []
        for e in range(EXPERTS):
            codes, exponents, v = mxfp4(rng, rows, cols, -9, -2)
            bias = wide(rng, rows)
            blocks, scales, biases = blocks + codes, scales + exponents, biases + bias
            if proj == "down_proj":
                values[f"{root}{e}.down_proj"] = (rows, cols, v, bias)
                continue
            for side, half in enumerate(("gate_proj", "up_proj")):
                taken = [x for r in range(side, rows, 2) for x in v[r * cols : (r + 1) * cols]]
                values[f"{root}{e}.{half}"] = (rows // 2, cols, taken, bias[side::2])
        tensors[f"{root}{proj}_blocks"] = ("U8", [EXPERTS, rows, cols // 32, 16], blocks)
        tensors[f"{root}{proj}_scales"] = ("U8", [EXPERTS, rows, cols // 32], scales)
        tensors[f"{root}{proj}_bias"] = ("BF16", [EXPERTS, rows], bf16(biases))
    tensors["model.layers.0.self_attn.q_proj.weight"] = ("BF16", [HIDDEN, HIDDEN], bf16(wide(rng, HIDDEN * HIDDEN)))
    return config, tensors, values


def fused(model_type, root, interleaved, hidden=HIDDEN, inter=INTER, experts=EXPERTS):
    """Wide experts in one tensor [E, K, N]."""
    rng = random.Random(model_type)
    tensors, values = {}, {}
    config = {"model_type": "some_vl", "text_config": {"model_type": model_type, "hidden_size": hidden}}
    for proj, rows, cols in (("gate_up_proj", 2 * inter, hidden), ("down_proj", hidden, inter)):
        v = [wide(rng, rows * cols) for _ in range(experts)]  # [K, N]
        tensors[f"{root}{proj}"] = ("BF16", [experts, cols, rows], bf16([x for e in v for x in e]))
        for e in range(experts):
            def matrix(which):
                return [v[e][k * rows + n] for n in which for k in range(cols)]
            if proj == "down_proj":
                values[f"{root}{e}.down_proj"] = (rows, cols, matrix(range(rows)))
                continue
            half = rows // 2
            for side, name in enumerate(("gate_proj", "up_proj")):
                which = range(side, rows, 2) if interleaved else range(side * half, side * half + half)
                values[f"{root}{e}.{name}"] = (half, cols, matrix(which))
    tensors["vision_model.layers.0.self_attn.q_proj.weight"] = ("BF16", [16, 16], bf16(wide(rng, 256)))
    return config, tensors, values


MODELS = {
    "deepseek_v4": deepseek_v4,
    "gpt_oss": gpt_oss,
    "gpt_oss-bf16": lambda: fused("gpt_oss", "model.layers.0.mlp.experts.", True),
    "llama4": lambda: fused("llama4_text", "language_model.model.layers.0.feed_forward.experts.", False),
    "llama4-large": lambda: fused("llama4_text", "model.layers.0.feed_forward.experts.", False, 256, 272, 1),  # more rows than one piece has
    "qwen3_vl_moe": lambda: fused("qwen3_vl_moe_text", "model.language_model.layers.0.mlp.experts.", False),
}


def write(folder, name):
    """Makes folder/config.json and model.safetensors; returns the values."""
    config, tensors, values = MODELS[name]()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for key, (dtype, shape, raw) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t[2] for t in tensors.values()))
    return values


if __name__ == "__main__":
    for each in MODELS:
        write(pathlib.Path(sys.argv[1]) / each, each)
