"""moe4 eval and moe4 generate as a user types them."""
import shutil
import subprocess
import unittest

import tensors
from cli_case import BAD_DATA, BAD_USAGE, MODEL, PROGRAM, ROOT, CliCase

TEXT = ROOT / "models" / "tale-excerpt.txt"
TINY = ROOT / "tests" / "vectors" / "hf-qwen3-moe"  # bf16, 97 tokens that are not bytes
TINY_IDS = f"{TINY}-logits.safetensors"  # 80 of them


class Eval(CliCase):
    def eval(self, *args, **kwargs):
        return self.json("eval", MODEL, *args, **kwargs)

    def test_modes(self):
        for mode, low, high in (("w4a16", 1.5, 1.8), ("static", 1.5, 1.85), ("tensor", 1.5, 1.85), ("token", 1.5, 1.85)):
            with self.subTest(mode):
                said = self.eval("--text", TEXT, "--act", mode, "--limit", 1024)
                self.assertEqual((said["act"], said["bytes"], said["tokens"], said["bits_per_byte"]), (mode, 1024, 1024, said["bits_per_token"]))
                self.assertTrue(low < said["bits_per_byte"] < high, said["bits_per_byte"])

    def test_same_bits_whatever_the_threads_and_batches(self):
        said = {self.eval("--text", TEXT, "--limit", 600, "--window", 100, *more)["bits_per_byte"]
                for more in ([], ["--threads", 1], ["--threads", 3], ["--batch", 1], ["--batch", 5])}  # fmt: skip
        self.assertEqual(len(said), 1)

    def test_text_and_its_bytes_as_ids_are_the_same(self):
        values = list(TEXT.read_bytes()[:257])
        raw, file = self.folder / "ids", self.folder / "ids.safetensors"
        raw.write_bytes(tensors.pack("I32", values))
        said = self.eval("--text", TEXT, "--limit", 256)["bits_per_byte"]
        self.assertEqual(self.eval("--token-ids", raw)["bits_per_token"], said)
        for dtype in ("I32", "I64"):
            tensors.write(file, {"ids": (dtype, [257], values)})
            self.assertEqual(self.eval("--token-ids", file)["bits_per_token"], said)
        self.assertIsNone(self.eval("--token-ids", raw)["bits_per_byte"])

    def test_table(self):
        text = self.moe4("eval", MODEL, "--text", TEXT, "--limit", 64).stdout
        for part in ("bits per byte ", "bytes              64\n", "tokens per second ", "saturated blocks ", "token, "):
            self.assertIn(part, text)

    def test_figures_agree(self):
        said = self.eval("--text", TEXT, "--limit", 300)
        self.assertAlmostEqual(said["tokens_per_second"] * said["seconds"], 300, places=3)
        self.assertEqual(said["saturated_blocks"], 0)
        self.assertIn(f"{said['bits_per_byte']:.5f}\n", self.moe4("eval", MODEL, "--text", TEXT, "--limit", 300).stdout)

    def test_tokens_that_are_not_bytes(self):
        said = self.json("eval", TINY, "--token-ids", TINY_IDS, "--window", 64)
        self.assertEqual((said["tokens"], said["act"], said["bits_per_byte"]), (79, "bf16", None))
        self.error("eval", TINY, "--text", TEXT, status=BAD_USAGE, says=["97", "--token-ids"])
        self.error("eval", TINY, "--token-ids", TINY_IDS, "--window", 64, "--act", "token", status=BAD_USAGE, says=["token", "NVFP4"])

    def test_little_text(self):
        text = self.folder / "text"
        for contents, says in ((b"", "0 bytes: nothing to predict"), (b"x", "1 byte: nothing to predict")):
            text.write_bytes(contents)
            self.error("eval", MODEL, "--text", text, status=BAD_DATA, says=says)
        text.write_bytes(b"xy")
        self.assertEqual(self.eval("--text", text)["bytes"], 1)

    def test_incomplete_checkpoint(self):
        """An expert that no shard holds is missed before anything runs, by name."""
        shutil.copy(MODEL / "config.json", self.folder)
        raw, name = (MODEL / "model.safetensors").read_bytes(), b"model.layers.4.mlp.experts.17."
        self.assertIn(name, raw)
        (self.folder / "model.safetensors").write_bytes(raw.replace(name, name.replace(b".17.", b".97.")))
        self.error("eval", self.folder, "--text", TEXT, status=BAD_DATA, says="model.layers.4.mlp.experts.17.")
        self.error("generate", self.folder, status=BAD_DATA, says="model.layers.4.mlp.experts.17.")

    def test_wrong_usage(self):
        self.error("eval", MODEL, "--text", TEXT, "--window", 513, status=BAD_USAGE, says=["513", "512"])
        self.error("eval", MODEL, status=BAD_USAGE, says="--text FILE or --token-ids FILE")
        self.error("eval", MODEL, "--text", TEXT, "--token-ids", TEXT, status=BAD_USAGE, says="not both")
        for option in ("--window", "--batch", "--limit"):
            self.error("eval", MODEL, "--text", TEXT, option, 0, status=BAD_USAGE, says=option)
        self.error("eval", MODEL, "--text", TEXT, "--act", "fp8", status=BAD_USAGE, says='"fp8"')
        self.error("eval", MODEL, "--text", TEXT, "--act", "bf16", status=BAD_USAGE, says="bf16")

    def test_wrong_files(self):
        ids = self.folder / "ids"
        self.error("eval", self.folder / "none", "--text", TEXT, status=BAD_DATA, says="none")
        self.error("eval", MODEL, "--text", self.folder / "none", status=BAD_DATA, says=["none", "No such file"])
        self.error("eval", MODEL, "--text", self.folder, status=BAD_DATA, says="Is a directory")
        for contents, says in ((b"", "0"), (b"12345", "5 bytes"), (tensors.pack("I32", [1]), "need 2"), (tensors.pack("I32", [1, 256, 2]), "256"),
                               (tensors.pack("I32", [1, -1, 2]), "-1")):  # fmt: skip
            with self.subTest(says):
                ids.write_bytes(contents)
                self.assertIn(says, self.moe4("eval", MODEL, "--token-ids", ids, status=BAD_DATA).stderr)
        file = self.folder / "ids.safetensors"
        tensors.write(file, {"a": ("I32", [2], [1, 2]), "b": ("I32", [2], [1, 2])})
        self.error("eval", MODEL, "--token-ids", file, status=BAD_DATA, says=["2 tensors", "need 1"])


