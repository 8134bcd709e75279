"""Every family and format in a tiny checkpoint (families/make_families.py): verify finds it complete, inspect names it, and every layer
runs in every mode as the fp64 reference computes it (families/reference.py). What moe4 does not run is refused by name."""
import json
import pathlib
import re
import sys
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "cli"), str(HERE / "families")]
import numpy as np  # noqa: E402
import make_families as families  # noqa: E402
import reference  # noqa: E402
from cli_case import BAD_DATA, BAD_USAGE, CliCase  # noqa: E402

MODES = {"w4a16": 1e-4, "static": 5e-4, "tensor": 5e-4, "token": 5e-4}
UNSUPPORTED = {"deepseek_v4-mxfp4": ["MXFP4 (scale)"]}


class FamilyCase(CliCase):
    def make(self, name):
        folder = self.folder / name
        families.make(folder, name)
        return folder

    def arguments(self, name, folder, layer):
        """Of moe4 run: the layer, its input, and the token ids where the layer wants them."""
        inputs = folder.with_suffix(".input.safetensors")
        ids = ["--token-ids", inputs] if layer < families.MODELS[name]["hash_layers"] else []
        return ["run", folder, "--layer", layer, "--input", inputs, "--output-dtype", "f32", *ids]

    def check_layer(self, name, folder, layer):
        wanted, spec = reference.Layer(name, folder, layer), families.MODELS[name]
        modes = MODES if spec["format"] != "bf16" else {"bf16": 1e-5}
        for mode, tolerance in modes.items():
            for shared in (False, True) if wanted.shared else (False,):
                with self.subTest(name=name, layer=layer, mode=mode, shared=shared):
                    check, out = self.folder / "wanted.safetensors", self.folder / "out.safetensors"
                    y = wanted.run(mode, shared)
                    self.assertGreater(np.abs(y).max(), 0.1)
                    self.write_f64(check, y)
                    more = ["--shared"] if shared else []
                    result = self.json(*self.arguments(name, folder, layer), "--act", mode, "--check", f"{check}:y", "--tol", tolerance,
                                       "--output", out, *more)  # fmt: skip
                    self.assertLess(result["check"]["relative_l2"], tolerance)
                    if result["kind"] == "moe":
                        routed = reference.read(out)
                        np.testing.assert_array_equal(routed["topk_idx"], wanted.ids)
                        np.testing.assert_allclose(routed["topk_weight"], wanted.weights, rtol=3e-6)

    @staticmethod
    def write_f64(path, y):
        header = json.dumps({"y": {"dtype": "F64", "shape": list(y.shape), "data_offsets": [0, y.nbytes]}}).encode()
        header += b" " * (-len(header) % 8)
        path.write_bytes(len(header).to_bytes(8, "little") + header + y.tobytes())

    def check_model(self, name):
        folder, spec = self.make(name), families.MODELS[name]
        bad = UNSUPPORTED.get(name, [])
        verified = self.problems(folder) if bad else self.json("verify", folder)
        self.assertEqual(sorted(p["problem"].split(" (and")[0] for p in verified["problems"]), [f"unsupported: {b}" for b in bad])
        for layer, kind in enumerate(spec["kinds"]):
            if kind == "o":
                self.error(*self.arguments(name, folder, layer), status=BAD_USAGE, says="no feed-forward part")
            elif spec["format"] != "mxfp4":
                self.check_layer(name, folder, layer)

    def problems(self, folder):
        return json.loads(self.moe4("verify", folder, "--json", status=BAD_DATA).stdout)

    def inspect(self, folder):
        return self.json("inspect", folder)


def test_of(name):
    return lambda self: self.check_model(name)


class Runs(FamilyCase):
    """One test for each model."""


for each in families.MODELS:
    setattr(Runs, "test_" + each.replace("-", "_"), test_of(each))


