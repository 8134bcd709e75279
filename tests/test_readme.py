"""The README's C example is the marked part of examples/layer.c, word for word, and that program runs. Arguments: program, source folder."""
import pathlib
import re
import subprocess
import sys
import textwrap
import unittest

PROGRAM, ROOT = sys.argv.pop(1), pathlib.Path(sys.argv.pop(1))


class Readme(unittest.TestCase):
    def test_example_is_the_program(self):
        marked = re.search(r"/\* README \*/\n(.*?) +/\* end \*/", (ROOT / "examples" / "layer.c").read_text(), re.S)[1]
        shown = re.search(r"```c\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
        self.assertEqual(shown, textwrap.dedent(marked))

    def test_example_runs(self):
        done = subprocess.run([PROGRAM, ROOT / "models" / "novels-18m-nvfp4"], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertRegex(done.stdout, r"\Ay\[0\] = -?\d+\.?\d*(e-?\d+)?, mostly from expert \d+\n\Z")

    def test_example_says_what_is_wrong(self):
        done = subprocess.run([PROGRAM, ROOT / "none"], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("none", done.stderr)

    def test_links_lead_somewhere(self):
        for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/*.md")]:
            for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
                self.assertTrue((page.parent / link).exists(), f"{page.name}: {link}")


if __name__ == "__main__":
    unittest.main(verbosity=2)