class Generate(CliCase):
    def generate(self, *args, **kwargs):
        return self.json("generate", MODEL, *args, **kwargs)

    def test_text(self):
        done = subprocess.run([PROGRAM, "generate", MODEL, "--prompt", "It was a cold", "-n", "30"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0)
        self.assertTrue(done.stdout.startswith("It was a cold"))
        self.assertEqual(len(done.stdout), len("It was a cold") + 30 + 1)
        self.assertRegex(done.stderr, r"\A30 tokens, the first after [\d.]+ ms, then [\d.]+ tokens/s: [^\n]*\n\Z")

    def test_seed_decides(self):
        ids = lambda *more: self.generate("--prompt", "The ", "-n", 40, *more)["token_ids"]
        self.assertEqual(len(ids()), 40)
        self.assertEqual(ids("--threads", 1), ids("--threads", 3))
        self.assertNotEqual(ids("--seed", 1), ids("--seed", 2))
        greedy = ids("--temperature", 0)
        self.assertEqual(greedy, ids("--temperature", 0, "--seed", 7))
        self.assertEqual(greedy, ids("--top-p", 0))

    def test_token_ids(self):
        prompt = self.folder / "prompt"
        prompt.write_bytes(tensors.pack("I32", list(b"The ")))
        said = self.generate("--token-ids", prompt, "-n", 12)
        self.assertEqual(said["token_ids"], self.generate("--prompt", "The ", "-n", 12)["token_ids"])
        self.assertIsNone(said["text"])

    def test_tokens_that_are_not_bytes(self):
        done = subprocess.run([PROGRAM, "generate", TINY, "--token-ids", TINY_IDS, "-n", "20"], capture_output=True, text=True)
        ids = [int(word) for word in done.stdout.split()]
        self.assertEqual(len(ids), 20)
        self.assertTrue(all(0 <= i < 97 for i in ids))
        self.error("generate", TINY, "--prompt", "x", status=BAD_USAGE, says=["97", "--token-ids"])

    def test_speed(self):
        said = self.generate("-n", 40)
        rate = said["tokens_per_second"] * said["weight_bytes_per_token"]
        self.assertAlmostEqual(said["share_of_floor"], rate / said["read_bytes_per_second"])
        # at least 6 of 32 experts and the shared one in 5 layers, at most the file
        least, most = 5 * 7 * 3 * 256 * 128 * 9 // 16, (MODEL / "model.safetensors").stat().st_size
        self.assertTrue(least < said["weight_bytes_per_token"] < most, said)

    def test_whole_context(self):
        self.assertEqual(len(self.generate("-n", 511)["token_ids"]), 511)
        self.error("generate", MODEL, "-n", 512, status=BAD_USAGE, says=["1 tokens and 512 more", "512"])

    def test_wrong_usage(self):
        self.error("generate", MODEL, "-n", status=BAD_USAGE, says="-n: needs an argument")
        self.error("generate", MODEL, "-n", "x", status=BAD_USAGE, says='-n: "x"')
        self.error("generate", MODEL, "-n", 0, status=BAD_USAGE, says="-n")
        self.error("generate", MODEL, "-n", 512, "--prompt", "x" * 10, status=BAD_USAGE, says=["10", "512"])
        self.error("generate", MODEL, "--prompt", "", status=BAD_USAGE, says="--prompt")
        self.error("generate", MODEL, "--top-p", 1.5, status=BAD_USAGE, says="1.5")
        self.error("generate", MODEL, "--temperature", -1, status=BAD_USAGE, says="--temperature")
        self.error("generate", MODEL, "--token-ids", self.folder / "none", status=BAD_DATA, says="none")
        self.error("generate", self.folder / "none", status=BAD_DATA, says="none")


if __name__ == "__main__":
    unittest.main(verbosity=2)
