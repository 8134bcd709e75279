"""moe4 quantize: the bytes, the layout, and that no moment of being stopped leaves something wrong."""
import array
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import subprocess
import time
import unittest

import tensors
from cli_case import BAD_DATA, BAD_USAGE, MODEL, PROGRAM, ROOT, CliCase

EXPERTS = ROOT / "tests" / "vectors" / "bf16-experts.safetensors"  # four of layer 2's, as the bundled model had them before
TINY = ROOT / "tests" / "vectors" / "hf-qwen3-moe"
TINY_IDS = f"{TINY}-logits.safetensors"
JOURNAL, CALIBRATION = "moe4-quantize.json", ".moe4-calibration"
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E4M3 = [(b & 7) * 2.0**-9 if b < 8 else (8 + (b & 7)) * 2.0 ** ((b >> 3) - 10) for b in range(127)]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def raw_tensors(path):
    """{name: (dtype, shape, bytes)} and the metadata."""
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    metadata = header.pop("__metadata__", None)
    return {k: (t["dtype"], t["shape"], raw[8 + n :][slice(*t["data_offsets"])]) for k, t in header.items()}, metadata


def number(tensor):
    return struct.unpack("<f", tensor[2])[0]


def decoded(out, module):
    (codes, scales), g = (out[f"{module}.{s}"][2] for s in ("weight", "weight_scale")), number(out[f"{module}.weight_scale_2"])
    values = []
    for i, byte in enumerate(codes):
        for code in (byte & 15, byte >> 4):
            values.append(E2M1[code & 7] * (-1 if code & 8 else 1) * E4M3[scales[i // 8]] * g)
    return values


class Quantize(CliCase):
    def quantize(self, model, name, *args, **kwargs):
        out = self.folder / name
        self.moe4("quantize", model, out, *args, **kwargs)
        return out

    def tiny(self, **tensors_too):
        model = tensors.TinyModel(self.folder / "tiny")
        model.tensors.update(tensors_too)
        tensors.write(model.folder / "model.safetensors", model.tensors)
        return model

    def experts(self):
        """A model that is nothing but four trained experts."""
        folder = self.folder / "experts"
        folder.mkdir()
        shutil.copy(EXPERTS, folder / "model.safetensors")
        config = json.loads((MODEL / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        return folder

    def assert_same(self, made, wanted, why=None):
        """Not assertEqual: it would take minutes to say how large files differ."""
        self.assertEqual({*made}, {*wanted}, why)
        self.assertEqual([k for k in made if made[k] != wanted[k]], [], why)

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

    def test_folders_that_are_not_ours(self):
        model, out = self.tiny().folder, self.folder / "out"
        out.mkdir()
        self.moe4("quantize", model, out)  # empty is fine
        before = contents(out)
        self.error("quantize", model, out, status=BAD_USAGE, says=["not empty"])
        self.moe4("quantize", model, out, "--resume")  # it is what this task ends with
        self.error("quantize", model, out, "--resume", "--exclude", "*.up_proj", status=BAD_USAGE, says=["not empty"])
        self.error("quantize", model, model, "--resume", status=BAD_USAGE, says=["not empty"])
        self.assert_same(contents(out), before)
        (out / "config.json").write_bytes(before["config.json"] + b" ")
        self.error("quantize", model, out, "--resume", status=BAD_USAGE, says=["not empty"])

    def test_finished_with_other_options(self):
        """Folders whose names, shapes and config.json are the same, and whose bytes are not: --resume does not call them done."""
        other = self.folder / "other"
        ids = next(v for d, s, v in tensors.read(pathlib.Path(TINY_IDS)).values() if d in ("I32", "I64"))
        other.write_bytes(tensors.pack("I32", ids[:9]))
        options = {
            "plain": [], "46": ["--four-over-six"], "search": ["--search"], "static": ["--recipe", "modelopt_static"],
            "text": ["--calibrate", TINY_IDS], "other": ["--calibrate", other],
        }  # fmt: skip
        for args in options.values():
            args += ["--max-shard-size", "20K"]
        for made, asked, says in (("plain", "46", "another four-over-six: no, now yes"), ("46", "plain", "another four-over-six: yes, now no"),
                                  ("plain", "search", "another search: no, now yes"), ("search", "plain", "another search: yes, now no"),
                                  ("plain", "static", "another recipe: modelopt, now modelopt_static"), ("text", "other", "another calibration: text "),
                                  ("text", "plain", ", now none")):  # fmt: skip
            out = self.folder / made
            if not out.exists():
                self.quantize(TINY, made, *options[made])
            shards = sorted(p.name for p in out.glob("model-*"))
            self.assertGreater(len(shards), 1)
            before, times = contents(out), {p: p.stat().st_mtime_ns for p in (out, *out.iterdir())}
            self.error("quantize", TINY, out, "--resume", *options[asked], status=BAD_USAGE, says=[f"{out}/{shards[0]}: finished, with", says])
            self.assert_same(contents(out), before)
            self.assertEqual({p: p.stat().st_mtime_ns for p in (out, *out.iterdir())}, times)
            said = self.json("quantize", TINY, out, "--resume", *options[made])
            self.assertEqual(said["shards_kept"], len(shards))
            self.assert_same(contents(out), before)
        digests = {raw_tensors(next((self.folder / "text").glob("model-*")))[1]["calibration"]}
        self.quantize(TINY, "again", *options["text"])
        digests.add(raw_tensors(next((self.folder / "again").glob("model-*")))[1]["calibration"])
        self.assertEqual(len(digests), 1)
        shutil.copy(next((self.folder / "46").glob("model-00002-*")), self.folder / "plain")  # one shard of another run
        self.error("quantize", TINY, self.folder / "plain", "--resume", *options["plain"], status=BAD_USAGE, says=["model-00002-of", "another four-over-six: yes, now no"])

    def test_unfinished_work_of_another_task(self):
        model, out = self.tiny(), self.folder / "out"
        model.tensors["model.layers.0.mlp.up_proj.weight"][2][0] = float("inf")
        tensors.write(model.folder / "model.safetensors", model.tensors)
        self.error("quantize", model.folder, out, status=BAD_DATA, says="infinite")
        self.error("quantize", model.folder, out, status=BAD_USAGE, says=["unfinished work", "--resume"])
        self.error("quantize", model.folder, out, "--resume", "--four-over-six", status=BAD_USAGE, says=["another four-over-six", "no", "yes"])
        tensors.write(model.folder / "model.safetensors", model.tensors)  # another time of change
        self.error("quantize", model.folder, out, "--resume", status=BAD_USAGE, says=["another input files"])

    def test_calibration_is_kept(self):
        """A resumed run takes what the first had found, unless it is not of this task's size."""
        out, args = self.folder / "out", ["--max-shard-size", "20K", "--calibrate", TINY_IDS]
        wanted = contents(self.quantize(TINY, "whole", *args))

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))

        for damage in ("nothing", "doubled", "cut short", "another magic"):
            self.error("quantize", TINY, out, *args, status=BAD_DATA, says="File too large", preexec_fn=limit)
            record = bytearray((out / CALIBRATION).read_bytes())
            if damage in ("doubled", "another magic"):  # the first matrix's
                record[32:36] = struct.pack("<f", 2 * struct.unpack("<f", record[32:36])[0])
            record[0] ^= damage == "another magic"
            (out / CALIBRATION).write_bytes(record[:-4] if damage == "cut short" else record)
            said = self.json("quantize", TINY, out, *args, "--resume")
            self.assertGreater(said["calibration"]["tokens"], 0)
            made = contents(out)
            differ = [k for k in wanted if made[k] != wanted[k]]
            self.assertEqual({*made}, {*wanted})
            self.assertEqual(len(differ), damage == "doubled", damage)
            shutil.rmtree(out)

    def test_config_comes_last(self):
        """Stopped at config.json: all else is there, this run's journal too, and nothing of the run that made the input."""
        model, out = self.tiny(), self.folder / "out"
        (model.folder / "config.json").write_text(json.dumps(model.config() | {"long": "x" * 40000}))
        (model.folder / "tokenizer.json").write_text("{}")
        for name in (CALIBRATION, ".moe4-quantize.tmp", JOURNAL):
            (model.folder / name).write_text("of the input")

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (30000, resource.RLIM_INFINITY))

        self.error("quantize", model.folder, out, status=BAD_DATA, says=["config.json", "File too large"], preexec_fn=limit)
        self.assertEqual(sorted(contents(out)), ["hf_quant_config.json", "model.safetensors", JOURNAL, "tokenizer.json"])
        self.assertEqual(json.loads((out / JOURNAL).read_text())["recipe"], "modelopt")
        self.moe4("quantize", model.folder, out, "--resume")
        self.assert_same(contents(out), contents(self.quantize(model.folder, "whole")))

    def test_what_is_not_ours_is_written_again(self):
        """A file of a shard's name and size that is another one: --resume does not take it for complete."""
        model, out = self.experts(), self.folder / "out"
        wanted = contents(self.quantize(model, "whole", "--max-shard-size", "60K"))
        largest = max(len(v) for v in wanted.values())

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, resource.RLIM_INFINITY))

        self.error("quantize", model, out, "--max-shard-size", "60K", status=BAD_DATA, preexec_fn=limit)
        shard = next(iter(sorted(out.glob("model-*.safetensors"))))
        shard.write_bytes(bytes(shard.stat().st_size))
        said = self.json("quantize", model, out, "--max-shard-size", "60K", "--resume")
        self.assert_same(contents(out), wanted)
        self.assertLess(said["shards_kept"], said["shards"])

    def test_cut_short_while_it_is_read(self):
        """The input loses its second half in the middle of the run."""
        model, out = self.folder / "large", self.folder / "out"
        model.mkdir()
        shutil.copy(TINY / "config.json", model)
        rows, path = 8192, model / "model.safetensors"
        tensors.write(path, {"model.layers.0.self_attn.q_proj.weight": ("F32", [0, 0], b"")})
        header = {f"model.layers.{i}.self_attn.q_proj.weight": {"dtype": "F32", "shape": [rows, rows], "data_offsets": [i * rows**2 * 4, (i + 1) * rows**2 * 4]}
                  for i in range(2)}  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        for attempt in range(20):
            os.truncate(path, 8 + len(text) + 2 * rows**2 * 4)  # zeros that take no room
            running = subprocess.Popen([PROGRAM, "quantize", model, out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while not (out / JOURNAL).exists() and running.poll() is None:
                time.sleep(0.0005)
            running.send_signal(signal.SIGSTOP)
            os.truncate(path, 8 + len(text) + rows**2 * 4)
            running.send_signal(signal.SIGCONT)
            says = running.communicate()[1]
            if running.returncode == 0:  # stopped too late
                shutil.rmtree(out)
                continue
            self.assertEqual(running.returncode, BAD_DATA, says)
            self.assertRegex(says, r"q_proj.weight: model.safetensors: was cut short: it ends at byte \d+ or before, \d+ more are needed")
            self.assertEqual(sorted(contents(out)), [JOURNAL])
            return
        self.fail("never stopped in time")

    @unittest.skipUnless(shutil.which("unshare"), "no unshare: a small disk cannot be mounted")
    def test_small_disk(self):
        """A tmpfs that holds all but the last shard: the error has both numbers, and a larger disk goes on with what is there."""
        model, out = self.experts(), self.folder / "disk" / "out"
        wanted = contents(self.quantize(model, "whole", "--max-shard-size", "60K"))
        size = sum(len(v) for v in wanted.values()) // 4096 * 4096 - 40960
        out.parent.mkdir()
        copy = self.folder / "copy"
        script = """mount -t tmpfs -o size=$1 none "$2" || exit 77
            shift; disk=$1; copy=$2; shift 2
            "$@"; status=$?
            cp -r "$disk/out" "$copy"; exit $status"""
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", str(size), out.parent, copy, PROGRAM, "quantize", model, out,
                               "--max-shard-size", "60K"], capture_output=True, text=True)  # fmt: skip
        if done.returncode == 77 or "unshare" in done.stderr:
            self.skipTest(f"tmpfs cannot be mounted: {done.stderr.strip()}")
        self.assertEqual(done.returncode, BAD_DATA, done.stderr)
        self.assertRegex(done.stderr, r"/out/model-\d+-of-\d+.safetensors: \d+ bytes: No space left on device: \d+ bytes are free")
        self.assertGreater(len(contents(copy)), 2)
        for name, data in contents(copy).items():
            self.assertTrue(name == JOURNAL or wanted[name] == data, name)
        self.moe4("quantize", model, copy, "--max-shard-size", "60K", "--resume")
        self.assert_same(contents(copy), wanted)

    def test_full_disk(self):
        model, out = self.experts(), self.folder / "out"
        wanted = contents(self.quantize(model, "whole", "--max-shard-size", "60K"))
        largest = max(len(v) for v in wanted.values())

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, resource.RLIM_INFINITY))

        says = self.error("quantize", model, out, "--max-shard-size", "60K", status=BAD_DATA, preexec_fn=limit)
        self.assertRegex(says, r"/out/model-0000\d-of-0000\d.safetensors: .*File too large")
        for name, data in contents(out).items():
            self.assertTrue(name == JOURNAL or wanted[name] == data, name)
        self.moe4("quantize", model, out, "--max-shard-size", "60K", "--resume")
        self.assert_same(contents(out), wanted)

    def test_killed_at_any_moment(self):
        self.kill_and_resume(self.experts(), "--max-shard-size", "20K")

    def test_killed_while_calibrating(self):
        self.kill_and_resume(TINY, "--max-shard-size", "20K", "--calibrate", TINY_IDS, "--search")

    def kill_and_resume(self, model, *args):
        start = time.monotonic()
        wanted = contents(self.quantize(model, "whole", *args))
        seconds = time.monotonic() - start
        n_times, n_killed = int(os.environ.get("MOE4_KILLS", 6)), 0
        rng = random.Random(time.time_ns())
        for i in range(n_times):
            out = self.folder / f"out{i}"
            running = subprocess.Popen([PROGRAM, "quantize", model, out, *args], stdout=subprocess.DEVNULL)
            time.sleep(rng.uniform(0, seconds))
            running.kill()
            n_killed += running.wait() != 0
            for name, data in contents(out).items() if out.exists() else ():
                if name != JOURNAL and not name.startswith(".moe4-"):
                    self.assertEqual(data, wanted[name], name)
            self.moe4("quantize", model, out, *args, "--resume")
            self.assert_same(contents(out), wanted)
            shutil.rmtree(out)
        self.assertGreater(n_killed, 0)

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
