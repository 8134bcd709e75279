"""What the tests of every command share: where the program is, running it, what an error looks like."""
import json
import os
import pathlib
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("MOE4", str(ROOT / "build" / "moe4"))
MODEL = ROOT / "models" / "novels-18m-nvfp4"
GOLDEN = ROOT / "models" / "novels-18m-golden.safetensors"
FINE, BAD_DATA, BAD_USAGE = 0, 1, 2


class CliCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="moe4-cli-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def moe4(self, *args, status=FINE, **kwargs):
        """Runs `moe4 args`; its exit status must be `status`. An error is one line on standard error and nothing on standard output."""
        done = subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True, timeout=120, **kwargs)
        self.assertEqual(done.returncode, status, f"moe4 {' '.join(map(str, args))}\n{done.stdout}{done.stderr}")
        if status == FINE:
            self.assertEqual(done.stderr, "")
        return done

    def error(self, *args, status, says=(), **kwargs):
        """The one line of an error, which must contain each of `says`."""
        done = self.moe4(*args, status=status, **kwargs)
        self.assertEqual(done.stdout, "")
        self.assertRegex(done.stderr, r"\Amoe4: [^\n]+: [^\n]+\n\Z")
        for part in [says] if isinstance(says, str) else says:
            self.assertIn(part, done.stderr)
        return done.stderr

    def json(self, *args, status=FINE, **kwargs):
        """The one object on standard output."""
        value = json.loads(self.moe4(*args, "--json", status=status, **kwargs).stdout)
        self.assertIsInstance(value, dict)
        return value
