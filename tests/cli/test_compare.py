"""moe4 compare: errors, orders and counts against the same sums in Python."""
import json
import math
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import time
import unittest

import tensors
from cli_case import BAD_DATA, BAD_USAGE, MODEL, PROGRAM, CliCase


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
        large = "model.layers.0.mlp.gate_proj"  # more rows than are read at once
        for suffix in ("weight", "weight_scale"):
            raw[8 + n + header[f"{large}.{suffix}"]["data_offsets"][1] - 1] ^= 1
        (other / "model.safetensors").write_bytes(raw)
        said = self.json("compare", other, MODEL, "--layer", 3)
        first, second = said["matrices"][:2]
        self.assertEqual((first["name"], first["codes_differing"], first["scales_differing"]), (module, 3, 1))
        self.assertGreater(first["relative_error"], 0)
        self.assertEqual((second["codes_differing"], second["scales_differing"], second["relative_error"]), (0, 0, 0))
        first = self.json("compare", other, MODEL, "--layer", 0)["matrices"][0]
        self.assertEqual((first["name"], first["codes_differing"], first["scales_differing"]), (large, 1, 1))
        text = self.moe4("compare", other, MODEL, "--limit", 2).stdout.splitlines()
        self.assertEqual((len(text), text[1].split()[0], text[3].split()[:2]), (6, module, ["and", "527"]))

    def test_single_files(self):
        a, b = self.pair()
        files, folders = (self.json("compare", x, y) for x, y in ((a / "model.safetensors", b / "model.safetensors"), (a, b)))
        self.assertEqual((files["matrices"], files["others_same"]), (folders["matrices"], folders["others_same"]))

    def test_fp8(self):
        """Block-scaled, by row and with one scale, in more rows than are read at once: the values they stand for."""
        e4m3 = [(b & 7) * 2.0**-9 if b < 8 else (8 + (b & 7)) * 2.0 ** ((b >> 3) - 10) for b in range(127)]
        rows, cols = 300, 416
        codes = [(i * 37 % 127) | (i % 3 == 0) << 7 for i in range(rows * cols)]
        for shape, block_rows, block_cols in (((3, 4), 128, 128), ((rows, 1), 1, cols), ((), rows, cols)):
            n_cols = -(-cols // block_cols)
            scales = [0.5 + i % 7 for i in range(n_cols * -(-rows // block_rows))]
            values = [e4m3[c & 127] * (-1 if c & 128 else 1) * scales[i // cols // block_rows * n_cols + i % cols // block_cols]
                      for i, c in enumerate(codes)]  # fmt: skip
            values[200 * cols + 5] += 1.0
            suffix = "weight_scale_inv" if block_rows == 128 else "weight_scale"
            tensors.write(self.folder / "fp8.safetensors", {"x.weight": ("F8_E4M3", [rows, cols], codes), f"x.{suffix}": ("F32", list(shape), scales)})
            tensors.write(self.folder / "wide.safetensors", {"x.weight": ("F32", [rows, cols], values)})
            (only,) = self.json("compare", self.folder / "fp8.safetensors", self.folder / "wide.safetensors")["matrices"]
            self.assertAlmostEqual(only["relative_error"] * math.sqrt(sum(v * v for v in values)), 1, places=6)

    def test_bad_scale(self):
        """A scale that is NaN, past the rows that are read at once: the matrix and where to look."""
        rows = 4000
        parts = {"x.weight": ("U8", [rows, 32], [0] * rows * 32), "x.weight_scale": ("F8_E4M3", [rows, 4], [0x38] * (rows * 4 - 1) + [0x7F]),
                 "x.weight_scale_2": ("F32", [], [1.0])}  # fmt: skip
        tensors.write(self.folder / "a.safetensors", parts)
        says = self.error("compare", self.folder / "a.safetensors", self.folder / "a.safetensors", status=BAD_DATA, says=["x: from row ", "0x7f, a NaN"])
        start, row = (int(re.search(word + r" row (\d+)", says)[1]) for word in ("from", "scales:"))
        self.assertEqual(start + row, rows - 1)

    def test_cut_short_while_it_is_read(self):
        """One of the files loses its second half in the middle of the run: an error, not a signal."""
        rows, n = 4096, 6
        header = {f"x{i}.weight": {"dtype": "F32", "shape": [rows, rows], "data_offsets": [i * rows**2 * 4, (i + 1) * rows**2 * 4]} for i in range(n)}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        a, b = self.folder / "a.safetensors", self.folder / "b.safetensors"
        for attempt in range(20):
            for path in (a, b):
                path.write_bytes(struct.pack("<Q", len(text)) + text)
                os.truncate(path, 8 + len(text) + n * rows**2 * 4)  # zeros that take no room
            running = subprocess.Popen([PROGRAM, "compare", "--threads", "1", a, b], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while running.poll() is None and self.bytes_read(running.pid) < 10 << 20:
                time.sleep(0.0005)
            running.send_signal(signal.SIGSTOP)
            os.truncate(b, 8 + len(text) + n // 2 * rows**2 * 4)
            running.send_signal(signal.SIGCONT)
            says = running.communicate()[1]
            if running.returncode == 0:  # stopped too late
                continue
            self.assertEqual(running.returncode, BAD_DATA, says)
            self.assertRegex(says, r"x\d: b.safetensors: was cut short: it ends at byte \d+ or before, \d+ more are needed")
            return
        self.fail("never stopped in time")

    @staticmethod
    def bytes_read(pid):
        try:
            return int(pathlib.Path(f"/proc/{pid}/io").read_text().split()[1])
        except (OSError, IndexError):
            return 0

    def test_refused(self):
        a, b = self.pair()
        tensors.write(b / "model.safetensors", {"model.layers.0.mlp.up_proj.weight": ("F32", [2, 16], [0.0] * 32)})
        self.error("compare", a, b, status=BAD_DATA, says=["model.layers.0.mlp.up_proj", "16x32", "2x16"])
        self.error("compare", a, self.folder / "none", status=BAD_DATA, says="no such file")
        self.error("compare", a, status=BAD_USAGE, says="usage")
        whole = (b / "model.safetensors").read_bytes()
        (b / "model.safetensors").write_bytes(whole[:-4])
        self.error("compare", a, b, status=BAD_DATA, says=[f"{b}: model.safetensors: tensor model.layers.0.mlp.up_proj.weight: ", "128", "124"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
