"""The manual page and the shells' completion: well-formed, and with every option of every command."""
import re
import shutil
import subprocess
import unittest

from cli_case import BAD_USAGE, PROGRAM, CliCase

ASK_BASH = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_moe4
printf '%s\\n' "${COMPREPLY[@]}"
"""


def tool(name):
    return unittest.skipUnless(shutil.which(name), f"needs {name}")


class Describe(CliCase):
    def commands(self):
        lines = self.moe4("--help").stdout.split("Commands:\n")[1].split("\n\n")[0].splitlines()
        return [line.split()[0] for line in lines]

    def options(self, command):
        """Every option of --help's table, and what it calls its argument, or None."""
        table = self.moe4(command, "--help").stdout.split("Options:\n")[1].split("\n\n")[0]
        return re.findall(r"^  (--?[a-z][a-z-]*)(?: (\S+))?  +\S", table, re.M)

    def written(self, *args):
        path = self.folder / "described"
        path.write_text(self.moe4(*args).stdout)
        return path

    def complete(self, *words):
        script = self.written("--completion", "bash")
        done = subprocess.run(["bash", "-c", ASK_BASH, "bash", script, "moe4", *words], capture_output=True, text=True, cwd=self.folder)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return done.stdout.split()

    def test_help_has_options_at_all(self):
        self.assertIn(("--threads", "N"), self.options("run"))
        self.assertIn(("-n", "N"), self.options("generate"))
        self.assertIn(("--json", ""), self.options("verify"))

    def test_manual_has_every_option(self):
        page = self.moe4("--man").stdout
        sections = dict(re.findall(r"^\.SS moe4 (\w+)\n(.*?)(?=^\.S[SH])", page, re.M | re.S))
        self.assertEqual(list(sections), self.commands())
        for command, section in sections.items():
            for option, argument in self.options(command):
                if option != "--help":
                    head = r"\fB" + option.replace("-", r"\-") + r"\fR" + (" " if argument else "\n")
                    self.assertIn(".TP\n" + head, section, f"{command} {option}")

    def test_manual_says_what_help_says(self):
        page = re.sub(r"\\f[BIR]|\\&", "", self.moe4("--man").stdout).replace(r"\-", "-").replace(r"\(aq", "'").replace(r"\(dq", '"')
        for command in self.commands():
            text = self.moe4(command, "--help").stdout
            for line in text.split("Options:")[0].splitlines()[1:] + re.findall(r"^  -\S+(?: \S+)?  +(.*)", text, re.M)[:-1]:
                self.assertIn(line, page)

    def test_an_installed_page_is_this_one(self):
        page = self.moe4("--man").stdout
        self.assertIn(self.moe4("--version").stdout.strip(), page.splitlines()[1])

    @tool("mandoc")
    def test_mandoc_finds_nothing(self):
        done = subprocess.run(["mandoc", "-Tlint", "-Wwarning", self.written("--man")], capture_output=True, text=True)
        said = [line for line in done.stdout.splitlines() if "missing date" not in line]  # the page has a version instead
        self.assertEqual((said, done.stderr), ([], ""))

    @tool("groff")
    def test_groff_finds_nothing(self):
        done = subprocess.run(["groff", "-man", "-ww", "-z", self.written("--man")], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""))

    @tool("man")
    def test_man_finds_nothing(self):
        page = self.written("--man").rename(self.folder / "moe4.1")
        done = subprocess.run(["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", page], capture_output=True, text=True)
        if "minimized" in done.stdout or not shutil.which("groff"):
            self.skipTest("needs a man that shows pages")
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    @tool("bash")
    def test_bash_completes_every_option(self):
        top = self.complete("")
        self.assertEqual(top, self.commands() + ["--help", "--version", "--man", "--completion"])
        for command in self.commands():
            self.assertEqual(self.complete(command, "-"), [option for option, _ in self.options(command)])
        self.assertEqual(self.complete("ver"), ["verify"])
        self.assertEqual(self.complete("--completion", "z"), ["zsh"])

    @tool("bash")
    def test_bash_completes_arguments(self):
        (self.folder / "x.safetensors").touch()
        self.assertEqual(self.complete("inspect", "x"), ["x.safetensors"])
        self.assertEqual(self.complete("run", "model", "--input", "x."), ["x.safetensors"])
        self.assertEqual(self.complete("run", "model", "--act", "to"), ["token"])
        self.assertEqual(self.complete("run", "model", "--act", "=", "to"), ["token"])
        self.assertEqual(self.complete("run", "model", "--act", "="), ["w4a16", "static", "tensor", "token", "bf16"])
        self.assertEqual(self.complete("run", "model", "--layer", ""), [])
        self.assertEqual(self.complete("bench", "x"), [])

    @tool("bash")
    def test_offered_words_are_words_of_moe4(self):
        for command, option in (("bench", "--shape"), ("run", "--act"), ("run", "--isa"), ("run", "--output-dtype")):
            for word in self.complete(command, option, ""):
                with self.subTest(word):
                    rest = ["--tokens", "none"] if command == "bench" else ["none", "--layer", "1", "--input", "none"]
                    done = subprocess.run([PROGRAM, command, option, word, *rest], capture_output=True, text=True)
                    self.assertRegex(done.stderr, "--tokens|no such file|CPU")

    def test_zsh_offers_every_option(self):
        script = self.moe4("--completion", "zsh").stdout
        self.assertTrue(script.startswith("#compdef moe4\n"))
        parts = dict(re.findall(r"^        (\w+)\)\n(.*?);;", script, re.M | re.S))
        self.assertEqual(list(parts), self.commands())
        for command, part in parts.items():
            offered = re.findall(r"^ +'(--?[a-z][a-z-]*)[=+]?\[.*\](.*?)' ?\\?$", part, re.M)
            self.assertEqual([name for name, _ in offered], [option for option, _ in self.options(command)])
            self.assertEqual([bool(after) for _, after in offered], [bool(argument) for _, argument in self.options(command)])

    @tool("zsh")
    def test_zsh_reads_it(self):
        script = self.written("--completion", "zsh")
        done = subprocess.run(["zsh", "-n", script], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_wrong_usage(self):
        self.error("--completion", status=BAD_USAGE, says="bash or zsh")
        self.error("--completion", "fish", status=BAD_USAGE, says="bash or zsh")
        self.error("run", "--describe=fish", status=BAD_USAGE, says="--describe=fish: unknown")


if __name__ == "__main__":
    unittest.main(verbosity=2)
