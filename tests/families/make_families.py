"""Makes a tiny checkpoint of each model family and format: random weights, every tensor that a real one has of what moe4 looks at, and an
input. Deterministic. Usage: make_families.py FOLDER [NAME...]

A checkpoint is described by one entry of MODELS, which reference.py reads too: names of tensors and keys of config.json as the families
publish them, written down here a second time and not taken from src/families.c.
"""
import json
import pathlib
import struct
import sys

import numpy as np

HIDDEN, INTER, EXPERTS, TOP_K, VOCAB, TOKENS = 64, 32, 8, 3, 51, 24

NUMPY = {"F32": np.float32, "BF16": np.uint16, "U8": np.uint8, "I8": np.int8, "I32": np.int32, "I64": np.int64, "F8_E4M3": np.uint8,
         "F8_E8M0": np.uint8}

COMMON = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MOE = {"moe_intermediate_size": INTER, "num_experts_per_tok": TOP_K}
MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 4,
            "topk_group": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 1, "intermediate_size": 48,
            "hidden_act": "silu"}
LLAMA_ATTENTION = {"self_attn.q_proj": (64, HIDDEN), "self_attn.k_proj": (32, HIDDEN), "self_attn.v_proj": (32, HIDDEN),
                   "self_attn.o_proj": (HIDDEN, 64)}
MLA_ATTENTION = {"self_attn.q_a_proj": (24, HIDDEN), "self_attn.q_b_proj": (64, 24), "self_attn.kv_a_proj_with_mqa": (24, HIDDEN),
                 "self_attn.kv_b_proj": (96, 16), "self_attn.o_proj": (HIDDEN, 64)}
MLA_NORMS = {"self_attn.q_a_layernorm": 24, "self_attn.kv_a_layernorm": 16}
LLAMA_NORMS = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
LLAMA = {"root": "model.", "head": "lm_head", "embed": "embed_tokens", "norm": "norm", "norms": LLAMA_NORMS, "attention": LLAMA_ATTENTION,
         "mlp": "mlp.", "experts": "mlp.experts.", "shared": "mlp.shared_experts.", "router": "mlp.gate",
         "bias": "mlp.gate.e_score_correction_bias", "proj": ("gate_proj", "up_proj", "down_proj"), "activation": "swiglu", "limit": 0,
         "inter": INTER, "shared_inter": INTER, "dense_inter": 48, "hash_layers": 0}
QWEN = LLAMA | {"kinds": "de", "scores": "softmax", "shared": None, "bias": None,
                "norms": LLAMA_NORMS | {"self_attn.q_norm": 16, "self_attn.k_norm": 16},
                "config": COMMON | MOE | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2,
                                          "num_experts": EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [0],
                                          "intermediate_size": 48, "hidden_act": "silu"}}
DEEPSEEK_V3 = LLAMA | {"kinds": "de", "scores": "sigmoid", "attention": MLA_ATTENTION, "norms": LLAMA_NORMS | MLA_NORMS,
                       "config": COMMON | MOE | MLA | DEEPSEEK | {"model_type": "deepseek_v3", "num_hidden_layers": 2,
                                                                  "architectures": ["DeepseekV3ForCausalLM"]}}
MIXTRAL = LLAMA | {"kinds": "ee", "scores": "softmax", "shared": None, "bias": None, "experts": "block_sparse_moe.experts.",
                   "router": "block_sparse_moe.gate", "proj": ("w1", "w3", "w2"), "norms": LLAMA_NORMS,
                   "config": COMMON | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_hidden_layers": 2,
                                       "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "intermediate_size": INTER,
                                       "hidden_act": "silu"}}
DEEPSEEK_V4 = {"root": "", "head": "head", "embed": "embed", "norm": "norm", "norms": {"attn_norm": HIDDEN, "ffn_norm": HIDDEN,
               "attn.q_norm": 24, "attn.kv_norm": 16},
               "attention": {"attn.wq_a": (24, HIDDEN), "attn.wq_b": (64, 24), "attn.wkv": (16, HIDDEN), "attn.wo_a": (32, 32),
                             "attn.wo_b": (HIDDEN, 32)},
               "experts": "ffn.experts.", "shared": "ffn.shared_experts.", "router": "ffn.gate", "bias": "ffn.gate.bias",
               "table": "ffn.gate.tid2eid", "proj": ("w1", "w3", "w2"), "activation": "swiglu", "limit": 1.5, "inter": INTER,
               "shared_inter": INTER, "kinds": "eee", "scores": "sqrtsoftplus", "hash_layers": 2, "extra": "mtp",
               "config": COMMON | MOE | {"model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"], "num_hidden_layers": 3,
                                         "num_key_value_heads": 1, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
                                         "norm_topk_prob": True, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus",
                                         "topk_method": "noaux_tc", "num_hash_layers": 2, "swiglu_limit": 1.5, "q_lora_rank": 24,
                                         "hidden_act": "silu", "num_nextn_predict_layers": 1,
                                         "quantization_config": {"quant_method": "fp8", "moe_quant_algo": "NVFP4"}}}
