"""moe4 quantize --resume: folders that are there already, and that no moment of being stopped leaves something wrong."""
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import subprocess
import time
import unittest

import tensors
from cli_case import BAD_DATA, BAD_USAGE, PROGRAM
from quantize_case import CALIBRATION, JOURNAL, TINY, TINY_IDS, QuantizeCase, contents, raw_tensors


class QuantizeResume(QuantizeCase):
    # ---- folders that are there ----

    def test_folders_that_are_not_ours(self):
        model, out = self.tiny().folder, self.folder / "out"
        out.mkdir()
        self.moe4("quantize", model, out)  # empty is fine
        before = contents(out)
        self.error("quantize", model, out, status=BAD_USAGE, says=["not empty"])
        self.moe4("quantize", model, out, "--resume")  # it is what this task ends with
        self.error("quantize", model, out, "--resume", "--exclude", "*.up_proj", status=BAD_USAGE, says=["not empty"])
        self.error("quantize", model, model, "--resume", status=BAD_USAGE, says=["not empty"])
        self.assert_same(contents(out), before)
        (out / "config.json").write_bytes(before["config.json"] + b" ")
        self.error("quantize", model, out, "--resume", status=BAD_USAGE, says=["not empty"])

    def test_finished_folder_that_was_damaged(self):
        """--resume calls a folder finished only if each file it ends with is there, whole, with the header this task writes."""
        args = ["--max-shard-size", "20K"]
        out = self.quantize(TINY, "out", *args)
        wanted = contents(out)
        shards = [name for name in wanted if name.startswith("model-0")]
        self.assertGreater(len(shards), 1)
        header = 8 + struct.unpack("<Q", wanted[shards[1]][:8])[0]
        damages = [(name, None) for name in shards + ["config.json", "hf_quant_config.json", "model.safetensors.index.json"]]
        data = wanted[shards[1]]
        damages += [(shards[1], d) for d in (b"", data[:8], data[:header], data[:-1], data + b"\0", data[: header - 1] + b"\n" + data[header:])]
        damages += [(name, wanted[name] + b"\n") for name in ("hf_quant_config.json", "model.safetensors.index.json")]
        for name, damage in damages:
            if damage is None:
                (out / name).unlink()
            else:
                (out / name).write_bytes(damage)
            before = contents(out)
            self.error("quantize", TINY, out, "--resume", *args, status=BAD_USAGE, says=["not empty"])
            self.assert_same(contents(out), before, name)
            (out / name).write_bytes(wanted[name])
        self.assertEqual(self.json("quantize", TINY, out, "--resume", *args)["shards_kept"], len(shards))

    def test_only_a_temporary_file_is_left(self):
        """Killed before the journal had its name: the folder counts as empty."""
        model, out = self.tiny().folder, self.folder / "out"
        wanted = contents(self.quantize(model, "whole"))
        for args in ([], ["--resume"]):
            out.mkdir()
            (out / ".moe4-quantize.tmp").write_bytes(b"{" * 100000)
            self.moe4("quantize", model, out, *args)
            self.assert_same(contents(out), wanted)
            shutil.rmtree(out)
        out.mkdir()
        (out / ".moe4-quantize.tmp2").write_bytes(b"")  # not ours
        self.error("quantize", model, out, status=BAD_USAGE, says=["not empty"])

    def test_finished_with_other_options(self):
        """Folders whose names, shapes and config.json are the same, and whose bytes are not: --resume does not call them done."""
        other = self.folder / "other"
        ids = next(v for d, s, v in tensors.read(pathlib.Path(TINY_IDS)).values() if d in ("I32", "I64"))
        other.write_bytes(tensors.pack("I32", ids[:9]))
        options = {
            "plain": [], "46": ["--four-over-six"], "search": ["--search"], "static": ["--recipe", "modelopt_static"],
            "text": ["--calibrate", TINY_IDS], "other": ["--calibrate", other],
        }  # fmt: skip
        for args in options.values():
            args += ["--max-shard-size", "20K"]
        for made, asked, says in (("plain", "46", "another four-over-six: no, now yes"), ("46", "plain", "another four-over-six: yes, now no"),
                                  ("plain", "search", "another search: no, now yes"), ("search", "plain", "another search: yes, now no"),
                                  ("plain", "static", "another recipe: modelopt, now modelopt_static"), ("text", "other", "another calibration: text "),
                                  ("text", "plain", ", now none")):  # fmt: skip
            out = self.folder / made
            if not out.exists():
                self.quantize(TINY, made, *options[made])
            shards = sorted(p.name for p in out.glob("model-*"))
            self.assertGreater(len(shards), 1)
            before, times = contents(out), {p: p.stat().st_mtime_ns for p in (out, *out.iterdir())}
            self.error("quantize", TINY, out, "--resume", *options[asked], status=BAD_USAGE, says=[f"{out}/{shards[0]}: finished, with", says])
            self.assert_same(contents(out), before)
            self.assertEqual({p: p.stat().st_mtime_ns for p in (out, *out.iterdir())}, times)
            said = self.json("quantize", TINY, out, "--resume", *options[made])
            self.assertEqual(said["shards_kept"], len(shards))
            self.assert_same(contents(out), before)
        digests = {raw_tensors(next((self.folder / "text").glob("model-*")))[1]["calibration"]}
        self.quantize(TINY, "again", *options["text"])
        digests.add(raw_tensors(next((self.folder / "again").glob("model-*")))[1]["calibration"])
        self.assertEqual(len(digests), 1)
        shutil.copy(next((self.folder / "46").glob("model-00002-*")), self.folder / "plain")  # one shard of another run
        self.error("quantize", TINY, self.folder / "plain", "--resume", *options["plain"], status=BAD_USAGE, says=["model-00002-of", "another four-over-six: yes, now no"])

    def test_unfinished_work_of_another_task(self):
        model, out = self.tiny(), self.folder / "out"
        model.tensors["model.layers.0.mlp.up_proj.weight"][2][0] = float("inf")
        tensors.write(model.folder / "model.safetensors", model.tensors)
        self.error("quantize", model.folder, out, status=BAD_DATA, says="infinite")
        self.error("quantize", model.folder, out, status=BAD_USAGE, says=["unfinished work", "--resume"])
        self.error("quantize", model.folder, out, "--resume", "--four-over-six", status=BAD_USAGE, says=["another four-over-six", "no", "yes"])
        tensors.write(model.folder / "model.safetensors", model.tensors)  # another time of change
        self.error("quantize", model.folder, out, "--resume", status=BAD_USAGE, says=["another input files"])

    def test_calibration_is_kept(self):
        """A resumed run takes what the first had found, unless it is not of this task's size."""
        out, args = self.folder / "out", ["--max-shard-size", "20K", "--calibrate", TINY_IDS]
        wanted = contents(self.quantize(TINY, "whole", *args))

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))

        for damage in ("nothing", "doubled", "cut short", "another magic"):
            self.error("quantize", TINY, out, *args, status=BAD_DATA, says="File too large", preexec_fn=limit)
            record = bytearray((out / CALIBRATION).read_bytes())
            if damage in ("doubled", "another magic"):  # the first matrix's
                record[32:36] = struct.pack("<f", 2 * struct.unpack("<f", record[32:36])[0])
            record[0] ^= damage == "another magic"
            (out / CALIBRATION).write_bytes(record[:-4] if damage == "cut short" else record)
            said = self.json("quantize", TINY, out, *args, "--resume")
            self.assertGreater(said["calibration"]["tokens"], 0)
            made = contents(out)
            differ = [k for k in wanted if made[k] != wanted[k]]
            self.assertEqual({*made}, {*wanted})
            self.assertEqual(len(differ), damage == "doubled", damage)
            shutil.rmtree(out)

    def test_config_comes_last(self):
        """Stopped at config.json: all else is there, this run's journal too, and nothing of the run that made the input."""
        model, out = self.tiny(), self.folder / "out"
        (model.folder / "config.json").write_text(json.dumps(model.config() | {"long": "x" * 40000}))
        (model.folder / "tokenizer.json").write_text("{}")
        for name in (CALIBRATION, ".moe4-quantize.tmp", JOURNAL):
            (model.folder / name).write_text("of the input")

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (30000, resource.RLIM_INFINITY))

        self.error("quantize", model.folder, out, status=BAD_DATA, says=["config.json", "File too large"], preexec_fn=limit)
        self.assertEqual(sorted(contents(out)), ["hf_quant_config.json", "model.safetensors", JOURNAL, "tokenizer.json"])
        self.assertEqual(json.loads((out / JOURNAL).read_text())["recipe"], "modelopt")
        self.moe4("quantize", model.folder, out, "--resume")
        self.assert_same(contents(out), contents(self.quantize(model.folder, "whole")))

    def test_what_is_not_ours_is_written_again(self):
        """A file of a shard's name and size that is another one: --resume does not take it for complete."""
        model, out = self.experts(), self.folder / "out"
        wanted = contents(self.quantize(model, "whole", "--max-shard-size", "60K"))
        largest = max(len(v) for v in wanted.values())

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, resource.RLIM_INFINITY))

        self.error("quantize", model, out, "--max-shard-size", "60K", status=BAD_DATA, preexec_fn=limit)
        shard = next(iter(sorted(out.glob("model-*.safetensors"))))
        shard.write_bytes(bytes(shard.stat().st_size))
        said = self.json("quantize", model, out, "--max-shard-size", "60K", "--resume")
        self.assert_same(contents(out), wanted)
        self.assertLess(said["shards_kept"], said["shards"])

    def test_cut_short_while_it_is_read(self):
        """The input loses its second half in the middle of the run."""
        model, out = self.folder / "large", self.folder / "out"
        model.mkdir()
        shutil.copy(TINY / "config.json", model)
        rows, path = 8192, model / "model.safetensors"
        tensors.write(path, {"model.layers.0.self_attn.q_proj.weight": ("F32", [0, 0], b"")})
        header = {f"model.layers.{i}.self_attn.q_proj.weight": {"dtype": "F32", "shape": [rows, rows], "data_offsets": [i * rows**2 * 4, (i + 1) * rows**2 * 4]}
                  for i in range(2)}  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        for attempt in range(20):
            os.truncate(path, 8 + len(text) + 2 * rows**2 * 4)  # zeros that take no room
            running = subprocess.Popen([PROGRAM, "quantize", model, out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while not (out / JOURNAL).exists() and running.poll() is None:
                time.sleep(0.0005)
            running.send_signal(signal.SIGSTOP)
            os.truncate(path, 8 + len(text) + rows**2 * 4)
            running.send_signal(signal.SIGCONT)
            says = running.communicate()[1]
            if running.returncode == 0:  # stopped too late
                shutil.rmtree(out)
                continue
            self.assertEqual(running.returncode, BAD_DATA, says)
            self.assertRegex(says, r"q_proj.weight: model.safetensors: was cut short: it ends at byte \d+ or before, \d+ more are needed")
            self.assertEqual(sorted(contents(out)), [JOURNAL])
            return
        self.fail("never stopped in time")

    @unittest.skipUnless(shutil.which("unshare"), "no unshare: a small disk cannot be mounted")
    def test_small_disk(self):
        """A tmpfs that holds all but the last shard: the error has both numbers, and a larger disk goes on with what is there."""
        model, out = self.experts(), self.folder / "disk" / "out"
        wanted = contents(self.quantize(model, "whole", "--max-shard-size", "60K"))
        size = sum(len(v) for v in wanted.values()) // 4096 * 4096 - 40960
        out.parent.mkdir()
        copy = self.folder / "copy"
        script = """mount -t tmpfs -o size=$1 none "$2" || exit 77
            shift; disk=$1; copy=$2; shift 2
            "$@"; status=$?
            cp -r "$disk/out" "$copy"; exit $status"""
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", str(size), out.parent, copy, PROGRAM, "quantize", model, out,
                               "--max-shard-size", "60K"], capture_output=True, text=True)  # fmt: skip
        if done.returncode == 77 or "unshare" in done.stderr:
            self.skipTest(f"tmpfs cannot be mounted: {done.stderr.strip()}")
        self.assertEqual(done.returncode, BAD_DATA, done.stderr)
        self.assertRegex(done.stderr, r"/out/model-\d+-of-\d+.safetensors: \d+ bytes: No space left on device: \d+ bytes are free")
        self.assertGreater(len(contents(copy)), 2)
        for name, data in contents(copy).items():
            self.assertTrue(name == JOURNAL or wanted[name] == data, name)
        self.moe4("quantize", model, copy, "--max-shard-size", "60K", "--resume")
        self.assert_same(contents(copy), wanted)

    def test_full_disk(self):
        model, out = self.experts(), self.folder / "out"
        wanted = contents(self.quantize(model, "whole", "--max-shard-size", "60K"))
        largest = max(len(v) for v in wanted.values())

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, resource.RLIM_INFINITY))

        says = self.error("quantize", model, out, "--max-shard-size", "60K", status=BAD_DATA, preexec_fn=limit)
        self.assertRegex(says, r"/out/model-0000\d-of-0000\d.safetensors: .*File too large")
        for name, data in contents(out).items():
            self.assertTrue(name == JOURNAL or wanted[name] == data, name)
        self.moe4("quantize", model, out, "--max-shard-size", "60K", "--resume")
        self.assert_same(contents(out), wanted)

    def test_killed_at_any_moment(self):
        self.kill_and_resume(self.experts(), "--max-shard-size", "20K")

    def test_killed_while_calibrating(self):
        self.kill_and_resume(TINY, "--max-shard-size", "20K", "--calibrate", TINY_IDS, "--search")

    def kill_and_resume(self, model, *args):
        start = time.monotonic()
        wanted = contents(self.quantize(model, "whole", *args))
        seconds = time.monotonic() - start
        n_times, n_killed = int(os.environ.get("MOE4_KILLS", 6)), 0
        rng = random.Random(time.time_ns())
        for i in range(n_times):
            out = self.folder / f"out{i}"
            running = subprocess.Popen([PROGRAM, "quantize", model, out, *args], stdout=subprocess.DEVNULL)
            time.sleep(rng.uniform(0, seconds))
            running.kill()
            if running.wait():
                n_killed += 1
            else:
                seconds /= 2  # it was done: the first run was slower than others are
            for name, data in contents(out).items() if out.exists() else ():
                if name != JOURNAL and not name.startswith(".moe4-"):
                    self.assertEqual(data, wanted[name], name)
            self.moe4("quantize", model, out, *args, "--resume")
            self.assert_same(contents(out), wanted)
            shutil.rmtree(out)
        self.assertGreater(n_killed, 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
