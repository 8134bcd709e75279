"""The program's frame: help, version, options, and what happens when standard output cannot be written."""
import re
import subprocess
import unittest

from cli_case import BAD_DATA, BAD_USAGE, GOLDEN, MODEL, PROGRAM, ROOT, CliCase

X = f"{GOLDEN}:tale.layer3.x"


class Frame(CliCase):
    def commands(self):
        lines = self.moe4("--help").stdout.split("Commands:\n")[1].split("\n\n")[0].splitlines()
        return [line.split()[0] for line in lines]

    def test_version(self):
        self.assertRegex(self.moe4("--version").stdout, r"\Amoe4 \d+\.\d+\.\d+\n\Z")

    def test_help_lists_commands(self):
        shown = re.findall(r"^    moe4 (\w+) ", (ROOT / "README.md").read_text(), re.M)
        self.assertEqual(sorted(shown), sorted(self.commands()))
        self.assertEqual(self.moe4("-h").stdout, self.moe4("--help").stdout)

    def test_every_command_explains_itself(self):
        for command in self.commands():
            with self.subTest(command):
                text = self.moe4(command, "--help").stdout
                self.assertTrue(text.startswith(f"Usage: moe4 {command} "))
                for part in ("Options:", "Examples:\n  moe4 " + command, "Exit status: 0 fine, 1 the data is wrong, 2 wrong usage"):
                    self.assertIn(part, text)
                self.assertLessEqual(max(map(len, text.splitlines())), 130)

    def test_no_command(self):
        for arguments in ([], [""]):
            done = self.moe4(*arguments, status=BAD_USAGE)
            self.assertEqual(done.stdout, "")
            self.assertIn("Usage: moe4 COMMAND", done.stderr)

    def test_unknown_command(self):
        self.error("frobnicate", status=BAD_USAGE, says="moe4: frobnicate: unknown command")
        self.error("--frobnicate", status=BAD_USAGE, says="--frobnicate")

    def test_every_command_needs_its_model(self):
        for command in self.commands():
            with self.subTest(command):
                if command != "bench":
                    self.error(command, status=BAD_USAGE, says=f"usage: moe4 {command} MODEL")
                self.error(command, "--frobnicate", status=BAD_USAGE, says="moe4: --frobnicate: unknown")
                self.error(command, "-q", status=BAD_USAGE, says="moe4: -q: unknown")

    def test_options_are_read_strictly(self):
        for value in ("", "-1", "+1", " 1", "1 ", "1x", "0x1", "1e3", "1.0", "18446744073709551615", "99999999999999999999999"):
            with self.subTest(value):
                self.error("run", MODEL, "--input", X, f"--layer={value}", status=BAD_USAGE, says=["--layer", f'"{value}"'])
        for value in ("", "-1", "-0", "nan", "inf", "1e999", " 1", "2e-3x"):
            with self.subTest(value):
                self.error("run", MODEL, "--input", X, "--layer=1", "--check=a:b", f"--tol={value}", status=BAD_USAGE, says=["--tol", value])
        self.error("run", MODEL, "--input", "", "--layer", "1", status=BAD_USAGE, says="--input")

    def test_arguments_of_options(self):
        self.error("run", MODEL, "--layer", status=BAD_USAGE, says="moe4: --layer: needs an argument")
        self.error("run", MODEL, "--shared=yes", status=BAD_USAGE, says="moe4: --shared: takes no argument")
        self.error("run", MODEL, "more", "--layer", "1", "--input", X, status=BAD_USAGE, says="moe4: more: unexpected")

    def test_isa_and_threads(self):
        self.error("run", MODEL, "--layer", "1", "--input", X, "--isa", "mmx", status=BAD_USAGE, says='"mmx"')
        self.error("run", MODEL, "--layer", "1", "--input", X, "--threads", "100000", status=BAD_USAGE, says="100000")

    def test_full_disk_under_standard_output(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run([PROGRAM, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, BAD_DATA)
        self.assertEqual(done.stderr, "moe4: standard output: No space left on device\n")


if __name__ == "__main__":
    unittest.main(verbosity=2)
