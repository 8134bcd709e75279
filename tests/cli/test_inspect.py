"""moe4 inspect: what it says of the bundled model, of small ones made wrong, and of what is no model."""
import json
import shutil
import struct
import unittest

import tensors
from cli_case import BAD_DATA, BAD_USAGE, FINE, GOLDEN, MODEL, CliCase


class Inspect(CliCase):
    def test_bundled_model_as_json(self):
        said = self.json("inspect", MODEL)
        for key, value in {
            "family": "glm4_moe", "architecture": "Glm4MoeForCausalLM", "quantization": "modelopt NVFP4", "n_layers": 6,
            "n_dense_layers": 1, "hidden": 256, "vocab": 256, "intermediate": 768, "moe_intermediate": 128, "n_experts": 32,
            "top_k": 6, "n_shared_experts": 1, "router": "sigmoid_bias", "router_normalize": True, "router_scale": 2.5,
            "files": 1, "tensors": 2113, "bytes": 10474704,
        }.items():  # fmt: skip
            self.assertEqual(said[key], value, key)
        kinds = {k["pattern"]: k for k in said["kinds"]}
        self.assertEqual(sum(k["bytes"] for k in said["kinds"]), said["bytes"])
        self.assertEqual(kinds["model.layers.*.mlp.experts.*.down_proj"]["format"], "NVFP4")
        self.assertEqual(kinds["model.layers.*.mlp.experts.*.down_proj"]["shape"], [256, 128])
        self.assertEqual(kinds["model.layers.*.mlp.experts.*.down_proj"]["count"], 160)
        self.assertEqual(kinds["model.layers.*.mlp.gate.weight"]["format"], "BF16")
        self.assertEqual(kinds["lm_head.weight"]["count"], 1)

    def test_bundled_layers(self):
        """The awkward cases that models/README.md lists, counted here from the file itself."""
        raw = (MODEL / "model.safetensors").read_bytes()
        (n,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + n])
        header.pop("__metadata__")

        def data(name):
            begin, end = header[name]["data_offsets"]
            return raw[8 + n + begin : 8 + n + end]

        def differ(layer, what):
            experts = [f"model.layers.{layer}.mlp.experts.{e}." for e in range(32)]
            return sum(data(f"{e}gate_proj.{what}") != data(f"{e}up_proj.{what}") for e in experts)

        layers = self.json("inspect", MODEL)["layers"]
        self.assertEqual([row["layer"] for row in layers], list(range(6)))
        self.assertEqual([row["kind"] for row in layers], ["dense"] + ["moe"] * 5)
        for row in layers[1:]:
            number = row["layer"]
            scales = b"".join(data(t) for t in header if t.startswith(f"model.layers.{number}.mlp.") and t.endswith(".weight_scale"))
            self.assertEqual(row["n_blocks"], len(scales))
            self.assertEqual(row["n_scale_448"], scales.count(0x7E))
            self.assertEqual(row["n_scale_pow2"], sum(scales.count(b) for b in [*range(8, 0x7F, 8), 1, 2, 4]))
            self.assertEqual(row["scale_max"], 448)
            self.assertEqual(row["scale_min"], (1 + min(scales) % 8 / 8) * 2.0 ** (min(scales) // 8 - 7))
            self.assertEqual(row["gate_up_global_differ"], differ(number, "weight_scale_2"))
            self.assertEqual(row["gate_up_input_differ"], differ(number, "input_scale"))
            self.assertEqual(row["input_scale_missing"], 0)
            self.assertEqual(row["n_scale_bad"] + row["n_scale_zero"], 0)
            self.assertEqual(row["input_scale_implausible"], 1 if number in (3, 5) else 0)
        self.assertGreater(layers[2]["gate_up_global_differ"], 30)
        self.assertEqual(layers[4]["gate_up_input_differ"], 32)
        self.assertIn("layer 3 expert 7 down_proj.input_scale", layers[3]["implausible"][0])

    def test_one_layer(self):
        every = self.json("inspect", MODEL)["layers"]
        for number in (0, 4):
            self.assertEqual(self.json("inspect", MODEL, "--layer", number)["layers"], [every[number]])
        self.error("inspect", MODEL, "--layer", 6, status=BAD_USAGE, says=["--layer", "6 layers"])

    def test_as_text(self):
        text = self.moe4("inspect", MODEL).stdout
        for part in ("glm4_moe (Glm4MoeForCausalLM)", "modelopt NVFP4", "1 dense, 5 mixture of experts", "32 of 32",
                     "layer 5 expert 7 down_proj.input_scale", "(implausible: below", "e_score_correction_bias"):  # fmt: skip
            self.assertIn(part, text)

    def test_unquantized_model(self):
        model = tensors.TinyModel(self.folder / "tiny")
        said = self.json("inspect", model.folder)
        self.assertEqual((said["family"], said["quantization"], said["router"]), ("qwen3_moe", "none", "softmax_topk"))
        self.assertEqual([(row["kind"], row["format"], row["n_blocks"]) for row in said["layers"]],
                         [("dense", "BF16", 0), ("moe", "BF16", 0)])

    def test_single_file(self):
        said = self.json("inspect", GOLDEN)
        self.assertNotIn("family", said)
        self.assertEqual(said["layers"], [])
        self.assertEqual(len(said["kinds"]), said["tensors"])
        self.error("inspect", GOLDEN, "--layer", 1, status=BAD_DATA, says="no config.json")

    def test_unknown_family_is_shown_and_refused(self):
        folder = self.folder / "other"
        shutil.copytree(MODEL, folder)
        config = folder / "config.json"
        config.write_text(config.read_text().replace("glm4_moe", "dbrx"))
        done = self.moe4("inspect", folder, status=BAD_DATA)
        self.assertIn("model.layers.*.mlp.experts.*.up_proj", done.stdout)
        self.assertIn('unsupported: model_type "dbrx" (found architecture "Glm4MoeForCausalLM"; moe4 runs deepseek_v3', done.stderr)

    def test_wrong_data(self):
        self.error("inspect", self.folder / "none", status=BAD_DATA, says="no such file or folder")
        self.error("inspect", self.folder, status=BAD_DATA, says="no .safetensors file")
        model = tensors.TinyModel(self.folder / "tiny")
        del model.tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        tensors.write(model.folder / "model.safetensors", model.tensors)
        self.error("inspect", model.folder, status=BAD_DATA, says="model.layers.1.mlp.experts.3.up_proj")
        self.moe4("inspect", model.folder, "--layer", 0, status=FINE)


if __name__ == "__main__":
    unittest.main(verbosity=2)