class Facts(FamilyCase):
    """What inspect says of them."""

    def test_deepseek_v4(self):
        said = self.inspect(self.make("deepseek_v4"))
        self.assertEqual((said["family"], said["router"], said["n_hash_layers"], said["swiglu_limit"], said["activation"]),
                         ("deepseek_v4", "sqrtsoftplus_bias", 2, 1.5, "swiglu"))  # fmt: skip

    def test_nemotron(self):
        said = self.inspect(self.make("nemotron_h"))
        self.assertEqual((said["activation"], said["n_other_layers"], said["n_dense_layers"]), ("relu2", 2, 1))
        self.assertEqual([layer["kind"] for layer in said["layers"]], ["other", "moe", "other", "dense", "moe"])
        self.assertEqual(said["layers"][1]["n_blocks"], (families.EXPERTS * families.INTER + 48) * 2 * families.HIDDEN // 16)

    def test_compressed(self):
        said = self.inspect(self.make("qwen3_moe-compressed"))
        self.assertEqual(said["quantization"], "compressed-tensors nvfp4-pack-quantized")
        kinds = {k["pattern"]: k for k in said["kinds"]}
        expert = kinds["model.layers.*.mlp.experts.*.gate_proj"]
        self.assertEqual((expert["format"], expert["shape"], expert["count"]), ("NVFP4", [families.INTER, families.HIDDEN], families.EXPERTS))

    def test_nested(self):
        said = self.inspect(self.make("kimi_k2-nested"))
        self.assertEqual((said["family"], said["architecture"]), ("kimi_k2", "SomeForConditionalGeneration"))


class Refused(FamilyCase):
    def test_mxfp4_experts(self):
        folder = self.make("deepseek_v4-mxfp4")
        words = ["unsupported: ", "layers.0.ffn.experts.0.w1: MXFP4 (scale)"]
        self.error(*self.arguments("deepseek_v4-mxfp4", folder, 0), status=BAD_DATA, says=words)
        shown = self.moe4("inspect", folder, status=BAD_DATA)
        self.assertIn("layers.*.ffn.experts.*.w1.weight", shown.stdout)
        self.assertIn(words[1], shown.stderr)

    def test_fused_families(self):
        for model_type, nested, says in (("llama4", False, "Llama-4"), ("llama4_text", True, "Llama-4"), ("gpt_oss", False, "gpt-oss")):
            folder = self.folder / f"{model_type}-{nested}"
            folder.mkdir()
            config = {"model_type": model_type}
            (folder / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
            name = "model.layers.0.mlp.experts.gate_up_proj"
            families.write(folder / "model.safetensors", {name: ("BF16", np.zeros((2, 4, 4), np.uint16))})
            families.write(folder / "x.safetensors", {"x": ("F32", np.zeros((1, 4), np.float32))})
            words = [f'unsupported: model_type "{model_type}": {says}', "3-D tensors of all experts"]
            self.error("run", folder, "--layer", 0, "--input", folder / "x.safetensors", status=BAD_DATA, says=words)
            self.assertIn(name.replace("0", "*"), self.moe4("inspect", folder, status=BAD_DATA).stdout)

    def test_expert_bias(self):
        folder = self.make("mixtral")
        tensors = families.Maker("mixtral").model()
        tensors["model.layers.0.block_sparse_moe.experts.5.w3.bias"] = ("BF16", np.zeros(families.INTER, np.uint16))
        families.write(folder / "model.safetensors", tensors)
        self.error(*self.arguments("mixtral", folder, 0), status=BAD_DATA, says=["unsupported: ", "experts.5.w3.bias"])

    def test_token_ids(self):
        folder = self.make("deepseek_v4")
        inputs = folder.with_suffix(".input.safetensors")
        run = ["run", folder, "--input", inputs, "--layer"]
        self.error(*run, 0, status=BAD_USAGE, says="layer 0 routes by token id: --token-ids")
        self.error(*run, 2, "--token-ids", inputs, status=BAD_USAGE, says="--token-ids: layer 2 routes without them")
        other = self.folder / "ids.safetensors"
        for ids, status, says in (([families.VOCAB] * families.TOKENS, BAD_USAGE, f"token 0: id {families.VOCAB}, the hash table has {families.VOCAB}"),
                                  ([-1] * families.TOKENS, BAD_DATA, "token 0: id -1"), ([2**31] * families.TOKENS, BAD_DATA, "token 0: id 2147483648"),
                                  ([0], BAD_DATA, "1 token ids, and the input 24 tokens")):  # fmt: skip
            families.write(other, {"token_ids": ("I64", np.array(ids, np.int64))})
            self.error(*run, 0, "--token-ids", other, status=status, says=says)

    def test_bad_tables(self):
        folder = self.make("deepseek_v4")
        name = "layers.1.ffn.gate.tid2eid"
        for value, says in ((families.EXPERTS, f"token id 3 has expert {families.EXPERTS} of"), (-1, "token id 3 has expert -1 of"),
                            (None, "twice")):  # fmt: skip
            tensors = families.Maker("deepseek_v4").model()
            table = tensors[name][1].copy()
            table[3, 1] = table[3, 0] if value is None else value
            tensors[name] = ("I64", table)
            families.write(folder / "model.safetensors", tensors)
            self.error(*self.arguments("deepseek_v4", folder, 1), status=BAD_DATA, says=says)
            told = self.problems(folder)["problems"]
            self.assertEqual([p["name"] for p in told], [name])
            self.assertIn(says, told[0]["problem"])
        tensors[name] = ("I64", table[:-1])
        families.write(folder / "model.safetensors", tensors)
        self.error(*self.arguments("deepseek_v4", folder, 1), status=BAD_DATA, says=f"need {families.VOCAB}x{families.TOP_K}")
        self.assertEqual([p["name"] for p in self.problems(folder)["problems"]], [name])

    def test_missing(self):
        """One tensor less: verify names it, in a family with other names."""
        for name, gone, told in (("deepseek_v4", "layers.2.ffn.gate.bias", "layers.2.ffn.gate.bias"),
                                 ("deepseek_v4", "layers.0.ffn.gate.tid2eid", "layers.0.ffn.gate.tid2eid"),
                                 ("nemotron_h", "backbone.layers.1.norm.weight", "backbone.layers.1.norm.weight"),
                                 ("kimi_k2-nested", "language_model.lm_head.weight", "language_model.lm_head")):  # fmt: skip
            with self.subTest(gone):
                folder = self.folder / gone
                families.make(folder, name)
                tensors = families.Maker(name).model()
                del tensors[gone]
                families.write(folder / "model.safetensors", tensors)
                problems = self.problems(folder)["problems"]
                self.assertEqual([(p["name"], p["problem"]) for p in problems], [(told, "missing: config.json promises it")])


def one_of_each(names, left_out):
    """The last of those names that differ in numbers alone."""
    return {re.sub(r"\d+", "*", n): n for n in names if not any(part in n for part in left_out)}.values()


class Complete(FamilyCase):
    def test_each_tensor_is_missed(self):
        """Every tensor that a family has beside its experts: verify names the one that is not there, and nothing else."""
        for name in ("deepseek_v3", "deepseek_v4", "deepseek_v41", "glm_moe_dsa", "nemotron_h", "qwen3_moe"):
            families.MODELS["plain"] = families.MODELS[name] | {"format": "bf16", "shared_format": "bf16", "attention_format": "bf16"}
            folder = self.folder / name
            families.make(folder, "plain")
            tensors = families.Maker("plain").model()
            optional = ("mtp.", "vision", "tid2eid-odd", "bias_vl", ".experts.")
            for gone in one_of_each(tensors, optional):
                with self.subTest(f"{name}: {gone}"):
                    families.write(folder / "model.safetensors", {n: t for n, t in tensors.items() if n != gone})
                    problems = self.problems(folder)["problems"]
                    self.assertEqual([p["problem"] for p in problems], ["missing: config.json promises it"])
                    self.assertIn(problems[0]["name"], (gone, gone.removesuffix(".weight")))

    def test_each_shape_is_compared(self):
        """The same tensors with a row more."""
        for name in ("deepseek_v4", "deepseek_v41", "glm_moe_dsa", "nemotron_h"):
            families.MODELS["plain"] = families.MODELS[name] | {"format": "bf16", "shared_format": "bf16", "attention_format": "bf16"}
            folder = self.folder / name
            families.make(folder, "plain")
            tensors = families.Maker("plain").model()
            free = ("mtp.", "vision", "tid2eid", ".experts.", "engram.", "ape")  # sizes that config.json does not tell
            for changed in one_of_each(tensors, free):
                with self.subTest(f"{name}: {changed}"):
                    dtype, values = tensors[changed]
                    grown = np.concatenate((values, values[:1]))
                    families.write(folder / "model.safetensors", tensors | {changed: (dtype, grown)})
                    problems = self.problems(folder)["problems"]
                    self.assertEqual(len(problems), 1, problems)
                    self.assertIn("by config.json", problems[0]["problem"])
                    self.assertIn(problems[0]["name"], (changed, changed.removesuffix(".weight")))


if __name__ == "__main__":
    unittest.main()
