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
# The names of DeepSeek-V3.2 and GLM-5: latent attention, and an indexer that chooses what to attend to.
INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
SPARSE = DEEPSEEK_V3 | {"attention": MLA_ATTENTION | {"self_attn.indexer.wq_b": (32, 24), "self_attn.indexer.wk": (16, HIDDEN),
                                                      "self_attn.indexer.weights_proj": (2, HIDDEN)},
                        "norms": LLAMA_NORMS | MLA_NORMS | {"self_attn.indexer.k_norm": 16},
                        "plain": {"self_attn.indexer.k_norm.bias": (16,)}}
DEEPSEEK_V32 = SPARSE | {"config": DEEPSEEK_V3["config"] | INDEX | {"model_type": "deepseek_v32",
                                                                    "architectures": ["DeepseekV32ForCausalLM"]}}
GLM5 = SPARSE | {"config": DEEPSEEK_V3["config"] | INDEX | {"model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"],
                                                            "n_group": 1, "topk_group": 1, "indexer_types": ["full", "full"]}}
# DeepSeek-V4: hc_mult streams of x, groups of output projections; compressors and indexers by layer.
HC, V4_GROUPS = 4, 2
HYPER = {f"hc_{at}_{name}": shape for at in ("attn", "ffn")
         for name, shape in (("fn", (24, HC * HIDDEN)), ("base", (24,)), ("scale", (3,)))}
DEEPSEEK_V4 = {"root": "", "head": "head", "embed": "embed", "norm": "norm", "norms": {"attn_norm": HIDDEN, "ffn_norm": HIDDEN,
               "attn.q_norm": 24, "attn.kv_norm": 16},
               "attention": {"attn.wq_a": (24, HIDDEN), "attn.wq_b": (64, 24), "attn.wkv": (16, HIDDEN), "attn.wo_a": (48, 32),
                             "attn.wo_b": (HIDDEN, 48)},
               "plain": HYPER | {"attn.attn_sink": (4,)},
               "model_plain": {"hc_head_fn": (HC, HC * HIDDEN), "hc_head_base": (HC,), "hc_head_scale": (1,)},
               "some_layers": {  # a compressor of 128 tokens; one of 4 that overlap, and its indexer
                   1: ({"attn.compressor.wkv": (16, HIDDEN), "attn.compressor.wgate": (16, HIDDEN)},
                       {"attn.compressor.ape": (128, 16), "attn.compressor.norm.weight": (16,)}),
                   2: ({"attn.compressor.wkv": (32, HIDDEN), "attn.compressor.wgate": (32, HIDDEN), "attn.indexer.wq_b": (16, 24),
                        "attn.indexer.weights_proj": (2, HIDDEN), "attn.indexer.compressor.wkv": (16, HIDDEN),
                        "attn.indexer.compressor.wgate": (16, HIDDEN)},
                       {"attn.compressor.ape": (4, 32), "attn.compressor.norm.weight": (16,), "attn.indexer.compressor.ape": (4, 16),
                        "attn.indexer.compressor.norm.weight": (8,)})},
               "experts": "ffn.experts.", "shared": "ffn.shared_experts.", "router": "ffn.gate", "bias": "ffn.gate.bias",
               "table": "ffn.gate.tid2eid", "proj": ("w1", "w3", "w2"), "activation": "swiglu", "limit": 1.5, "inter": INTER,
               "shared_inter": INTER, "kinds": "eee", "scores": "sqrtsoftplus", "hash_layers": 2, "extra": "mtp",
               "config": COMMON | MOE | {"model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"], "num_hidden_layers": 3,
                                         "num_key_value_heads": 1, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
                                         "norm_topk_prob": True, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus",
                                         "topk_method": "noaux_tc", "num_hash_layers": 2, "swiglu_limit": 1.5, "q_lora_rank": 24,
                                         "o_groups": V4_GROUPS, "o_lora_rank": 24, "hc_mult": HC, "index_n_heads": 2, "index_head_dim": 8,
                                         "compress_ratios": [0, 128, 4, 0], "hidden_act": "silu", "num_nextn_predict_layers": 1,
                                         "quantization_config": {"quant_method": "fp8", "moe_quant_algo": "NVFP4"}}}
# V4.1: layers read other layers' compressed keys and indices, two have a table of n-grams; a second router bias for image tokens.
DEEPSEEK_V41 = DEEPSEEK_V4 | {
    "model_plain": {}, "hash_layers": 0, "alt_bias": "ffn.gate.bias_vl", "nested": True,
    "some_layers": {
        1: ({"attn.compressor.wkv": (16, HIDDEN), "attn.compressor.wgate": (16, HIDDEN), "attn.indexer.wk": (8, 16),
             "attn.indexer.wq_b": (16, 24), "attn.indexer.weights_proj": (2, HIDDEN), "engram.embed": (300, 16),
             "engram.wkv": (5 * HIDDEN, 96)},
            {"attn.compressor.norm.weight": (16,), "attn.indexer.k_norm.weight": (8,), "engram.k_weight": (HC, HIDDEN),
             "engram.q_weight": (HC, HIDDEN)}),
        2: ({"attn.compressor.wkv": (16, HIDDEN), "attn.indexer.wk": (8, 16)},
            {"attn.compressor.norm.weight": (16,), "attn.indexer.k_norm.weight": (8,)})},
    "config": {k: v for k, v in DEEPSEEK_V4["config"].items() if k not in ("num_hash_layers", "compress_ratios")} |
              {"model_type": "deepseek_v41_text", "compress_ratios": [0, 2, 1, 0], "kv_source_layer_ids": [1, 2],
               "index_source_layer_ids": [1], "engram_layer_ids": [1]}}