NEMOTRON = {"root": "backbone.", "head": "lm_head", "embed": "embeddings", "norm": "norm_f", "norms": {"norm": HIDDEN}, "attention": {},
            "mlp": "mixer.", "experts": "mixer.experts.", "shared": "mixer.shared_experts.", "router": "mixer.gate",
            "bias": "mixer.gate.e_score_correction_bias", "proj": (None, "up_proj", "down_proj"), "activation": "relu2", "limit": 0,
            "inter": INTER, "shared_inter": 48, "dense_inter": 80, "kinds": "oeode", "scores": "sigmoid", "hash_layers": 0,
            "config": COMMON | MOE | {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "num_hidden_layers": 5,
                                      "hybrid_override_pattern": "ME*-E", "n_routed_experts": EXPERTS, "n_shared_experts": 1,
                                      "moe_shared_expert_intermediate_size": 48, "intermediate_size": 80, "norm_topk_prob": True,
                                      "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "mlp_hidden_act": "relu2",
                                      "moe_latent_size": None}}
NESTED = {"root": "language_model.model.", "head": "language_model.lm_head", "nested": True}

# format: of the experts and dense layers. shared_format, attention_format: where they differ ("bf16" for attention).
MODELS = {
    "qwen3_moe": QWEN | {"format": "modelopt"},
    "qwen3_moe-compressed": QWEN | {"format": "compressed-tensors"},
    "deepseek_v3": DEEPSEEK_V3 | {"format": "modelopt"},
    "deepseek_v3-fp8": DEEPSEEK_V3 | {"format": "modelopt", "shared_format": "fp8-inv", "attention_format": "fp8-inv"},
    "kimi_k2-nested": DEEPSEEK_V3 | NESTED | {"format": "compressed-tensors", "config": DEEPSEEK_V3["config"] | {"model_type": "kimi_k2"}},
    "glm4_moe-nested": DEEPSEEK_V3 | {"format": "modelopt", "root": "model.language_model.", "nested": True, "attention": LLAMA_ATTENTION,
                                      "norms": LLAMA_NORMS, "config": COMMON | MOE | DEEPSEEK | {"model_type": "glm4_moe",
                                                                                                "num_hidden_layers": 2}},
    "mixtral": MIXTRAL | {"format": "modelopt"},
    "mixtral-nested": MIXTRAL | NESTED | {"format": "compressed-tensors"},
    "deepseek_v4": DEEPSEEK_V4 | {"format": "modelopt"},
    "deepseek_v4-fp8": DEEPSEEK_V4 | {"format": "modelopt", "shared_format": "fp8-scale", "attention_format": "fp8-scale"},
    "deepseek_v4-mxfp4": DEEPSEEK_V4 | {"format": "mxfp4", "shared_format": "fp8-scale", "attention_format": "fp8-scale"},
    "nemotron_h": NEMOTRON | {"format": "modelopt"},
    "nemotron_h-bf16": NEMOTRON | {"format": "bf16"},
}


