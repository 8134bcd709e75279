"""Makes hf-*: tiny models with random weights, and the logits that Hugging Face transformers computes from them.

Weights are bf16, arithmetic is fp32, attention is transformers' eager one. The files in the tree were made with torch 2.15.0 and
transformers 5.23.0 on a CPU; neither is needed to run the tests. Usage: make_hf_vectors.py [FOLDER]
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

COMMON = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=512, num_experts_per_tok=3, attn_implementation="eager", experts_implementation="eager",
)
N_TOKENS = {"glm4-moe": 300}  # several blocks of keys
N_TOKENS_OTHERS = 80

MODELS = {
    # every option of the family that the bundled model leaves off
    "glm4-moe": (Glm4MoeForCausalLM, Glm4MoeConfig, dict(
        num_hidden_layers=3, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1,
        attention_bias=True, use_qk_norm=True, norm_topk_prob=True, routed_scaling_factor=1.5, rope_theta=1000000.0)),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, dict(
        num_hidden_layers=2, num_experts=8, norm_topk_prob=True, rope_theta=1000000.0)),
    # dense layers between, no renormalising, bias everywhere, one matrix for embedding and lm_head, an odd group of heads
    "qwen3-moe-mixed": (Qwen3MoeForCausalLM, Qwen3MoeConfig, dict(
        num_hidden_layers=3, num_experts=8, norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[1], attention_bias=True,
        tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=1)),
}


def randomize(model, seed):
    """Values large enough that every part matters; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in list(model.named_parameters()) + list(model.named_buffers()):
        if not p.is_floating_point() or "inv_freq" in name:
            continue
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.1 * noise
        elif p.dim() == 1:
            value = 0.2 * noise
        else:
            value = noise / p.shape[-1] ** 0.5
        p.data.copy_(value.to(torch.bfloat16).float())


def make(folder, name, model_class, config_class, options, seed):
    torch.manual_seed(seed)
    model = model_class(config_class(**{**COMMON, **options})).eval()
    randomize(model, seed)
    tokens = torch.randint(0, COMMON["vocab_size"], (N_TOKENS.get(name, N_TOKENS_OTHERS),), generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].float()
        logits64 = model.double()(tokens[None]).logits[0]
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, fp32 against fp64 "
          f"{((logits - logits64).norm() / logits64.norm()).item():.1e}")
    out = folder / f"hf-{name}"
    bias = {n: b.float().clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    model.to(torch.bfloat16)
    for buffer, b in bias.items():  # fp32 in published checkpoints
        model.get_buffer(buffer).data = b
    model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({"tokens": tokens.int(), "logits": logits.contiguous()}, folder / f"hf-{name}-logits.safetensors")


def main():
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
    for seed, (name, (model_class, config_class, options)) in enumerate(MODELS.items()):
        make(folder, name, model_class, config_class, options, seed)


if __name__ == "__main__":
    main()