NEMOTRON = {"root": "backbone.", "head": "lm_head", "embed": "embeddings", "norm": "norm_f", "norms": {"norm": HIDDEN}, "attention": {},
            "some_layers": {
                0: ({"mixer.in_proj": (48 + 80 + 6, HIDDEN), "mixer.out_proj": (HIDDEN, 48)},
                    {"mixer.conv1d.weight": (80, 1, 4), "mixer.conv1d.bias": (80,), "mixer.A_log": (6,), "mixer.D": (6,),
                     "mixer.dt_bias": (6,), "mixer.norm.weight": (48,)}),
                2: ({"mixer.q_proj": (64, HIDDEN), "mixer.k_proj": (32, HIDDEN), "mixer.v_proj": (32, HIDDEN),
                     "mixer.o_proj": (HIDDEN, 64)}, {})},
            "mlp": "mixer.", "experts": "mixer.experts.", "shared": "mixer.shared_experts.", "router": "mixer.gate",
            "bias": "mixer.gate.e_score_correction_bias", "proj": (None, "up_proj", "down_proj"), "activation": "relu2", "limit": 0,
            "inter": INTER, "shared_inter": 48, "dense_inter": 80, "kinds": "oeode", "scores": "sigmoid", "hash_layers": 0,
            "config": COMMON | MOE | {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "num_hidden_layers": 5,
                                      "hybrid_override_pattern": "ME*-E", "n_routed_experts": EXPERTS, "n_shared_experts": 1,
                                      "moe_shared_expert_intermediate_size": 48, "intermediate_size": 80, "norm_topk_prob": True,
                                      "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "mlp_hidden_act": "relu2",
                                      "moe_latent_size": None, "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2,
                                      "ssm_state_size": 8, "conv_kernel": 4, "use_conv_bias": True}}
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
    "deepseek_v32": DEEPSEEK_V32 | {"format": "modelopt", "shared_format": "fp8-inv", "attention_format": "fp8-inv"},
    "glm_moe_dsa": GLM5 | {"format": "modelopt"},
    "deepseek_v4": DEEPSEEK_V4 | {"format": "modelopt"},
    "deepseek_v41": DEEPSEEK_V41 | {"format": "modelopt", "shared_format": "fp8-32", "attention_format": "fp8-32"},
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
        elif form in ("fp8-scale", "fp8-32"):
            block = 32 if form == "fp8-32" else 128
            self.add(f"{name}.weight", "F8_E4M3", self.fp8((rows, cols)))
            self.add(f"{name}.scale", "F8_E8M0", self.random.integers(119, 122, (-(-rows // block), -(-cols // block))))
        else:
            self.add(f"{name}.weight", "F8_E4M3", self.fp8((rows, cols)))
            scale = self.random.uniform(0.01, 0.02, (-(-rows // 128), -(-cols // 128)))
            self.add(f"{name}.weight_scale_inv", "F32", scale)

    def plain(self, prefix, shapes):
        for name, shape in shapes.items():
            self.add(prefix + name, "F32", 0.1 * self.random.standard_normal(shape))

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
        modules, plain = s.get("some_layers", {}).get(number, ({}, {}))
        for proj, (rows, cols) in (s["attention"] | modules).items():
            self.module(prefix + proj, rows, cols, s.get("attention_format", "bf16"), 0)
        self.plain(prefix, s.get("plain", {}) | plain)
        if kind == "d":
            self.mlp(prefix + s["mlp"], s["dense_inter"], s["format"])
        if kind != "e":
            return
        self.bf16(f"{prefix}{s['router']}.weight", (EXPERTS, HIDDEN), 0.2)
        if number < s["hash_layers"]:
            self.table(prefix + s["table"])
        elif s["bias"]:
            self.add(prefix + s["bias"], "F32", 0.2 * self.random.standard_normal(EXPERTS))
        if s.get("alt_bias"):
            self.add(prefix + s["alt_bias"], "F32", 0.5 * self.random.standard_normal(EXPERTS))
        for e in range(EXPERTS):
            self.mlp(f"{prefix}{s['experts']}{e}.", s["inter"], s["format"])
        if s["shared"]:
            self.mlp(prefix + s["shared"], s["shared_inter"], s.get("shared_format", s["format"]))

    def model(self):
        s = self.spec
        self.bf16(f"{s['root']}{s['embed']}.weight", (VOCAB, HIDDEN), 1)
        self.bf16(f"{s['root']}{s['norm']}.weight", HIDDEN, 1)
        self.bf16(f"{s['head']}.weight", (VOCAB, HIDDEN), 1)
        self.plain(s["root"], s.get("model_plain", {}))
        for number, kind in enumerate(s["kinds"]):
            self.layer(number, kind)
        if "extra" in s:  # a layer that predicts a second token: MXFP4, whatever the others are
            self.module("mtp.0.ffn.experts.0.w1", INTER, HIDDEN, "mxfp4", 0)
            self.module("mtp.0.attn.wq_a", 24, HIDDEN, "fp8-scale", 0)
            self.bf16("mtp.0.norm.weight", HIDDEN, 1)
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