class Maker:
    def __init__(self, name):
        self.spec = MODELS[name]
        self.random = np.random.Generator(np.random.PCG64(sum(name.encode())))
        self.tensors = {}

    def add(self, name, dtype, values):
        self.tensors[name] = (dtype, np.asarray(values, NUMPY[dtype]))

    def bf16(self, name, shape, scale):
        bits = (scale * self.random.standard_normal(shape)).astype(np.float32).view(np.uint32) >> 16
        self.add(name, "BF16", bits.astype(np.uint16))

    def fp8(self, shape):
        """Bytes of E4M3, neither NaN nor huge."""
        return self.random.integers(0, 64, shape) + 128 * self.random.integers(0, 2, shape)

    def one(self, name, low, high):
        self.add(name, "F32", [np.exp(self.random.uniform(np.log(low), np.log(high)))])

    def module(self, name, rows, cols, form, input_scale):
        if form == "bf16":
            self.bf16(f"{name}.weight", (rows, cols), 0.15)
        elif form in ("modelopt", "compressed-tensors"):
            packed = form == "compressed-tensors"
            self.add(f"{name}.weight_packed" if packed else f"{name}.weight", "U8", self.random.integers(0, 256, (rows, cols // 2)))
            self.add(f"{name}.weight_scale", "F8_E4M3", self.random.integers(0x30, 0x48, (rows, cols // 16)))
            if packed:  # divisors
                self.one(f"{name}.weight_global_scale", 12, 25)
                self.one(f"{name}.input_global_scale", 0.7 / input_scale, 1.4 / input_scale)
            else:
                self.one(f"{name}.weight_scale_2", 0.04, 0.08)
                self.one(f"{name}.input_scale", 0.7 * input_scale, 1.4 * input_scale)
        elif form == "mxfp4":
            self.add(f"{name}.weight", "I8", self.random.integers(-128, 128, (rows, cols // 2)))
            self.add(f"{name}.scale", "F8_E8M0", self.random.integers(118, 124, (rows, cols // 32)))
        else:
            self.add(f"{name}.weight", "F8_E4M3", self.fp8((rows, cols)))
            scale = self.random.uniform(0.01, 0.02, (-(-rows // 128), -(-cols // 128)))
            self.add(f"{name}.weight_scale_inv" if form == "fp8-inv" else f"{name}.scale", "F32", scale)

    def mlp(self, prefix, inter, form):
        gate, up, down = self.spec["proj"]
        for proj in filter(None, (gate, up)):
            self.module(prefix + proj, inter, HIDDEN, form, 3 / 2688)
        self.module(prefix + down, HIDDEN, inter, form, 6 / 2688)

    def table(self, name):
        self.add(name + "-odd", "U8", [0])  # what follows lies at an odd place
        rows = [self.random.permutation(EXPERTS)[:TOP_K] for _ in range(VOCAB)]
        self.add(name, "I64", rows)

    def layer(self, number, kind):
        s = self.spec
        prefix = f"{s['root']}layers.{number}."
        for norm, size in s["norms"].items():
            self.bf16(f"{prefix}{norm}.weight", size, 1)
        for proj, (rows, cols) in s["attention"].items():
            self.module(prefix + proj, rows, cols, s.get("attention_format", "bf16"), 0)
        if kind == "d":
            self.mlp(prefix + s["mlp"], s["dense_inter"], s["format"])
        if kind != "e":
            return
        self.bf16(f"{prefix}{s['router']}.weight", (EXPERTS, HIDDEN), 0.2)
        if number < s["hash_layers"]:
            self.table(prefix + s["table"])
        elif s["bias"]:
            self.add(prefix + s["bias"], "F32", 0.2 * self.random.standard_normal(EXPERTS))
        for e in range(EXPERTS):
            self.mlp(f"{prefix}{s['experts']}{e}.", s["inter"], s["format"])
        if s["shared"]:
            self.mlp(prefix + s["shared"], s["shared_inter"], s.get("shared_format", s["format"]))

    def model(self):
        s = self.spec
        self.bf16(f"{s['root']}{s['embed']}.weight", (VOCAB, HIDDEN), 1)
        self.bf16(f"{s['root']}{s['norm']}.weight", HIDDEN, 1)
        self.bf16(f"{s['head']}.weight", (VOCAB, HIDDEN), 1)
        for number, kind in enumerate(s["kinds"]):
            self.layer(number, kind)
        if "extra" in s:  # a layer that predicts a second token: MXFP4, whatever the others are
            self.module("mtp.0.ffn.experts.0.w1", INTER, HIDDEN, "mxfp4", 0)
            self.module("mtp.0.attn.wq_a", 24, HIDDEN, "fp8-scale", 0)
        if s.get("nested"):
            self.bf16("vision_tower.blocks.0.weight", (8, 8), 1)
        return self.tensors


def write(path, tensors):
    header, at = {}, 0
    for name, (dtype, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(v.tobytes() for _, v in tensors.values()))


def make(folder, name):
    """folder/config.json, model.safetensors, and input.safetensors beside the folder: x F32 [T,H], token_ids I64 [T]."""
    spec = MODELS[name]
    folder.mkdir(parents=True)
    config = spec["config"]
    if spec.get("nested"):
        config = {"model_type": "some_vl", "architectures": ["SomeForConditionalGeneration"], "text_config": config, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    write(folder / "model.safetensors", {n: t for n, t in Maker(name).model().items()})
    random = np.random.Generator(np.random.PCG64(7))
    x = random.standard_normal((TOKENS, HIDDEN)) * np.exp(random.standard_normal((TOKENS, 1)) / 2)
    write(folder.with_suffix(".input.safetensors"), {"x": ("F32", x.astype(np.float32)),
                                                     "token_ids": ("I64", random.integers(0, VOCAB, TOKENS))})


if __name__ == "__main__":
    for each in sys.argv[2:] or MODELS:
        make(pathlib.Path(sys.argv[1]) / each, each)
