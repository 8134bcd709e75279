"""moe4 compare: errors, orders and counts against the same sums in Python."""
import json
import math
import shutil
import unittest

import tensors
from cli_case import BAD_DATA, BAD_USAGE, MODEL, CliCase


class Compare(CliCase):
    def pair(self):
        """Two wide models: one matrix doubled, one with a single value off, one vector that differs, one matrix each alone."""
        a, b = tensors.TinyModel(self.folder / "a"), tensors.TinyModel(self.folder / "b")
        a.tensors["model.norm.weight"] = b.tensors["model.norm.weight"] = ("F32", [4], [1.0] * 4)
        a.tensors["model.layers.0.input_layernorm.weight"] = ("F32", [4], [1.0] * 4)
        b.tensors["model.layers.0.input_layernorm.weight"] = ("F32", [4], [2.0] * 4)
        doubled, nudged = "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
        a.tensors[doubled] = (*a.tensors[doubled][:2], [2 * x for x in a.tensors[doubled][2]])
        a.tensors[nudged] = (*a.tensors[nudged][:2], [a.tensors[nudged][2][0] + 0.25, *a.tensors[nudged][2][1:]])
        a.tensors["lm_head.weight"] = ("F32", [4, 16], [0.0] * 64)
        self.nudged_norm = math.sqrt(sum(x * x for x in b.tensors[nudged][2]))
        for m in (a, b):
            tensors.write(m.folder / "model.safetensors", m.tensors)
        return a.folder, b.folder

    def test_wide_models(self):
        said = self.json("compare", *self.pair())
        first, second, *rest = said["matrices"]
        self.assertEqual((first["name"], first["relative_error"]), ("model.layers.1.mlp.experts.2.up_proj", 1.0))
        self.assertEqual((first["snr_db"], first["shape"], first["scales_differing"]), (0.0, [16, 32], None))
        self.assertEqual(second["name"], "model.layers.0.mlp.down_proj")
        self.assertAlmostEqual(second["relative_error"], 0.25 / self.nudged_norm, places=9)
        self.assertAlmostEqual(second["snr_db"], -20 * math.log10(second["relative_error"]), places=9)
        self.assertEqual({m["relative_error"] for m in rest}, {0})
        self.assertEqual((said["n_matrices"], said["only_a"], said["only_b"]), (len(rest) + 2, 1, 0))
        self.assertEqual((said["others_same"], said["others_differing"]), (1, 1))

    def test_layer(self):
        a, b = self.pair()
        said = self.json("compare", b, a, "--layer", 0)
        self.assertEqual((said["n_matrices"], said["only_b"], said["others_differing"]), (3, 0, 1))
        self.assertTrue(all(".layers.0." in m["name"] for m in said["matrices"]))
        self.error("compare", a, b, "--layer", 7, status=BAD_DATA, says="no matrix in common in this layer")

    def test_quantized_against_its_source(self):
        source = self.pair()[1]
        out = self.folder / "out"
        self.moe4("quantize", source, out)
        said = self.json("compare", out, source)
        worst = said["matrices"][0]
        self.assertTrue(0.05 < worst["relative_error"] < 0.15, worst)
        self.assertEqual([m["relative_error"] for m in said["matrices"]], sorted((m["relative_error"] for m in said["matrices"]), reverse=True))
        self.assertEqual(said["matrices"][-1]["relative_error"], 0)  # the router

    def test_codes_and_scales_are_counted(self):
        other = self.folder / "other"
        shutil.copytree(MODEL, other)
        raw = bytearray((other / "model.safetensors").read_bytes())
        n = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + n])
        module = "model.layers.3.mlp.experts.5.up_proj"
        codes, scales = (8 + n + header[f"{module}.{s}"]["data_offsets"][0] for s in ("weight", "weight_scale"))
        raw[codes] ^= 0x11  # both codes
        raw[codes + 1] ^= 0x20
        raw[scales + 9] ^= 1
        (other / "model.safetensors").write_bytes(raw)
        said = self.json("compare", other, MODEL, "--layer", 3)
        first, second = said["matrices"][:2]
        self.assertEqual((first["name"], first["codes_differing"], first["scales_differing"]), (module, 3, 1))
        self.assertGreater(first["relative_error"], 0)
        self.assertEqual((second["codes_differing"], second["scales_differing"], second["relative_error"]), (0, 0, 0))
        text = self.moe4("compare", other, MODEL, "--limit", 2).stdout.splitlines()
        self.assertEqual((len(text), text[1].split()[0], text[3].split()[:2]), (6, module, ["and", "527"]))

    def test_refused(self):
        a, b = self.pair()
        tensors.write(b / "model.safetensors", {"model.layers.0.mlp.up_proj.weight": ("F32", [2, 16], [0.0] * 32)})
        self.error("compare", a, b, status=BAD_DATA, says=["model.layers.0.mlp.up_proj", "16x32", "2x16"])
        self.error("compare", a, self.folder / "none", status=BAD_DATA, says="no such file")
        self.error("compare", a, status=BAD_USAGE, says="usage")


if __name__ == "__main__":
    unittest.main(verbosity=2)
