"""examples/grouped.c and examples/sorted.c compute the same rows in two ways. Arguments: the two programs, source folder."""
import pathlib
import re
import subprocess
import sys
import unittest

GROUPED, SORTED, ROOT = sys.argv.pop(1), sys.argv.pop(1), pathlib.Path(sys.argv.pop(1))


def run(program, folder):
    return subprocess.run([program, folder], capture_output=True, text=True)


class Examples(unittest.TestCase):
    def test_they_agree(self):
        values = []
        for program in (GROUPED, SORTED):
            done = run(program, ROOT / "models" / "novels-18m-nvfp4")
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            match = re.fullmatch(r"row 0 (-?\d+\.\d+), row 63 (-?\d+\.\d+)\n", done.stdout)
            self.assertTrue(match, done.stdout)
            values.append([float(v) for v in match.groups()])
        for grouped, by_rows in zip(*values):
            self.assertNotEqual(grouped, 0)
            self.assertAlmostEqual(grouped, by_rows, delta=1e-3 * abs(grouped) + 1e-5)

    def test_they_say_what_is_wrong(self):
        for program in (GROUPED, SORTED):
            done = run(program, ROOT / "none")
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertIn("none", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
