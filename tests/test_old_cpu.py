"""test_old_cpu.py MOE4 CHECKKERNELS SOURCE: an emulated CPU without some instructions meets none of them, and the result is right.

qemu's user mode raises SIGILL for what the CPU it plays lacks; the first test sees to it that this one does.
"""
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import unittest

PROGRAM, CHECKKERNELS, SOURCE = map(pathlib.Path, sys.argv[1:4])
MODEL, GOLDEN = SOURCE / "models/novels-18m-nvfp4", SOURCE / "models/novels-18m-golden.safetensors"
ISAS = {"core2duo": "scalar", "Nehalem": "scalar", "Haswell": "avx2"}  # of each CPU, the best that moe4 has
TOLERANCES = {"w4a16": 1e-4, "token": 5e-4}
CC = os.environ.get("CC", "cc")
USES_AVX2 = """
#include <immintrin.h>
__attribute__((target("avx2"))) int main(int n, char **unused) {
    (void)unused;
    volatile __m256i a = _mm256_set1_epi32(n);
    a = _mm256_add_epi32(a, a);
    return 0;
}
"""


def on(cpu, *command):
    return subprocess.run(["qemu-x86_64", "-cpu", cpu, *map(str, command)], capture_output=True, text=True, timeout=300)


@unittest.skipUnless(platform.machine() == "x86_64", "needs x86-64")
@unittest.skipUnless(shutil.which("qemu-x86_64"), "needs qemu-x86_64 (Debian: qemu-user)")
class OldCpu(unittest.TestCase):
    @unittest.skipUnless(shutil.which(CC), "needs a C compiler")
    def test_qemu_refuses_what_a_cpu_lacks(self):
        with tempfile.TemporaryDirectory(prefix="moe4-cpu-") as folder:
            source = pathlib.Path(folder) / "avx2.c"
            source.write_text(USES_AVX2)
            subprocess.run([CC, "-o", source.with_suffix(""), source], check=True)
            for cpu, isa in ISAS.items():
                self.assertEqual(on(cpu, source.with_suffix("")).returncode == 0, isa == "avx2", cpu)

    def run_layer(self, cpu, mode):
        done = on(cpu, PROGRAM, "run", MODEL, "--layer", 3, "--input", f"{GOLDEN}:tale.layer3.x", "--act", mode, "--output-dtype", "f32",
                  "--check", f"{GOLDEN}:tale.layer3.y_{mode}", "--tol", TOLERANCES[mode], "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f'"isa": "{ISAS[cpu]}"', done.stdout)

    def test_layer_on_core2duo(self):
        self.run_layer("core2duo", "w4a16")

    def test_layer_on_nehalem(self):
        self.run_layer("Nehalem", "token")

    def test_layer_on_haswell(self):
        for mode in TOLERANCES:
            self.run_layer("Haswell", mode)

    def test_kernels(self):
        for cpu in ("core2duo", "Haswell"):
            done = on(cpu, CHECKKERNELS)
            self.assertEqual(done.returncode, 0, done.stdout[-2000:] + done.stderr[-2000:])
            self.assertEqual({line.split()[0] for line in done.stdout.splitlines()[:-1]}, {"scalar", ISAS[cpu]})
            self.assertTrue(done.stdout.endswith("\n0 failed\n"))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
