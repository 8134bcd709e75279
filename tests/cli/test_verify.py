"""moe4 verify: problems on standard output, exit status 1; what cannot be opened is an error."""
import shutil
import unittest

import tensors
from cli_case import BAD_DATA, GOLDEN, MODEL, CliCase


class Verify(CliCase):
    def test_bundled_model(self):
        self.assertRegex(self.moe4("verify", MODEL).stdout, r"\A[^\n]*: 2113 tensors in 1 file, 10.5 MB, [\d.]+ s: 0 problems\n\Z")
        said = self.json("verify", MODEL)
        self.assertEqual((said["n_problems"], said["problems"], said["tensors"]), (0, [], 2113))

    def test_single_file(self):
        self.assertIn("0 problems", self.moe4("verify", GOLDEN).stdout)

    def incomplete(self):
        model = tensors.TinyModel(self.folder / "tiny")
        del model.tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        gate = model.tensors["model.layers.1.mlp.gate.weight"]
        gate[2][5] = float("nan")
        tensors.write(model.folder / "model.safetensors", model.tensors)
        return model.folder

    def test_problems(self):
        folder = self.incomplete()
        done = self.moe4("verify", folder, status=BAD_DATA)
        self.assertEqual(done.stderr, "")
        lines = done.stdout.splitlines()
        self.assertIn("model.layers.1.mlp.experts.3.up_proj: missing: config.json promises it", lines)
        self.assertIn("model.layers.1.mlp.gate.weight: 1 of 128 values NaN or infinite, the first 0x7fc0 at row 0 column 5", lines)
        self.assertIn("model.layers.0.self_attn.q_norm.weight: missing: config.json promises it", lines)
        self.assertTrue(lines[-1].endswith(f": {len(lines) - 1} problems"))
        said = self.json("verify", folder, status=BAD_DATA)
        self.assertEqual(said["n_problems"], len(said["problems"]))
        self.assertEqual([f"{p['name']}: {p['problem']}" for p in said["problems"]], lines[:-1])

    def test_every_malformed_shard_is_told(self):
        folder = self.folder / "shards"
        folder.mkdir()
        tensors.write(folder / "a.safetensors", {"a": ("F32", [1], [1.0])})
        for name in ("b", "c"):
            (folder / f"{name}.safetensors").write_bytes(b"\x20" + bytes(7) + b"{")
        done = self.moe4("verify", folder, status=BAD_DATA)
        self.assertEqual(done.stdout, "")
        self.assertIn("b.safetensors: header of 32 bytes, but 1 are left in the file (and 1 more)", done.stderr)
        self.assertIn("moe4: c.safetensors: header of 32 bytes, but 1 are left in the file\n", done.stderr)
        self.assertEqual(self.json("verify", folder, status=BAD_DATA)["n_problems"], 1)

    def test_truncated(self):
        folder = self.folder / "cut"
        shutil.copytree(MODEL, folder)
        with open(folder / "model.safetensors", "r+b") as f:
            f.truncate(5_000_000)
        self.error("verify", folder, status=BAD_DATA, says=["model.safetensors", "4761744 bytes of data"])

    def test_nothing_there(self):
        self.error("verify", self.folder / "none", status=BAD_DATA, says="no such file or folder")
        self.error("verify", self.folder, status=BAD_DATA, says="no .safetensors file")


if __name__ == "__main__":
    unittest.main(verbosity=2)
