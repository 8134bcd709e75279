"""moe4 run as a user types it: the bundled model against its goldens, a tiny bf16 model against plain Python, and what is refused."""
import json
import math
import os
import resource
import signal
import subprocess
import unittest

import tensors
from cli_case import BAD_DATA, BAD_USAGE, GOLDEN, MODEL, PROGRAM, CliCase

X3 = f"{GOLDEN}:tale.layer3.x"
MODES = {"w4a16": "1e-4", "static": "5e-4", "tensor": "5e-4", "token": "5e-4"}


class Bundled(CliCase):
    """The NVFP4 model."""

    def run_layer(self, *args, layer=3, **kwargs):
        return self.json("run", MODEL, "--layer", layer, "--input", f"{GOLDEN}:tale.layer{layer}.x", *args, **kwargs)

    def test_modes_against_goldens(self):
        for layer in (1, 2, 3):
            for mode, tolerance in MODES.items():
                with self.subTest(layer=layer, mode=mode):
                    check = f"{GOLDEN}:tale.layer{layer}.y_{mode}"
                    result = self.run_layer("--act", mode, "--output-dtype", "f32", "--check", check, "--tol", tolerance, layer=layer)
                    self.assertTrue(result["check"]["passed"])
                    self.assertLess(result["check"]["relative_l2"], float(tolerance))
                    self.assertGreater(result["check"]["cosine"], 0.999999)

    def test_facts_in_json(self):
        result = self.run_layer("--threads", 2, "--isa", "scalar", "--act", "static", layer=1)
        golden = tensors.read(GOLDEN)
        ids = golden["tale.layer1.topk_idx"][2]
        counts = [list(ids).count(e) for e in set(ids)]
        self.assertEqual(result["saturated_blocks"], golden["tale.layer1.saturated_static"][2][0])
        self.assertEqual(result["saturated_blocks"], 1)
        self.assertEqual((result["tokens"], result["slots"], result["experts_hit"]), (256, 256 * 6, len(counts)))
        self.assertEqual((result["least_tokens_of_an_expert"], result["most_tokens_of_an_expert"]), (min(counts), max(counts)))
        self.assertEqual(result["weight_bytes"], len(counts) * 3 * 128 * 256 * 9 // 16)
        self.assertEqual((result["isa"], result["threads"], result["act"], result["kind"]), ("scalar", 2, "static", "moe"))
        self.assertEqual((result["device"], result["kernels"]), ("cpu", "fp32, scalar"))
        self.assertEqual((result["nonfinite_rows"], result["check"], result["output"]), (0, None, None))
        stages = [s for name, s in result["seconds"].items() if name not in ("load", "route", "forward")]
        self.assertEqual(len(stages), 6)
        self.assertLessEqual(sum(stages), 1.1 * result["seconds"]["forward"] + 1e-3)

    def test_table(self):
        text = self.moe4("run", MODEL, "--layer", 3, "--input", X3, "--check", f"{GOLDEN}:tale.layer3.y_token").stdout
        for part in ("tokens        256\n", "slots         1536 of 1536 ran\n", "of 32,", "GB/s", "saturated", "non-finite    0 rows", ": passed\n"):
            self.assertIn(part, text)

    def test_output(self):
        out = self.folder / "out.safetensors"
        result = self.run_layer("--output", out)
        self.assertEqual(result["output"], str(out))
        written, golden = tensors.read(out), tensors.read(GOLDEN)
        self.assertEqual({n: t[:2] for n, t in written.items()},
                         {"y": ("BF16", [256, 256]), "topk_idx": ("I32", [256, 6]), "topk_weight": ("F32", [256, 6])})  # fmt: skip
        self.assertEqual(written["topk_idx"][2], golden["tale.layer3.topk_idx"][2])
        self.assertLess(tensors.relative_l2(written["topk_weight"][2], golden["tale.layer3.topk_weight"][2]), 1e-6)
        self.assertLess(tensors.relative_l2(written["y"][2], golden["tale.layer3.y_token"][2]), 2e-3)
        self.assertEqual(os.listdir(self.folder), ["out.safetensors"])
        self.run_layer("--repeat", 3, "--check", f"{out}:y", "--tol", "0")  # what was written reads back as the same bits

    def test_cache(self):
        """Packed weights are kept in a folder; the second run finds them, and says so when they are damaged."""
        outputs = [self.folder / f"y{i}" for i in range(3)]
        cache = self.folder / "cache"
        self.error("run", MODEL, "--layer", 3, "--input", X3, "--cache", cache, status=BAD_DATA, says=str(cache))
        cache.mkdir()
        for output in outputs[:2]:
            self.run_layer("--cache", cache, "--output", output)
        files = list(cache.iterdir())
        if not files:
            self.skipTest("this CPU's kernels read weights in place")
        self.assertEqual(len(files), 1)
        damaged = bytearray(files[0].read_bytes())
        damaged[-1] ^= 1
        files[0].write_bytes(damaged)
        done = subprocess.run([PROGRAM, "run", MODEL, "--layer", "3", "--input", X3, "--cache", cache, "--output", outputs[2]],
                              capture_output=True, text=True)  # fmt: skip
        self.assertEqual(done.returncode, 0)
        self.assertIn("packing again", done.stderr)
        self.assertEqual(len({o.read_bytes() for o in outputs}), 1)

    def test_threads_do_not_change_bits(self):
        files = []
        for n in (1, 2, 3):
            files.append(self.folder / f"{n}.safetensors")
            self.run_layer("--threads", n, "--output", files[-1], "--output-dtype", "f32", "--shared")
        self.assertEqual(files[0].read_bytes(), files[1].read_bytes())
        self.assertEqual(files[0].read_bytes(), files[2].read_bytes())

    def test_shared_expert_is_added(self):
        golden = tensors.read(GOLDEN)
        for mode, tolerance in MODES.items():
            with self.subTest(mode):
                a, b = self.folder / "a.safetensors", self.folder / "b.safetensors"
                self.run_layer("--act", mode, "--output-dtype", "f32", "--output", a)
                self.assertTrue(self.run_layer("--act", mode, "--output-dtype", "f32", "--output", b, "--shared")["shared"])
                wanted = golden[f"tale.layer3.shared_{mode}"][2]
                difference = [with_it - without for with_it, without in zip(tensors.read(b)["y"][2], tensors.read(a)["y"][2])]
                self.assertLess(tensors.relative_l2(difference[: len(wanted)], wanted), float(tolerance))

    def test_routing_from_a_file(self):
        golden, routing = tensors.read(GOLDEN), self.folder / "routing.safetensors"
        _, shape, ids = golden["tale.layer3.topk_idx"]
        weights = golden["tale.layer3.topk_weight"]
        for dtype in ("I32", "I64"):
            with self.subTest(dtype):
                tensors.write(routing, {"topk_idx": (dtype, shape, list(ids)), "topk_weight": weights})
                result = self.run_layer("--routing", routing, "--output-dtype", "f32", "--check", f"{GOLDEN}:tale.layer3.y_token", "--tol", "5e-4")
                self.assertIsNone(result["seconds"]["route"])
        # another k than the model's; slots that are no expert's are skipped, a token without any is all zeros
        out = self.folder / "out.safetensors"
        tensors.write(routing, {"topk_idx": ("I64", [256, 2], [7, -1] * 255 + [32, -(2**62)]), "topk_weight": ("F32", [256, 2], [0.5] * 512)})
        result = self.run_layer("--routing", routing, "--output", out)
        self.assertEqual((result["slots"], result["experts_hit"]), (255, 1))
        written = tensors.read(out)
        self.assertEqual(written["topk_idx"][:2], ("I64", [256, 2]))
        self.assertEqual(list(written["y"][2][-256:]), [0.0] * 256)
        self.assertTrue(any(written["y"][2][-512:-256]))

    def test_wrong_routing(self):
        routing, weights = self.folder / "routing.safetensors", ("F32", [256, 6], [0.1] * 1536)
        for says, contents in (
            ('no tensor "topk_idx" (it has: topk_weight)', {"topk_weight": weights}),
            ('no tensor "topk_weight"', {"topk_idx": ("I32", [256, 6], [0] * 1536)}),
            ("topk_idx: is F32, need I32 or I64", {"topk_idx": weights, "topk_weight": weights}),
            ("topk_weight: is I32, need F32", {"topk_idx": ("I32", [256, 6], [0] * 1536), "topk_weight": ("I32", [256, 6], [0] * 1536)}),
            ("topk_idx: is [255, 6], need [256, 6]", {"topk_idx": ("I32", [255, 6], [0] * 1530), "topk_weight": weights}),
            ("topk_weight: is [256, 6], need [256, 5]", {"topk_idx": ("I32", [256, 5], [0] * 1280), "topk_weight": weights}),
            ("topk_idx: is [256, 0], need [256, 6]", {"topk_idx": ("I32", [256, 0], []), "topk_weight": ("F32", [256, 0], [])}),
        ):
            with self.subTest(says):
                tensors.write(routing, contents)
                self.error("run", MODEL, "--layer", 3, "--input", X3, "--routing", routing, status=BAD_DATA, says=[str(routing), says])

    def test_failed_check(self):
        arguments = ["run", MODEL, "--layer", 3, "--input", X3, "--check", f"{GOLDEN}:tale.layer3.y_w4a16"]
        done = self.moe4(*arguments, status=BAD_DATA)
        self.assertIn("FAILED", done.stdout)
        self.assertRegex(done.stderr, r"\Amoe4: .*y_w4a16: relative L2 0\.\d+, above 0\.002\n\Z")
        result = self.json(*arguments, status=BAD_DATA)
        self.assertFalse(result["check"]["passed"])
        self.json(*arguments, "--tol", "0.5")

    def test_nothing_is_near_zeros(self):
        zeros = self.folder / "zeros.safetensors"
        tensors.write(zeros, {"y": ("F32", [256, 256], [0] * 65536)})
        check = self.json("run", MODEL, "--layer", 3, "--input", X3, "--check", f"{zeros}:y", "--tol", "1e9", status=BAD_DATA)["check"]
        self.assertEqual((check["passed"], check["relative_l2"]), (False, None))
        self.assertGreater(check["largest"], 0)

    def test_wrong_check(self):
        other = self.folder / "other.safetensors"
        tensors.write(other, {"y": ("F32", [2, 256], [0] * 512), "i": ("I32", [256, 256], [0] * 65536)})
        arguments = ["run", MODEL, "--layer", 3, "--input", X3]
        self.error(*arguments, "--check", f"{other}:y", status=BAD_DATA, says=["[2, 256]", "[256, 256]"])
        self.error(*arguments, "--check", f"{other}:i", status=BAD_DATA, says="i: is I32")
        self.error(*arguments, "--check", f"{other}:z", status=BAD_DATA, says='no tensor "z" (it has: y, i)')
        self.error(*arguments, "--check", other, status=BAD_USAGE, says="FILE:TENSOR")
        self.error(*arguments, "--tol", "1", status=BAD_USAGE, says="--check")

    def test_nonfinite_row(self):
        x = self.folder / "x.safetensors"
        values = [0.5] * 256 + [0.25] * 255 + [math.nan] + [0.125] * 256
        tensors.write(x, {"x": ("F32", [3, 256], values)})
        out = self.folder / "out.safetensors"
        result = self.json("run", MODEL, "--layer", 0, "--input", x, "--output", out)
        y = tensors.read(out)["y"][2]
        self.assertEqual((result["nonfinite_rows"], result["tokens"]), (1, 3))
        self.assertTrue(all(math.isnan(v) for v in y[256:512]))
        self.assertTrue(all(math.isfinite(v) for v in y[:256] + y[512:]))
        check = self.json("run", MODEL, "--layer", 0, "--input", x, "--check", f"{out}:y", status=BAD_DATA)["check"]
        self.assertEqual((check["passed"], check["largest"], check["relative_l2"]), (False, None, None))  # NaN never passes

    def test_no_tokens(self):
        x, out = self.folder / "x.safetensors", self.folder / "out.safetensors"
        tensors.write(x, {"x": ("BF16", [0, 256], b"")})
        for layer in (0, 3):
            with self.subTest(layer=layer):
                self.assertEqual(self.json("run", MODEL, "--layer", layer, "--input", x, "--output", out)["tokens"], 0)
                self.assertEqual(tensors.read(out)["y"][1], [0, 256])

    def test_dense_layer(self):
        out = self.folder / "out.safetensors"
        for mode in MODES:
            with self.subTest(mode):
                result = self.json("run", MODEL, "--layer", 0, "--input", X3, "--act", mode, "--output", out)
                self.assertEqual((result["kind"], result["slots"], result["experts_hit"]), ("dense", 256, 1))
                self.assertEqual(list(tensors.read(out)), ["y"])
        self.assertIn("dense", self.moe4("run", MODEL, "--layer", 0, "--input", X3).stdout)
        self.error("run", MODEL, "--layer", 0, "--input", X3, "--shared", status=BAD_USAGE, says="layer 0 is dense")
        self.error("run", MODEL, "--layer", 0, "--input", X3, "--routing", GOLDEN, status=BAD_USAGE, says="layer 0 is dense")

    def test_wrong_usage(self):
        self.error("run", MODEL, "--input", X3, status=BAD_USAGE, says="--layer is missing")
        self.error("run", MODEL, "--layer", 3, status=BAD_USAGE, says="--input is missing")
        self.error("run", MODEL, "--layer", 3, "--input", X3, "--repeat", 0, status=BAD_USAGE, says="--repeat")
        self.error("run", MODEL, "--layer", 6, "--input", X3, status=BAD_USAGE, says=["moe4: --layer: 6", "6 layers"])
        self.error("run", MODEL, "--layer", 3, "--input", X3, "--act", "fp8", status=BAD_USAGE, says='"fp8"')
        self.error("run", MODEL, "--layer", 3, "--input", X3, "--act", "bf16", status=BAD_USAGE, says="bf16")
        self.error("run", MODEL, "--layer", 3, "--input", X3, "--output-dtype", "f64", status=BAD_USAGE, says='"f64"')
        self.error("run", MODEL, "--layer", 3, "--input", X3, "--device", "tpu:0", status=BAD_USAGE, says=["tpu:0", "cuda:N"])

    def test_wrong_input(self):
        x = self.folder / "x.safetensors"
        for says, contents in (
            ('no tensor "x" (it has: y)', {"y": ("F32", [1, 256], [0] * 256)}),
            ("x: is [2, 128], need [T, 256]", {"x": ("F32", [2, 128], [0] * 256)}),
            ("x: has 1 dimensions, need 2", {"x": ("F32", [256], [0] * 256)}),
            ("x: has 3 dimensions, need 2", {"x": ("F32", [1, 1, 256], [0] * 256)}),
            ("x: is F64, need BF16 or F16 or F32", {"x": ("F64", [1, 256], [0] * 256)}),
        ):
            with self.subTest(says):
                tensors.write(x, contents)
                self.error("run", MODEL, "--layer", 3, "--input", x, status=BAD_DATA, says=[str(x), says])
        self.assertIn("more", self.error("run", MODEL, "--layer", 3, "--input", f"{MODEL}:x", status=BAD_DATA))  # 2113 names, cut short

    def test_malformed_and_missing_files(self):
        x = self.folder / "x.safetensors"
        tensors.write(x, {"x": ("F32", [1, 256], [0] * 256)})
        whole = x.read_bytes()
        for n in (0, 7, 8, 40, len(whole) - 1):
            with self.subTest(bytes=n):
                x.write_bytes(whole[:n])
                self.error("run", MODEL, "--layer", 3, "--input", x, status=BAD_DATA, says="x.safetensors")
        self.error("run", MODEL, "--layer", 3, "--input", self.folder / "none", status=BAD_DATA, says="none")
        self.error("run", self.folder / "none", "--layer", 3, "--input", X3, status=BAD_DATA, says="none")
        self.error("run", self.folder, "--layer", 3, "--input", X3, status=BAD_DATA, says=str(self.folder))

    def test_unwritable_output(self):
        arguments = ["run", MODEL, "--layer", 3, "--input", X3, "--output"]
        self.error(*arguments, self.folder / "no" / "out", status=BAD_DATA, says="No such file or directory")
        self.error(*arguments, self.folder, status=BAD_DATA, says="Is a directory")
        self.error(*arguments, "/dev/full", status=BAD_DATA, says="moe4: /dev/full: No space left on device")
        self.moe4(*arguments, "/dev/null")

    def test_disk_full_half_way(self):
        def limit():  # 64 KiB a file, and an error rather than a signal beyond
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

        out = self.folder / "out.safetensors"
        arguments = ["run", MODEL, "--layer", 3, "--input", X3, "--output", out]
        self.error(*arguments, status=BAD_DATA, says=f"moe4: {out}: File too large", preexec_fn=limit)
        self.assertEqual(os.listdir(self.folder), [])
        out.write_bytes(b"before")
        self.error(*arguments, status=BAD_DATA, preexec_fn=limit)
        self.assertEqual(out.read_bytes(), b"before")
        self.assertEqual(os.listdir(self.folder), ["out.safetensors"])

    def test_colons_in_names(self):
        x = self.folder / "a:b"
        tensors.write(x, {"x": ("F32", [1, 256], [0.5] * 256), "z": ("F32", [1, 256], [0.5] * 256)})
        self.json("run", MODEL, "--layer", 0, "--input", x)
        self.json("run", MODEL, "--layer", 0, "--input", f"{x}:z")

    def test_names_that_are_not_utf8(self):
        name = os.fsencode(self.folder) + b"/\xff.safetensors"
        arguments = [PROGRAM, "run", MODEL, "--layer", "0", "--input", X3, "--json", "--output", name]
        done = subprocess.run(arguments, capture_output=True, check=True)
        self.assertTrue(json.loads(done.stdout)["output"].endswith("/?.safetensors"))
        self.assertTrue(os.path.exists(name))


class Tiny(CliCase):
    """An unquantized model of another family, against the same sums in Python."""

    def setUp(self):
        super().setUp()
        self.model = tensors.TinyModel(self.folder / "tiny")
        self.x = self.folder / "x.safetensors"
        self.values = self.model.numbers(5 * 32)
        tensors.write(self.x, {d: (d, [5, 32], self.values) for d in ("F32", "BF16", "F16")})

    def matvec(self, name, x):
        _, (n, k), w = self.model.tensors[name + ".weight"]
        return [sum(w[i * k + j] * x[j] for j in range(k)) for i in range(n)]

    def mlp(self, module, x):
        gate, up = self.matvec(module + ".gate_proj", x), self.matvec(module + ".up_proj", x)
        return self.matvec(module + ".down_proj", [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up)])

    def rows(self):
        return [self.values[32 * t : 32 * t + 32] for t in range(5)]

    def moe(self, x):
        logits = self.matvec("model.layers.1.mlp.gate", x)
        best = sorted(range(4), key=lambda e: (-logits[e], e))[:2]
        total = sum(math.exp(logits[e]) for e in best)
        outs = [(math.exp(logits[e]) / total, self.mlp(f"model.layers.1.mlp.experts.{e}", x)) for e in best]
        return [sum(w * out[j] for w, out in outs) for j in range(32)]

    def test_layers_in_every_input_dtype(self):
        wanted = self.folder / "wanted.safetensors"
        tensors.write(wanted, {"dense": ("F64", [5, 32], sum((self.mlp("model.layers.0.mlp", x) for x in self.rows()), [])),
                               "moe": ("F64", [5, 32], sum((self.moe(x) for x in self.rows()), []))})  # fmt: skip
        for layer, name in ((0, "dense"), (1, "moe")):
            for dtype in ("F32", "BF16", "F16"):
                with self.subTest(layer=name, x=dtype):
                    result = self.json("run", self.model.folder, "--layer", layer, "--input", f"{self.x}:{dtype}", "--output-dtype", "f32",
                                       "--check", f"{wanted}:{name}", "--tol", "1e-5")  # fmt: skip
                    self.assertEqual(result["act"], "bf16")

    def test_refused(self):
        arguments = ["run", self.model.folder, "--input", f"{self.x}:F32", "--layer"]
        self.error(*arguments, 1, "--act", "token", status=BAD_USAGE, says="token")
        self.error(*arguments, 1, "--shared", status=BAD_USAGE, says="shared")

    def test_broken_model(self):
        arguments = ["run", self.model.folder, "--input", f"{self.x}:F32", "--layer", 1]
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        whole = self.model.tensors[name]
        file = self.model.folder / "model.safetensors"
        tensors.write(file, {n: t for n, t in self.model.tensors.items() if n != name})
        self.error(*arguments, status=BAD_DATA, says="expert")
        tensors.write(file, dict(self.model.tensors, **{name: ("BF16", (16, 32), whole[2])}))
        self.error(*arguments, status=BAD_DATA, says=["16", "32"])
        tensors.write(file, self.model.tensors)
        config = dict(self.model.config(), architectures=["MysteryForCausalLM"], model_type="mystery")
        (self.model.folder / "config.json").write_text(json.dumps(config))
        self.error(*arguments, status=BAD_DATA, says=["nsupported", "mystery"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
