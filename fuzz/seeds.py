#!/usr/bin/env python3
"""Writes the first inputs of each corpus: small well-formed files from which a fuzzer starts. Python's standard library only."""
import json
import pathlib
import struct

CORPUS = pathlib.Path(__file__).resolve().parent / "corpus"
BYTES = {"F32": 4, "BF16": 2, "U8": 1, "F8_E4M3": 1}
ONE = struct.pack("<f", 1.0)


def safetensors(tensors, metadata=None):
    """tensors: {name: (dtype, shape, data or None for zeros)}"""
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for name, (dtype, shape, raw) in tensors.items():
        n = BYTES[dtype]
        for d in shape:
            n *= d
        raw = bytes(n) if raw is None else raw
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + n]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def nvfp4(module, rows, cols):
    return {
        f"{module}.weight": ("U8", [rows, cols // 2], None),
        f"{module}.weight_scale": ("F8_E4M3", [rows, cols // 16], b"\x38" * (rows * cols // 16)),
        f"{module}.weight_scale_2": ("F32", [], ONE),
        f"{module}.input_scale": ("F32", [1], ONE),
    }


def folder(config, index, a, b=b""):
    config = json.dumps(config).encode() if config else b""
    index = json.dumps(index).encode() if index else b""
    return struct.pack("<3H", len(config), len(index), len(a)) + config + index + a + b


def glm(quantized):
    config = {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "hidden_size": 16, "vocab_size": 2, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "n_routed_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "use_qk_norm": True,
    }  # fmt: skip
    tensors = {"model.layers.1.mlp.gate.weight": ("BF16", [2, 16], None),
               "model.layers.1.mlp.gate.e_score_correction_bias": ("F32", [2], None)}  # fmt: skip
    for proj in ("gate_proj", "up_proj", "down_proj"):
        for module in ("0.mlp", "1.mlp.experts.0", "1.mlp.experts.1", "1.mlp.shared_experts"):
            name = f"model.layers.{module}.{proj}"
            tensors.update(nvfp4(name, 16, 16) if quantized else {f"{name}.weight": ("BF16", [16, 16], None)})
    return config, tensors


def main():
    files = {
        "safetensors/empty": safetensors({}),
        "safetensors/few": safetensors({"a": ("U8", [2, 3], None), "b": ("F32", [], None), "c": ("BF16", [0, 4], None)}, {"format": "pt"}),
        "safetensors/nvfp4": safetensors(nvfp4("m", 2, 32)),
        "checkpoint/nvfp4": folder(glm(True)[0], None, safetensors(glm(True)[1])),
        "checkpoint/bf16": folder(glm(False)[0], None, safetensors(glm(False)[1])),
    }
    a, b = {"a.weight": ("BF16", [1, 2], None)}, nvfp4("b", 1, 16)
    index = {"weight_map": {**{n: "a.safetensors" for n in a}, **{n: "b.safetensors" for n in b}}}
    files["checkpoint/index"] = folder(None, index, safetensors(a), safetensors(b))
    qwen = {
        "model_type": "qwen3_moe", "hidden_size": 16, "vocab_size": 2, "num_hidden_layers": 3, "num_experts": 2, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "norm_topk_prob": False, "mlp_only_layers": [1], "decoder_sparse_step": 1, "intermediate_size": 16,
    }  # fmt: skip
    files["checkpoint/qwen"] = folder(qwen, index, safetensors(a), safetensors(b))
    fused = {"model.layers.0.mlp.experts.gate_up_proj": ("BF16", [2, 2, 2], None), "x.weight_packed": ("U8", [1, 8], None),
             "x.weight_scale": ("F8_E4M3", [1, 1], None), "x.weight_global_scale": ("F32", [1], ONE),
             "y.weight": ("F8_E4M3", [1, 1], None), "y.weight_scale_inv": ("F32", [1, 1], ONE)}  # fmt: skip
    files["checkpoint/others"] = folder({**qwen, "model_type": "deepseek_v3"}, None, safetensors(fused))
    files["config/all-defaults"] = bytes(64)
    for i in range(8):
        files[f"config/family-{i}"] = bytes([i % 2, i]) + bytes(62)
    deepseek = glm(True)[0] | {"model_type": "deepseek_v3", "q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 2,
                               "qk_rope_head_dim": 2, "v_head_dim": 2}  # fmt: skip
    for name, config in {"glm": glm(True)[0], "qwen": qwen, "deepseek": deepseek, "nested": {"text_config": qwen}}.items():
        files[f"config/{name}"] = json.dumps(config).encode()
    files["cache/whole"] = struct.pack("<L", 2**32 - 1)
    files["cache/cut"] = struct.pack("<L", 4096)
    for i, at in enumerate((0, 8, 12, 16, 24, 40, 56, 88, 4095, 4096, 5000)):
        files[f"cache/changed-{i}"] = struct.pack("<L", 2**32 - 1) + at.to_bytes(3, "little") + b"\x01"
    for name, data in files.items():
        path = CORPUS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
