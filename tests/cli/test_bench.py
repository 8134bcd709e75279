"""moe4 bench: figures that fit together, the CSV file, wrong usage."""
import csv
import unittest

from cli_case import BAD_DATA, BAD_USAGE, CliCase

SMALL = ("bench", "--shape", "256,128,8,2", "--seconds", "0.05")
COLUMNS = ("shape hidden intermediate experts top_k act isa threads tokens what samples median_s best_s gmac_s gb_s floor_s bound share "
           "read_gb_s ceiling_gmac_s speedup").split()
PARTS = ["layer", "products", "gate_up", "down", "dispatch", "quantize", "combine"]


class Bench(CliCase):
    def test_figures_fit_together(self):
        for act in ("token", "w4a16", "static", "tensor"):
            with self.subTest(act):
                told = self.json(*SMALL, "--tokens", "1,5", "--threads", "1,2", "--act", act)
                self.assertEqual((told["act"], told["shape"]), (act, "256,128,8,2"))
                rows = told["figures"]
                self.assertEqual([(r["tokens"], r["threads"], r["what"]) for r in rows],
                                 [(t, n, part) for t in (1, 5) for n in (1, 2) for part in PARTS])
                for r in rows:
                    self.assertGreaterEqual(r["samples"], 3)
                    self.assertGreater(r["read_gb_s"], 0)
                    self.assertLessEqual(r["best_s"], r["median_s"])
                    if r["what"] == "layer":
                        macs = 3 * r["tokens"] * 2 * 256 * 128
                        self.assertAlmostEqual(r["gmac_s"] * 1e9 * r["median_s"] / macs, 1, places=6)
                        self.assertGreater(r["share"], 0)
                        self.assertIn(r["bound"], ("memory", "arithmetic"))
                        # Two experts a token, each 3 matrices of 4.5 bits a weight; the layer takes longer than its products.
                        if r["tokens"] == 1:
                            self.assertAlmostEqual(r["gb_s"] * 1e9 * r["median_s"] / (2 * 3 * 256 * 128 * 4.5 / 8), 1, places=6)
                        products = next(p for p in rows if p["what"] == "products" and p["tokens"] == r["tokens"] and p["threads"] == r["threads"])
                        self.assertGreater(r["best_s"], products["best_s"])

    def test_several_modes(self):
        file = self.folder / "figures.csv"
        told = self.json(*SMALL, "--tokens", "1,2", "--threads", "1", "--act", "token,w4a16", "--csv", file)
        self.assertEqual(told["act"], "token,w4a16")
        want = [(act, t, part) for act in ("token", "w4a16") for t in (1, 2) for part in PARTS]
        self.assertEqual([(r["act"], r["tokens"], r["what"]) for r in told["figures"]], want)
        with open(file, newline="") as lines:
            self.assertEqual([(r["act"], int(r["tokens"]), r["what"]) for r in csv.DictReader(lines)], want)
        text = self.moe4(*SMALL, "--tokens", "1", "--act", "static,tensor").stdout
        self.assertEqual([word for word in ("static", "tensor") if f"; {word} on " in text], ["static", "tensor"])
        for act in ("token,", ",token", "token,bf16", "token,token,token,token,token", "tokentokentokentoken"):
            self.error("bench", "--act", act, status=BAD_USAGE, says=["--act", f'"{act}"'])

    def test_isa(self):
        told = self.json(*SMALL, "--tokens", "1", "--isa", "scalar")
        self.assertEqual(told["isa"], "scalar")
        self.assertNotIn("step", told)
        self.assertEqual({r["ceiling_gmac_s"] for r in told["figures"]}, {0})

    def test_table(self):
        text = self.moe4(*SMALL, "--tokens", "1,3").stdout
        self.assertEqual([line.split()[0] for line in text.splitlines() if " layer " in line], ["1", "3"])
        self.assertNotIn("combine", text)
        text = self.moe4(*SMALL, "--tokens", "1", "--explain").stdout
        self.assertIn("combine", text)
        self.assertIn("floor / time", text)
        text = self.moe4(*SMALL, "--tokens", "1", "--threads", "1", "--cpu-time").stdout
        self.assertNotIn("products", text)
        text = self.moe4(*SMALL, "--tokens", "1", "--threads", "1,2").stdout
        self.assertIn("times the rate of 1 thread\n", text)

    def test_csv(self):
        file = self.folder / "figures.csv"
        self.moe4(*SMALL, "--tokens", "2", "--threads", "1", "--csv", file)
        with open(file, newline="") as lines:
            rows = list(csv.DictReader(lines))
        self.assertEqual(list(rows[0]), COLUMNS)
        self.assertEqual([r["what"] for r in rows], PARTS)
        self.assertEqual({r["shape"] for r in rows}, {"256,128,8,2"})
        self.error(*SMALL, "--tokens", "1", "--csv", self.folder, status=BAD_DATA, says=str(self.folder))

    def test_wrong_usage(self):
        for shape in ("v5", "1,2,3", "256,128,8,9", "250,128,8,2", "256,128,8,2,1", "256,128,,2", "0,128,8,2"):
            self.error("bench", "--shape", shape, status=BAD_USAGE, says=["--shape", shape])
        for tokens in ("0", "1,", ",1", "1 2", "-1", "x", "9999999999"):
            self.error("bench", f"--tokens={tokens}", status=BAD_USAGE, says=["--tokens", tokens])
        self.error("bench", "--threads", "0", status=BAD_USAGE, says="--threads")
        for threads in ((), ("--threads", "2"), ("--threads", "1,2")):
            self.error("bench", "--cpu-time", *threads, status=BAD_USAGE, says=["--cpu-time", "--threads 1"])
        self.error("bench", "--act", "bf16", status=BAD_USAGE, says="--act")
        self.error("bench", "--isa", "mmx", status=BAD_USAGE, says="mmx")
        self.error("bench", "--device", "cuda", "--cpu-time", status=BAD_USAGE, says=["--cpu-time", "cuda"])
        self.error("bench", "--device", "cuda", "--threads", "1,2", status=BAD_USAGE, says=["--threads", "cuda"])
        self.error("bench", "model", status=BAD_USAGE, says="unexpected")


if __name__ == "__main__":
    unittest.main()
