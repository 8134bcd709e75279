"""moe4 quantize from MXFP4 and from tensors of all experts: against values in fp64, exactly."""
import json
import math
import struct
import sys
import unittest

import tensors
from cli_case import BAD_DATA, ROOT, CliCase

sys.path.insert(0, str(ROOT / "tests" / "vectors"))
import make_mxfp4_models as models  # noqa: E402


def raw_tensors(path):
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    return {k: (t["dtype"], t["shape"], raw[8 + n :][slice(*t["data_offsets"])]) for k, t in header.items()}


def decoded(out, module):
    """In fp64, from the ModelOpt or compressed-tensors layout."""
    packed = f"{module}.weight_packed" in out
    codes, scales = out[f"{module}.weight_packed" if packed else f"{module}.weight"][2], out[f"{module}.weight_scale"][2]
    (g,) = struct.unpack("<f", out[f"{module}.weight_global_scale" if packed else f"{module}.weight_scale_2"][2])
    g = 1 / g if packed else g
    values = []
    for i, byte in enumerate(codes):
        for code in (byte & 15, byte >> 4):
            values.append(models.E2M1[code & 7] * (-1 if code & 8 else 1) * models.e4m3(scales[i // 8]) * g)
    return values


class QuantizeFormats(CliCase):
    def make(self, name, *args):
        values = models.write(self.folder / name, name)
        said = self.json("quantize", self.folder / name, self.folder / f"{name}-out", *args)
        return values, said, raw_tensors(self.folder / f"{name}-out" / "model.safetensors")

    # ---- MXFP4 ----

    def check_deepseek_v4(self, *args):
        values, said, out = self.make("deepseek_v4", *args)
        inexact = {m["name"]: m for m in said["recast"]["inexact"]}
        self.assertEqual(said["recast"]["matrices"], 9)
        for module, (rows, cols, wanted) in values.items():
            got = decoded(out, module)
            if "shared" in module:  # from FP8, hence quantized
                error = math.dist(got, wanted) / math.hypot(*wanted)
                self.assertTrue(0.05 < error < 0.15, (module, error))
                continue
            differ = {i // 32 for i, (a, b) in enumerate(zip(got, wanted)) if a != b}
            self.assertEqual(len(differ), inexact.get(module, {"blocks_inexact": 0})["blocks_inexact"], module)
            if differ:
                self.assertEqual(inexact[module]["blocks"], rows * cols // 32)
                error = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(got, wanted)) / math.fsum(b * b for b in wanted))
                self.assertAlmostEqual(inexact[module]["relative_error"] / error, 1, places=5)
        return inexact, out

    def test_deepseek_v4(self):
        """Exponents 20 apart, and 17 below the partner's: those two are inexact, and nothing else is. 2^-127 and 2^127 are fine."""
        inexact, out = self.check_deepseek_v4()
        root = "layers.0.ffn.experts."
        self.assertEqual({*inexact}, {f"{root}1.w1", f"{root}1.w2"})
        for name in ("mtp.0.ffn.experts.0.w1.weight", "mtp.0.ffn.experts.0.w1.scale"):
            self.assertEqual(out[name], raw_tensors(self.folder / "deepseek_v4" / "model.safetensors")[name])
        self.assertNotIn(f"{root}0.w1.scale", out)
        for e in range(3):
            self.assertEqual(out[f"{root}{e}.w1.weight_scale_2"], out[f"{root}{e}.w3.weight_scale_2"])
        text = self.moe4("quantize", self.folder / "deepseek_v4", self.folder / "again").stdout
        self.assertRegex(text, r"recast +9 matrices of MXFP4, 7 without loss\n +layers.0.ffn.experts.1.w1: \d+ of 64 blocks")
        again = self.json("quantize", self.folder / "deepseek_v4", self.folder / "again", "--resume")  # nothing to do, and still said
        self.assertEqual({m["name"]: m["blocks_inexact"] for m in again["recast"]["inexact"]},
                         {k: m["blocks_inexact"] for k, m in inexact.items()})  # fmt: skip

    def test_compressed_tensors(self):
        self.check_deepseek_v4("--recipe", "compressed_tensors")

    def test_gpt_oss(self):
        values, said, out = self.make("gpt_oss", "--search", "--four-over-six")  # which are for what is rounded
        self.assertEqual((said["recast"], said["quantized"]), ({"matrices": 9, "inexact": []}, 10))
        for module, (rows, cols, wanted, bias) in values.items():
            self.assertEqual(out[f"{module}.weight"][:2], ("U8", [rows, cols // 2]))
            self.assertEqual(decoded(out, module), wanted, module)
            self.assertEqual(out[f"{module}.bias"], ("BF16", [rows], models.bf16(bias)), module)
        self.assertFalse([k for k in out if "gate_up" in k or k.endswith(("_blocks", "_scales"))])

    def test_scale_that_is_nan(self):
        for name, tensor in (("deepseek_v4", "layers.0.ffn.experts.1.w1"), ("gpt_oss", "model.layers.0.mlp.experts.1.gate_proj")):
            models.write(self.folder / name, name)
            path = self.folder / name / "model.safetensors"
            raw = bytearray(path.read_bytes())
            (n,) = struct.unpack("<Q", raw[:8])
            header = json.loads(raw[8 : 8 + n])
            key = f"{tensor}.scale" if name == "deepseek_v4" else "model.layers.0.mlp.experts.gate_up_proj_scales"
            row = 5 if name == "deepseek_v4" else 2 * models.INTER + 10  # gate's row 5 of expert 1
            raw[8 + n + header[key]["data_offsets"][0] + row * 2 + 1] = 255
            path.write_bytes(raw)
            out = self.folder / f"{name}-out"
            self.error("quantize", path.parent, out, status=BAD_DATA, says=[tensor, "row 5 column 32 is NaN"])
            if name == "deepseek_v4":  # zeros times NaN are NaN too
                codes = 8 + n + header[f"{tensor}.weight"]["data_offsets"][0] + row * 32 + 16
                raw[codes : codes + 16] = bytes(16)
                path.write_bytes(raw)
                self.error("quantize", path.parent, f"{out}-zeros", status=BAD_DATA, says=[tensor, "row 5 column 32 is NaN"])
                raw[8 + n + header[key]["data_offsets"][0] + row * 2 + 1] = 120
                shared = "layers.0.ffn.shared_experts.w1"  # FP8 has scales of the same kind
                raw[8 + n + header[f"{shared}.scale"]["data_offsets"][0]] = 255
                path.write_bytes(raw)
                self.error("quantize", path.parent, f"{out}-fp8", status=BAD_DATA, says=[shared, "row 0 column 0 is NaN"])

    def test_shapes_that_do_not_fit(self):
        cases = {
            "layers.0.ffn.experts.0.w1.scale": ("F8_E8M0", [32, 1], bytes(32)),
            "layers.0.ffn.shared_experts.w1.scale": ("F8_E8M0", [2, 1], bytes(2)),
            "layers.0.ffn.experts.0.w1.weight": ("I8", [32, 24], bytes(768)),
        }
        config, good, _ = models.deepseek_v4()
        folder = self.folder / "bad"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        for name, tensor in cases.items():
            tensors.write(folder / "model.safetensors", good | {name: tensor})
            self.error("quantize", folder, self.folder / "out", status=BAD_DATA, says=[name])
        config, good, _ = models.gpt_oss()
        (folder / "config.json").write_text(json.dumps(config))
        scales = "model.layers.0.mlp.experts.gate_up_proj_scales"
        tensors.write(folder / "model.safetensors", good | {scales: ("U8", [3, 64, 1], bytes(192))})
        self.error("quantize", folder, self.folder / "out", status=BAD_DATA, says=[scales, "[3, 64, 2]"])
        tensors.write(folder / "model.safetensors", {k: v for k, v in good.items() if k != scales})
        self.error("quantize", folder, self.folder / "out", status=BAD_DATA, says=[scales])

    # ---- experts in one tensor ----

    def test_experts_in_one_tensor(self):
        """Split, they give the bytes of a model whose experts stood alone."""
        for name in ("gpt_oss-bf16", "llama4", "llama4-large", "qwen3_vl_moe"):
            values, said, out = self.make(name)
            alone = self.folder / f"{name}-alone"
            alone.mkdir()
            (alone / "config.json").write_text((self.folder / name / "config.json").read_text())
            split = {f"{m}.weight": ("BF16", [rows, cols], models.bf16(v)) for m, (rows, cols, v) in values.items()}
            vision = "vision_model.layers.0.self_attn.q_proj.weight"
            split[vision] = raw_tensors(self.folder / name / "model.safetensors")[vision]
            tensors.write(alone / "model.safetensors", split)
            self.assertEqual(self.json("quantize", alone, self.folder / f"{name}-2")["quantized"], said["quantized"])
            self.assertEqual(raw_tensors(self.folder / f"{name}-2" / "model.safetensors"), out, name)
            self.assertEqual((said["quantized"], out[vision][0]), (len(values), "BF16"))

    def test_excluded_experts_stay_wide(self):
        values, said, out = self.make("llama4", "--exclude", "*.experts.1.*")
        self.assertEqual((said["quantized"], said["left"]), (6, 3))
        for module, (rows, cols, v) in values.items():
            if ".experts.1." in module:
                self.assertEqual(out[f"{module}.weight"], ("BF16", [rows, cols], models.bf16(v)))
        values, said, out = self.make("gpt_oss", "--exclude", "*.experts.1.*")
        for module, (rows, cols, v, _) in values.items():
            if ".experts.1." in module:
                self.assertEqual(out[f"{module}.weight"], ("BF16", [rows, cols], models.bf16(v)))

    def test_refused(self):
        config, good, _ = models.fused("llama4_text", "model.layers.0.mlp.experts.", False)
        folder = self.folder / "bad"
        folder.mkdir()
        tensors.write(folder / "model.safetensors", good)
        for text, says in (({"model_type": "qwen3_moe"}, ["order that moe4 does not know for model_type qwen3_moe"]),
                           ({"model_type": "llama4", "hidden_size": 96}, ["[3, 64, 64]", "hidden_size 96"])):  # fmt: skip
            (folder / "config.json").write_text(json.dumps(text))
            self.error("quantize", folder, self.folder / "out", status=BAD_DATA, says=["experts.gate_up_proj", *says])
        (folder / "config.json").write_text(json.dumps(config))
        name = "model.layers.0.mlp.experts.2.up_proj.weight"
        tensors.write(folder / "model.safetensors", good | {name: ("BF16", [32, 64], bytes(4096))})
        self.error("quantize", folder, self.folder / "out", status=BAD_DATA, says=[name, "there, and in the tensor of all experts too"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
