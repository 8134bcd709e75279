"""--device: names that are none, a machine without one, and what eval and generate give on one. The latter need a GPU."""
import csv
import os
import shutil
import subprocess
import unittest

from cli_case import BAD_DATA, BAD_USAGE, GOLDEN, MODEL, PROGRAM, ROOT, CliCase

TEXT = ROOT / "models" / "tale-excerpt.txt"
COMMANDS = {
    "run": ("run", MODEL, "--layer", 3, "--input", f"{GOLDEN}:tale.layer3.x"),
    "eval": ("eval", MODEL, "--text", TEXT, "--limit", 100),
    "generate": ("generate", MODEL, "-n", 4),
    "bench": ("bench", "--shape", "256,128,8,2", "--tokens", "1", "--seconds", "0.05"),
}


def why_no_device():
    """"" where a device runs, otherwise the program's own sentence."""
    done = subprocess.run([PROGRAM, *map(str, COMMANDS["run"]), "--device", "cuda"], capture_output=True, text=True, timeout=120)
    return "" if done.returncode == 0 else done.stderr.strip() or f"status {done.returncode}"


NO_DEVICE = why_no_device()


class Names(CliCase):
    def test_no_names(self):
        for name in ("cuda:", "cuda:x", "cuda:1x", "cuda:-1", "cuda:12345", "gpu", "CUDA"):
            for command in COMMANDS.values():
                self.error(*command, "--device", name, status=BAD_USAGE, says=[f'"{name}"', "cpu, cuda or cuda:N"])

    def test_cpu_is_a_device(self):
        self.assertEqual(self.json(*COMMANDS["eval"], "--device", "cpu")["device"], "cpu")
        self.assertEqual(self.json(*COMMANDS["eval"])["device"], "cpu")

    def test_too_large_a_number(self):
        """No machine has a thousand: the sentence has both numbers, or says what is missing."""
        said = self.error(*COMMANDS["eval"], "--device", "cuda:999", status=BAD_DATA, says="cuda:999")
        self.assertRegex(said, r"shows \d+ devices?|no NVIDIA driver|the plug-in does not open")


class PlugIn(CliCase):
    def test_found_beside_the_program(self):
        """Beside it or in ../lib, whether it is called by its path or found by PATH. What lies there is no library, and its error names it."""
        bin, lib = self.folder / "bin", self.folder / "lib"
        bin.mkdir()
        lib.mkdir()
        shutil.copy(PROGRAM, bin / "moe4")
        arguments = [*map(str, COMMANDS["eval"]), "--device", "cuda"]
        path = {"PATH": f"{bin}:{os.environ['PATH']}"}
        for place in (lib, bin):
            (place / "libmoe4_cuda.so").write_text("no library")
            for call, env in (([bin / "moe4"], {}), (["moe4"], path), (["bin/moe4"], {})):
                done = subprocess.run([*call, *arguments], capture_output=True, text=True, cwd=self.folder, env=os.environ | env)
                self.assertEqual(done.returncode, BAD_DATA)
                where = "bin/libmoe4_cuda.so" if place == bin else "bin/../lib/libmoe4_cuda.so"
                self.assertRegex(done.stderr, rf'options.device "cuda": the plug-in does not open: \S*{where}: ')


class WithoutDevice(CliCase):
    @unittest.skipUnless(NO_DEVICE, "this machine has a device")
    def test_says_what_is_missing(self):
        """One line: there is no plug-in, no driver, or no device."""
        for command in COMMANDS.values():
            said = self.error(*command, "--device", "cuda:0", status=BAD_DATA, says="cuda:0")
            self.assertRegex(said, r"no NVIDIA driver on this machine|the driver shows 0 devices|the plug-in does not open: .*libmoe4_cuda\.so")


@unittest.skipIf(NO_DEVICE, NO_DEVICE)
class OnDevice(CliCase):
    def test_eval_is_the_cpus(self):
        """Over 4 KiB; the bounds of docs/hopper.md are for 256 KiB, over which differences average out."""
        for mode, near in (("w4a16", 0.002), ("static", 0.006), ("tensor", 0.006), ("token", 0.006)):
            with self.subTest(mode):
                here, there = (self.json("eval", MODEL, "--text", TEXT, "--act", mode, "--batch", 8, "--device", device)
                               for device in ("cpu", "cuda:0"))  # fmt: skip
                self.assertEqual((here["device"], there["device"]), ("cpu", "cuda:0"))
                self.assertEqual(there["bytes"], here["bytes"])
                self.assertLessEqual(abs(there["bits_per_byte"] - here["bits_per_byte"]), near)
        self.assertIn("cuda:0, the rest on ", self.moe4(*COMMANDS["eval"], "--device", "cuda").stdout)

    def test_run_says_which_kernels(self):
        here, there = (self.json(*COMMANDS["run"], "--device", device) for device in ("cpu", "cuda"))
        self.assertEqual((here["device"], there["device"]), ("cpu", "cuda:0"))
        self.assertTrue(here["kernels"] and there["kernels"] and here["kernels"] != there["kernels"], there)
        self.assertIn(f"kernels       {there['kernels']}\n", self.moe4(*COMMANDS["run"], "--device", "cuda").stdout)

    def test_batches_do_not_matter(self):
        said = {self.json("eval", MODEL, "--text", TEXT, "--limit", 600, "--window", 100, "--device", "cuda", *more)["bits_per_byte"]
                for more in ([], ["--threads", 1], ["--batch", 1], ["--batch", 5])}  # fmt: skip
        self.assertEqual(len(said), 1)

    def test_bench(self):
        """Figures that fit together, in the CPU's columns: the layer's only, which never beats its floor by much."""
        for act in ("token", "w4a16"):
            file = self.folder / f"{act}.csv"
            args = ("bench", "--shape", "512,256,16,4", "--tokens", "1,64", "--seconds", "0.2", "--act", act, "--device", "cuda")
            told = self.json(*args, "--csv", file)
            self.assertEqual((told["act"], told["isa"]), (act, "cuda:0"))
            self.assertEqual([(r["tokens"], r["what"]) for r in told["figures"]], [(1, "layer"), (64, "layer")])
            for r in told["figures"]:
                macs = 3 * r["tokens"] * 4 * 512 * 256
                self.assertAlmostEqual(r["gmac_s"] * 1e9 * r["median_s"] / macs, 1, places=6)
                self.assertTrue(0 < r["best_s"] <= r["median_s"] < 0.01, r)
                self.assertTrue(0 < r["floor_s"] and 0 < r["share"] < 1.1, r)
                self.assertGreater(r["read_gb_s"], 100)
            with open(file, newline="") as lines:
                self.assertEqual([(r["isa"], r["tokens"], r["what"]) for r in csv.DictReader(lines)],
                                 [("cuda:0", "1", "layer"), ("cuda:0", "64", "layer")])  # fmt: skip
            text = self.moe4(*args, "--explain").stdout
            self.assertIn("many calls queued one behind the other", text)
            self.assertIn("on cuda:0, ", text)

    def test_generate(self):
        ids = [self.json("generate", MODEL, "--prompt", "The ", "-n", 32, "--temperature", 0, "--act", "w4a16", "--device", "cuda")
               for _ in range(2)]  # fmt: skip
        self.assertEqual(ids[0]["token_ids"], ids[1]["token_ids"])
        self.assertGreater(ids[0]["read_bytes_per_second"], 1e11)
        self.assertEqual(ids[0]["device"], "cuda:0")


if __name__ == "__main__":
    unittest.main()
