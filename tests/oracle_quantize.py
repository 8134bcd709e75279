"""What moe4 quantize writes, read by those it is written for: compressed-tensors, ModelOpt and transformers decode the weights that moe4
decodes. Needs torch, safetensors, transformers, compressed-tensors and nvidia-modelopt; a test without its package is skipped by name.
"""
import importlib
import json
import pathlib
import shutil
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "cli"))


def package(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


torch, safetensors, transformers = package("torch"), package("safetensors.torch"), package("transformers")
compressed_tensors, modelopt = package("compressed_tensors"), package("modelopt.torch.quantization.qtensor")
if not torch or not safetensors:
    print("skipped, needs torch and safetensors")
    sys.exit(77)

from cli_case import MODEL, CliCase  # noqa: E402

TINY = pathlib.Path(__file__).parent / "vectors" / "hf-qwen3-moe"


def load(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in safetensors.load_file(f).items()}


def needs(*packages):
    missing = [name for name, found in packages if not found]
    return unittest.skipIf(missing, f"needs {', '.join(missing)}")


TRANSFORMERS, COMPRESSED_TENSORS = ("transformers", transformers), ("compressed-tensors", compressed_tensors)


class Oracle(CliCase):
    def quantize(self, model, name, *args):
        self.moe4("quantize", model, self.folder / name, *args)
        return self.folder / name

    def compare(self, quantized, decoded, most):
        """moe4's own values of a quantized folder against `decoded` {module: tensor}: no matrix is further than `most` from it."""
        wide = self.folder / "wide"
        shutil.rmtree(wide, ignore_errors=True)
        wide.mkdir()
        config = json.loads((quantized / "config.json").read_text())
        del config["quantization_config"]
        (wide / "config.json").write_text(json.dumps(config))
        tensors = {f"{module}.weight": t.contiguous() for module, t in decoded.items()}
        safetensors.save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
        said = self.json("compare", quantized, wide)
        self.assertEqual({m["name"] for m in said["matrices"]}, {*decoded})
        for m in said["matrices"]:
            self.assertLessEqual(m["relative_error"], most, m["name"])

    @needs(COMPRESSED_TENSORS)
    def test_compressed_tensors_decodes(self):
        """Each matrix alone, by the scheme that config.json states: in fp32 to its last bits, and as the package does it, in bf16."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        for args in ([], ["--search"]):
            out = self.quantize(TINY, f"ct{len(args)}", "--recipe", "compressed_tensors", *args)
            said = json.loads((out / "config.json").read_text())["quantization_config"]
            config = QuantizationConfig.model_validate({k: v for k, v in said.items() if k != "quant_method"})
            scheme, compressor = config.config_groups["group_0"], BaseCompressor.get_value_from_registry(config.format)
            self.assertTrue(compressor.can_compress(torch.nn.Linear, scheme))
            made, in_fp32, in_bf16 = load(out), {}, {}
            for module in (k.removesuffix(".weight_packed") for k in made if k.endswith(".weight_packed")):
                names = compressor.compression_param_names(scheme)
                state = {name: made[f"{module}.{name}"] for name in names}
                in_bf16[module] = compressor.decompress(state, scheme)["weight"]
                self.assertEqual(in_bf16[module].dtype, torch.bfloat16)
                rows, packed = state["weight_packed"].shape
                codes = unpack_fp4_from_uint8(state["weight_packed"], rows, 2 * packed).float()
                in_fp32[module] = dequantize(codes, state["weight_scale"].float(), args=scheme.weights, dtype=torch.float32,
                                             global_scale=state["weight_global_scale"])  # fmt: skip
            self.assertEqual(len(in_bf16), 56)
            self.compare(out, in_fp32, 2.0**-22)
            self.compare(out, in_bf16, 2.0**-8)

    @needs(TRANSFORMERS, COMPRESSED_TENSORS)
    def test_transformers_loads_compressed_tensors(self):
        """A whole dense model through from_pretrained, decompressed by it."""
        torch.manual_seed(3)
        config = transformers.Qwen3Config(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                          num_key_value_heads=2, head_dim=16, max_position_embeddings=64)  # fmt: skip
        transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(self.folder / "dense")
        out = self.quantize(self.folder / "dense", "dense-ct", "--recipe", "compressed_tensors")
        quantization = transformers.CompressedTensorsConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, quantization_config=quantization)
        weights = {k.removesuffix(".weight"): v for k, v in model.state_dict().items() if k.endswith("_proj.weight")}
        self.assertEqual(len(weights), 14)
        others = {k: v for k, v in load(out).items() if k.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight"))}
        for name, tensor in others.items():
            self.assertTrue(torch.equal(model.state_dict()[name], tensor), name)
        self.compare(out, weights | {k.removesuffix(".weight"): v for k, v in others.items() if v.ndim == 2}, 2.0**-8)
        self.assertTrue(model(torch.arange(8)[None]).logits.isfinite().all())

    @needs(("nvidia-modelopt", modelopt))
    def test_modelopt_decodes(self):
        for args in ([], ["--four-over-six"], ["--recipe", "modelopt_static"]):
            out = self.quantize(TINY, f"mo{'-'.join(args)}", *args)
            made = load(out)
            decoded = {}
            for module in (k.removesuffix(".weight_scale_2") for k in made if k.endswith(".weight_scale_2")):
                codes = made[f"{module}.weight"]
                tensor = modelopt.NVFP4QTensor(torch.Size((codes.shape[0], 2 * codes.shape[1])), torch.float32, codes)
                decoded[module] = tensor.dequantize(dtype=torch.float32, scale=made[f"{module}.weight_scale"],
                                                    double_scale=made[f"{module}.weight_scale_2"], block_sizes={-1: 16})  # fmt: skip
            self.assertEqual(len(decoded), 56)
            self.compare(out, decoded, 2.0**-22)
            self.moe4("verify", out)

    @needs(TRANSFORMERS)
    def test_transformers_reads_modelopt(self):
        """The config, the index and every shard, as from_pretrained takes them; the layers themselves transformers does not have."""
        from transformers.modeling_utils import load_state_dict
        from transformers.utils.hub import get_checkpoint_shard_files

        out = self.quantize(TINY, "mo", "--max-shard-size", "30K")
        config = transformers.AutoConfig.from_pretrained(out)
        self.assertEqual((config.model_type, config.quantization_config["quant_algo"]), ("qwen3_moe", "NVFP4"))
        files, index = get_checkpoint_shard_files(str(out), str(out / "model.safetensors.index.json"))
        self.assertGreater(len(files), 1)
        read = {k: v for f in files for k, v in load_state_dict(f, map_location="cpu").items()}  # asks for the metadata's format
        self.assertEqual({*read}, {*index["all_checkpoint_keys"]})
        for name, tensor in load(out).items():
            self.assertTrue(torch.equal(read[name].view(torch.uint8) if tensor.ndim else read[name],
                                        tensor.view(torch.uint8) if tensor.ndim else tensor), name)  # fmt: skip
        self.moe4("verify", out)

    def test_safe_open(self):
        """The bundled model's layout, tensor by tensor."""
        out = self.quantize(TINY, "mo", "--calibrate", f"{TINY}-logits.safetensors")
        bundled = {k.split(".")[-1]: t for k, t in load(MODEL).items() if ".mlp.experts.3.up_proj." in k and ".layers.1." in k}
        with safetensors.safe_open(out / "model.safetensors", "pt") as file:
            self.assertEqual((file.metadata()["format"], file.metadata()["recipe"]), ("pt", "modelopt"))
            ours = {k.split(".")[-1]: file.get_tensor(k) for k in file.keys() if "layers.1.mlp.experts.3.up_proj" in k}
        self.assertEqual({k: (t.dtype, t.ndim) for k, t in ours.items()}, {k: (t.dtype, t.ndim) for k, t in bundled.items()})


if __name__ == "__main__":
    unittest.main(verbosity=2)
