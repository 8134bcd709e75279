"""moe4 quantize: the bytes, the layout, calibration, and what it refuses."""
import array
import json
import os
import pathlib
import random
import shutil
import unittest

import tensors
from cli_case import BAD_DATA, BAD_USAGE, MODEL
from quantize_case import CALIBRATION, E4M3, EXPERTS, JOURNAL, TINY, TINY_IDS, QuantizeCase, contents, decoded, number, raw_tensors


class Quantize(QuantizeCase):
    # ---- bytes ----

    def test_experts_are_the_bundled_models(self):
        out = raw_tensors(self.quantize(self.experts(), "out") / "model.safetensors")[0]
        bundled = raw_tensors(MODEL / "model.safetensors")[0]
        for e in range(8, 12):
            module = f"model.layers.2.mlp.experts.{e}."
            gate, up = (number(bundled[f"{module}{p}_proj.weight_scale_2"]) for p in ("gate", "up"))
            same = ["down_proj"] + ["gate_proj"] * (gate >= up) + ["up_proj"] * (up >= gate)  # its own scales there; ours share the larger
            for proj in same:
                for suffix in ("weight", "weight_scale", "weight_scale_2"):
                    self.assertEqual(out[f"{module}{proj}.{suffix}"], bundled[f"{module}{proj}.{suffix}"], f"{module}{proj}.{suffix}")
            for proj in ("gate_proj", "up_proj"):
                self.assertEqual(number(out[f"{module}{proj}.weight_scale_2"]), max(gate, up))

    def test_threads_and_instructions_do_not_matter(self):
        model = self.experts()
        first = contents(self.quantize(model, "one", "--threads", 1, "--search", "--isa", "scalar"))
        self.assert_same(contents(self.quantize(model, "three", "--threads", 3, "--search")), first)
        for isa in ("avx2", "avx512vnni"):  # or what this CPU has of it
            self.assert_same(contents(self.quantize(model, isa, "--search", "--isa", isa)), first, isa)

    def test_better_than_plain_at_the_same_size(self):
        model = self.experts()
        source = tensors.read(EXPERTS)
        modules = [k[:-7] for k in source if k.endswith("_proj.weight")]
        error, size = {}, set()
        for name, args in (("plain", []), ("46", ["--four-over-six"]), ("search", ["--search"])):
            path = self.quantize(model, name, *args) / "model.safetensors"
            out = raw_tensors(path)[0]
            size.add(sum(len(t[2]) for t in out.values()))
            error[name] = sum(sum((a - b) ** 2 for a, b in zip(decoded(out, m), source[f"{m}.weight"][2])) for m in modules[:3])
            if name == "plain":
                amax = max(abs(x) for m in modules if "8.gate" in m or "8.up" in m for x in source[f"{m}.weight"][2])
                self.assertAlmostEqual(number(out["model.layers.2.mlp.experts.8.gate_proj.weight_scale_2"]) * 2688 / amax, 1, places=6)
            if name == "46":
                self.assertAlmostEqual(number(out["model.layers.2.mlp.experts.8.gate_proj.weight_scale_2"]) * 1536 / amax, 1, places=6)
        self.assertEqual(len(size), 1)
        self.assertLess(error["46"], 0.95 * error["plain"])
        self.assertLess(error["search"], 0.85 * error["plain"])

    def test_fp8_blocks(self):
        """Block-scaled FP8 gives the bytes that its values give as F32, whether quantized or left."""
        rng = random.Random(5)
        rows, cols = 144, 160
        codes = [rng.randrange(256) & ~(rng.randrange(8) << 5) for _ in range(rows * cols)]
        codes = [0x38 if c & 0x7F == 0x7F else c for c in codes]
        factors = [0.5, 0.0123, 3.0, 1.75e-3]
        values = array.array("f")
        for i, c in enumerate(codes):
            factor = array.array("f", [factors[i // cols // 128 * 2 + i % cols // 128]])[0]
            values.append((-1 if c & 0x80 else 1) * E4M3[c & 0x7F] * factor)
        names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"]
        fp8, wide = self.tiny(), tensors.TinyModel(self.folder / "wide")
        for name in names:
            fp8.tensors[name] = ("F8_E4M3", [rows, cols], codes)
            fp8.tensors[name + "_scale_inv"] = ("F32", [2, 2], factors)
            wide.tensors[name] = ("F32", [rows, cols], values)
        config = fp8.config() | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
        (fp8.folder / "config.json").write_text(json.dumps(config))
        for m in (fp8, wide):
            tensors.write(m.folder / "model.safetensors", m.tensors)
        a, b = (raw_tensors(self.quantize(m.folder, n, "--exclude", "*.k_proj") / "model.safetensors")[0]
                for m, n in ((fp8, "a"), (wide, "b")))  # fmt: skip
        for suffix in ("weight", "weight_scale", "weight_scale_2"):
            self.assertEqual(a[names[0][:-6] + suffix], b[names[0][:-6] + suffix])
        dtype, shape, raw = a[names[1]]
        self.assertEqual((dtype, shape, set(a) - set(b)), ("BF16", [rows, cols], set()))
        self.assertLess(max(abs(x - y) / (abs(y) + 1e-30) for x, y in zip(tensors.unpack("BF16", raw), values)), 2**-8)
        said = json.loads((self.folder / "a" / "config.json").read_text())["quantization_config"]
        self.assertEqual(said["quant_method"], "modelopt")
        tensors.write(fp8.folder / "model.safetensors", {k: v for k, v in fp8.tensors.items() if not k.endswith("_inv")})
        self.error("quantize", fp8.folder, self.folder / "c", status=BAD_DATA, says=["q_proj.weight", "F8_E4M3 without weight_scale_inv"])

    # ---- layout ----

    def test_modelopt_folder(self):
        model = self.tiny(**{"lm_head.weight": ("BF16", [64, 32], [0.5] * 2048), "a.odd.number": ("U8", [3], [1, 2, 3]), "model.norm.weight": ("F32", [32], [1.0] * 32),
                             "model.embed_tokens.weight": ("BF16", [64, 32], [0.25] * 2048)})  # fmt: skip
        (model.folder / "tokenizer.json").write_text("{}")
        (model.folder / "assets").mkdir()
        (model.folder / "assets" / "readme").write_text("text")
        (model.folder / ".git").mkdir()
        for name in (CALIBRATION, ".moe4-quantize.tmp", ".moe4-later", JOURNAL):  # of a run that made this folder
            (model.folder / name).write_text("")
        out = self.quantize(model.folder, "out")
        self.assertEqual(sorted(contents(out)), ["assets/readme", "config.json", "hf_quant_config.json", "model.safetensors", "tokenizer.json"])
        made, metadata = raw_tensors(out / "model.safetensors")
        source, _ = raw_tensors(model.folder / "model.safetensors")
        self.assertEqual(metadata, {"format": "pt", "recipe": "modelopt", "four-over-six": "no", "search": "no", "calibration": "none"})
        self.assertEqual({*tensors.read(out / "model.safetensors")}, {*made})  # which asks for places aligned to their elements
        kept = ["lm_head.weight", "a.odd.number", "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"]
        for name in kept:
            self.assertEqual(made[name], source[name])
        for name in set(source) - set(kept):
            rows, cols = source[name][1]
            module = name[:-7]
            self.assertEqual(made[name][:2], ("U8", [rows, cols // 2]))
            self.assertEqual(made[module + ".weight_scale"][:2], ("F8_E4M3", [rows, cols // 16]))
            self.assertEqual(made[module + ".weight_scale_2"][:2], ("F32", []))
        self.assertEqual(len(made), 3 * (len(source) - len(kept)) + len(kept))
        before, after = (json.loads((f / "config.json").read_text()) for f in (model.folder, out))
        ours = after.pop("quantization_config")
        self.assertEqual(after, before)
        self.assertEqual((ours["quant_method"], ours["quant_algo"]), ("modelopt", "NVFP4"))
        self.assertEqual(sorted(ours["ignore"]), ["lm_head", "model.layers.1.mlp.gate"])
        self.assertIsNone(ours["config_groups"]["group_0"]["input_activations"])
        hf = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
        self.assertEqual((hf["quant_algo"], hf["group_size"], sorted(hf["exclude_modules"])), ("NVFP4", 16, sorted(ours["ignore"])))
        problems = self.moe4("verify", out, status=BAD_DATA).stdout
        self.assertNotRegex(problems, "mlp")  # only what the tiny model never had

    def test_compressed_tensors(self):
        model = self.tiny()
        ct, plain = (self.quantize(model.folder, r, "--recipe", r) for r in ("compressed_tensors", "modelopt"))
        made, other = (raw_tensors(f / "model.safetensors")[0] for f in (ct, plain))
        module = "model.layers.1.mlp.experts.2.up_proj"
        self.assertEqual(made[f"{module}.weight_packed"][:2], other[f"{module}.weight"][:2])
        self.assertEqual(made[f"{module}.weight_global_scale"][:2], ("F32", [1]))
        self.assertAlmostEqual(number(made[f"{module}.weight_global_scale"]) * number(other[f"{module}.weight_scale_2"]), 1, places=6)
        self.assertNotIn(f"{module}.weight", made)
        ours = json.loads((ct / "config.json").read_text())["quantization_config"]
        self.assertEqual((ours["quant_method"], ours["format"]), ("compressed-tensors", "nvfp4-pack-quantized"))
        self.assertEqual(ours["config_groups"]["group_0"]["weights"]["strategy"], "tensor_group")
        self.assertFalse((ct / "hf_quant_config.json").exists())
        self.assertIn("quant_algo", (self.quantize(model.folder, "static", "--recipe", "modelopt_static") / "config.json").read_text())

    def test_exclude(self):
        model = self.tiny(**{"model.layers.0.self_attn.o_proj.weight": ("F32", [4, 24], [1.0] * 96)})
        said = self.json("quantize", model.folder, self.folder / "out", "--exclude", "*.experts.0.*", "--exclude", "model.layers.0.mlp.*")
        self.assertEqual((said["quantized"], said["left"], said["copied"], said["shards"]), (9, 7, 1, 1))  # 24 is no multiple of 16
        made = raw_tensors(self.folder / "out" / "model.safetensors")[0]
        self.assertEqual(made["model.layers.1.mlp.experts.0.up_proj.weight"][0], "BF16")
        self.assertEqual(made["model.layers.1.mlp.experts.1.up_proj.weight"][0], "U8")
        ignore = json.loads((self.folder / "out" / "config.json").read_text())["quantization_config"]["ignore"]
        self.assertIn("model.layers.0.mlp.up_proj", ignore)
        self.assertIn("model.layers.0.self_attn.o_proj", ignore)

    def test_measured_speed(self):
        said = self.json("quantize", self.experts(), self.folder / "out", "--measure")
        rate = (said["bytes_read"] + said["bytes_written"]) / said["seconds"]
        self.assertAlmostEqual(said["bytes_per_second"] / rate, 1, places=6)
        if said["disk_bytes_per_second"]:  # not every file system has files without names
            slower = min(said["disk_bytes_per_second"], said["memory_bytes_per_second"])
            self.assertAlmostEqual(said["share_of_slower"] * slower / rate, 1, places=6)
        self.assertNotIn("tmp", "".join(contents(self.folder / "out")))

    def test_layers_past_the_models_stay(self):
        model = self.tiny(**{"model.layers.2.mlp.up_proj.weight": ("F32", [16, 32], [1.0] * 512)})  # of multi-token prediction
        made = raw_tensors(self.quantize(model.folder, "out") / "model.safetensors")[0]
        self.assertEqual(made["model.layers.2.mlp.up_proj.weight"][0], "F32")

    def test_shards(self):
        model = self.experts()
        whole = raw_tensors(self.quantize(model, "whole") / "model.safetensors")[0]
        out = self.quantize(model, "out", "--max-shard-size", "50KB")
        index = json.loads((out / "model.safetensors.index.json").read_text())
        files = sorted({*index["weight_map"].values()})
        self.assertEqual(files, [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))])
        self.assertGreater(len(files), 3)
        together = {}
        for file in files:
            part, _ = raw_tensors(out / file)
            self.assertLessEqual(sum(len(t[2]) for t in part.values()), 50000 if len(part) > 3 else 1 << 30)
            self.assertEqual({index["weight_map"][k] for k in part}, {file})
            together.update(part)
        self.assert_same(together, whole)
        self.assertEqual(index["metadata"]["total_size"], sum(len(t[2]) for t in whole.values()))
        for size in ("0", "5X", "-1", "G", "99999999999999999999"):
            self.error("quantize", model, self.folder / "no", "--max-shard-size", size, status=BAD_USAGE, says=size)

    def test_index_of_the_input_stays_behind(self):
        """A model in shards that becomes one file: its index names files that are not there."""
        model = self.tiny()
        names = list(model.tensors)
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        (model.folder / "model.safetensors").unlink()
        for i, file in enumerate(files):
            tensors.write(model.folder / file, {k: model.tensors[k] for k in names[i::2]})
        index = {"metadata": {}, "weight_map": {k: files[i % 2] for i, k in enumerate(names)}}
        (model.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (model.folder / "kept").mkdir()
        (model.folder / "kept" / "model.safetensors.index.json").write_text("{}")  # below the top nothing is quantize's
        out = contents(self.quantize(model.folder, "out"))
        self.assertEqual(sorted(out), ["config.json", "hf_quant_config.json", "kept/model.safetensors.index.json", "model.safetensors"])

    # ---- calibration ----

    def test_calibrated_scales(self):
        out = self.quantize(TINY, "out", "--calibrate", TINY_IDS)
        made = raw_tensors(out / "model.safetensors")[0]
        source = tensors.read(TINY / "model.safetensors")
        ids = tensors.read(pathlib.Path(TINY_IDS))
        ids = next(v for d, s, v in ids.values() if d in ("I32", "I64"))
        _, (_, hidden), table = source["model.embed_tokens.weight"]
        norm, eps = source["model.layers.0.input_layernorm.weight"][2], json.loads((TINY / "config.json").read_text())["rms_norm_eps"]
        amax = 0
        for t in ids:
            x = table[t * hidden : (t + 1) * hidden]
            rms = (sum(v * v for v in x) / hidden + eps) ** 0.5
            amax = max(amax, max(abs(v / rms * w) for v, w in zip(x, norm)))
        scales = [number(made[f"model.layers.0.self_attn.{p}.input_scale"]) for p in ("q_proj", "k_proj", "v_proj")]
        self.assertEqual(len({*scales}), 1)
        self.assertAlmostEqual(scales[0] * 2688 / amax, 1, places=5)
        self.assertEqual(sum(k.endswith(".input_scale") for k in made), sum(k.endswith(".weight_scale_2") for k in made))
        self.moe4("verify", out)
        said = self.json("eval", out, "--token-ids", TINY_IDS, "--window", 64, "--act", "static")
        plain = self.json("eval", TINY, "--token-ids", TINY_IDS, "--window", 64)
        self.assertLess(abs(said["bits_per_token"] - plain["bits_per_token"]), 0.3)

    def test_calibrated_search_weighs_channels(self):
        """Where a channel of the input is always 0, its weights' errors do not count, and the others' get smaller."""
        model = self.folder / "model"
        shutil.copytree(TINY, model)
        source = tensors.read(model / "model.safetensors")
        name = "model.layers.0.input_layernorm.weight"
        norm = [x if k % 2 else 0 for k, x in enumerate(source[name][2])]
        tensors.write(model / "model.safetensors", source | {name: (*source[name][:2], norm)})
        error = {}
        for args in ([], ["--calibrate", TINY_IDS]):
            made = raw_tensors(self.quantize(model, f"out{len(args)}", "--search", *args) / "model.safetensors")[0]
            sums = [0, 0]
            for proj in ("q_proj", "k_proj", "v_proj"):
                module = f"model.layers.0.self_attn.{proj}"
                for i, (a, b) in enumerate(zip(decoded(made, module), source[f"{module}.weight"][2])):
                    sums[i % 2] += (a - b) ** 2
            error[len(args)] = sums
        self.assertLess(error[2][1], 0.8 * error[0][1])  # columns that are even are never looked at
        self.assertGreater(error[2][0], 1.1 * error[0][0])

    def test_experts_that_no_token_reached(self):
        ids = self.folder / "ids"
        ids.write_bytes(tensors.pack("I32", [3]))
        said = self.json("quantize", TINY, self.folder / "out", "--calibrate", ids)
        self.assertEqual(said["calibration"]["tokens"], 1)
        n_unreached = said["calibration"]["expert_inputs_unreached"]
        self.assertTrue(0 < n_unreached < said["calibration"]["expert_inputs"])
        made = raw_tensors(self.folder / "out" / "model.safetensors")[0]
        config = json.loads((TINY / "config.json").read_text())
        downs = [number(t) for k, t in made.items() if k.startswith("model.layers.1.") and k.endswith("down_proj.input_scale")]
        self.assertEqual(downs.count(max(downs)), len(downs) - config["num_experts_per_tok"] + 1)
        self.error("quantize", TINY, self.folder / "no", "--calibrate", self.folder / "none", status=BAD_DATA, says="No such file")

    # ---- what goes wrong ----

    def test_weight_that_is_not_finite(self):
        name = "model.layers.1.mlp.experts.1.down_proj.weight"
        for value, says in (("nan", "is NaN"), ("inf", "is infinite"), ("-inf", "is infinite")):
            model, out = self.tiny(), self.folder / f"out{value}"
            model.tensors[name][2][17] = float(value)
            tensors.write(model.folder / "model.safetensors", model.tensors)
            self.error("quantize", model.folder, out, status=BAD_DATA, says=[f"model.safetensors: {name}: row 1 column 1 {says}"])
            self.assertEqual(sorted(contents(out)), [JOURNAL])
            shutil.rmtree(model.folder)

    def test_weight_that_is_not_finite_in_the_partner(self):
        """gate and up share a global scale: neither's shard gets its name when the other, in another shard, has a NaN."""
        for proj in ("gate", "up"):
            model, out = self.tiny(), self.folder / f"out-{proj}"
            name = f"model.layers.0.mlp.{proj}_proj.weight"
            model.tensors[name][2][40] = float("nan")
            tensors.write(model.folder / "model.safetensors", model.tensors)
            self.error("quantize", model.folder, out, "--max-shard-size", 1, status=BAD_DATA, says=[f"{name}: row 1 column 8 is NaN"])
            made = {k for p in out.glob("*.safetensors") for k in raw_tensors(p)[0]}
            self.assertFalse([k for k in made if "layers.0.mlp.gate" in k or "layers.0.mlp.up" in k])
            shutil.rmtree(model.folder)

    def test_refused(self):
        model = self.tiny()
        cases = {
            "model.layers.0.self_attn.q_proj.weight_packed": ("U8", [16, 8], [0] * 128),
            "model.layers.0.mlp.experts.gate_up_proj_blocks": ("U8", [2, 16, 2, 16], [0] * 1024),
            "model.layers.0.mlp.experts.gate_up_proj": ("F32", [2, 4, 4], [0.0] * 32),
            "model.layers.0.self_attn.q_proj.weight": ("I8", [16, 16], [0] * 256),
        }
        for name, tensor in cases.items():
            tensors.write(model.folder / "model.safetensors", model.tensors | {name: tensor})
            self.error("quantize", model.folder, self.folder / "out", status=BAD_DATA, says=name)
        self.error("quantize", MODEL, self.folder / "out", status=BAD_DATA, says="ModelOpt NVFP4 already")
        self.assertFalse((self.folder / "out").exists())
        self.error("quantize", model.folder, self.folder / "out", "--recipe", "int4", status=BAD_USAGE, says="int4")
        self.error("quantize", model.folder, self.folder / "out", "--recipe", "compressed_tensors", "--four-over-six", status=BAD_USAGE)

    def test_unreadable_shard(self):
        model = self.tiny()
        raw = (model.folder / "model.safetensors").read_bytes()
        (model.folder / "model.safetensors").write_bytes(raw[:-7])
        self.error("quantize", model.folder, self.folder / "out", status=BAD_DATA, says="model.safetensors")
        (model.folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {k: "model-00001-of-00001.safetensors" for k in model.tensors}}
        (model.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.error("quantize", model.folder, self.folder / "out", status=BAD_DATA, says="model-00001-of-00001.safetensors")
        (model.folder / "model-00001-of-00001.safetensors").mkdir()
        self.error("quantize", model.folder, self.folder / "out", status=BAD_DATA, says="model-00001-of-00001.safetensors")
        self.assertFalse((self.folder / "out").exists())

    # ---- the whole model ----

    @unittest.skipUnless(os.environ.get("MOE4_BF16_MODEL"), "MOE4_BF16_MODEL does not name the unquantized model")
    def test_whole_model(self):
        """All of the bundled model's weights, but for the layers whose gate and up have scales of their own there."""
        made = raw_tensors(self.quantize(pathlib.Path(os.environ["MOE4_BF16_MODEL"]), "out") / "model.safetensors")[0]
        bundled = raw_tensors(MODEL / "model.safetensors")[0]
        self.assertEqual({k for k in bundled if not k.endswith("input_scale")}, {*made})
        n_same = 0
        for name, tensor in made.items():
            own = name.startswith(("model.layers.2.mlp.experts.", "model.layers.4.mlp.experts.")) and "down_proj" not in name
            if not own:
                self.assertEqual(tensor, bundled[name], name)
                n_same += 1
        self.assertGreater(n_same, 1100)


if __name__ == "__main__":
    unittest.main(verbosity=2)
