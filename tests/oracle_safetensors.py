"""moe4 beside the safetensors package of PyPI: each reads what the other writes, and both refuse the same files."""
import json
import pathlib
import random
import subprocess
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "cli"))
try:
    import ml_dtypes
    import numpy as np
    import safetensors
    from safetensors.numpy import save
except ImportError as error:
    print(f"skipped, needs numpy, ml_dtypes and safetensors: {error}")
    sys.exit(77)

import tensors
from cli_case import BAD_DATA, FINE, GOLDEN, MODEL, PROGRAM, CliCase

NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32, "U8": np.uint8,
         "F8_E4M3": ml_dtypes.float8_e4m3fn}  # fmt: skip


def load(path):
    """{name: (dtype, shape, bytes)} as the package reads it."""
    return {name: (t["dtype"], list(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(pathlib.Path(path).read_bytes())}


def store(path, loaded, metadata=None):
    """The same, as the package writes it: in an order of its own, and with metadata if any."""
    arrays = {name: np.frombuffer(raw, NUMPY[dtype]).reshape(shape) for name, (dtype, shape, raw) in loaded.items()}
    path.write_bytes(save(arrays, metadata))


class Files(CliCase):
    def run_layer(self, model, layer, x, *args):
        out = self.folder / "out.safetensors"
        self.moe4("run", model, "--layer", layer, "--input", x, "--output", out, *args)
        return out

    def test_package_reads_ours(self):
        for dtype in ("bf16", "f32"):
            out = self.run_layer(MODEL, 3, f"{GOLDEN}:tale.layer3.x", "--output-dtype", dtype)
            read = load(out)
            self.assertEqual({n: t[:2] for n, t in read.items()},
                             {"y": (dtype.upper(), [256, 256]), "topk_idx": ("I32", [256, 6]), "topk_weight": ("F32", [256, 6])})  # fmt: skip
            for name, (kind, _, values) in tensors.read(out).items():
                self.assertEqual(tensors.pack(kind, values), read[name][2], name)

    def test_package_reads_the_fixtures(self):
        for path in [*MODEL.glob("*.safetensors"), GOLDEN, *sorted((pathlib.Path(__file__).parent / "vectors").glob("*.safetensors"))]:
            ours = self.json("inspect", path)
            read = load(path)
            self.assertEqual(ours["tensors"], len(read), path)
            self.assertEqual(ours["bytes"], sum(len(raw) for _, _, raw in read.values()), path)

    def test_we_read_the_packages(self):
        golden = load(GOLDEN)["tale.layer3.x"]
        x = np.frombuffer(golden[2], ml_dtypes.bfloat16).astype(np.float32)
        wanted = load(self.run_layer(MODEL, 3, f"{GOLDEN}:tale.layer3.x"))
        for dtype in ("BF16", "F32"):
            raw = x.astype(NUMPY[dtype]).tobytes()
            file = self.folder / f"{dtype}.safetensors"
            store(file, {"other": ("I64", [3], bytes(24)), "x": (dtype, golden[1], raw), "empty": ("F16", [0, 5], b"")}, {"format": "np"})
            self.assertEqual(load(self.run_layer(MODEL, 3, file)), wanted)

    def test_a_model_the_package_wrote(self):
        model = self.folder / "model"
        model.mkdir()
        for name in ("config.json", "hf_quant_config.json"):
            (model / name).write_bytes((MODEL / name).read_bytes())
        store(model / "model.safetensors", load(MODEL / "model.safetensors"), {"format": "pt"})
        self.assertIn("0 problems", self.moe4("verify", model).stdout)
        x = f"{GOLDEN}:tale.layer2.x"
        self.assertEqual(load(self.run_layer(model, 2, x)), load(self.run_layer(MODEL, 2, x)))

    def test_both_refuse_the_same(self):
        """A few hundred copies of a small file with something changed."""
        small = self.folder / "small.safetensors"
        store(small, {"a": ("F32", [2, 3], bytes(range(24))), "b": ("U8", [5], b"01234"), "c": ("BF16", [], b"ab"), "d": ("I64", [1], bytes(8))})
        whole = small.read_bytes()
        n = int.from_bytes(whole[:8], "little")
        r = random.Random(4)
        verdicts = {True: 0, False: 0}
        for i in range(300):
            data = bytearray(whole)
            if i % 3 == 0:  # a digit of a shape or an offset
                at = r.choice([k for k in range(8, 8 + n) if chr(data[k]).isdigit()])
                data[at] = ord(r.choice("0123456789"))
            elif i % 3 == 1:  # any byte of the header
                data[r.randrange(8 + n)] = r.randrange(256)
            else:
                cut = r.randrange(len(data))
                data = data[:cut] if r.random() < 0.5 else data[:cut] + bytes(r.randrange(1, 9)) + data[cut:]
            file = self.folder / f"{i}.safetensors"
            file.write_bytes(data)
            try:
                package = load(file)
            except safetensors.SafetensorError:
                package = None
            ours = subprocess.run([PROGRAM, "inspect", file, "--json"], capture_output=True, text=True)
            self.assertEqual(ours.returncode, BAD_DATA if package is None else FINE, (bytes(data), ours.stderr))
            if package is not None:
                self.assertEqual(json.loads(ours.stdout)["tensors"], len(package), bytes(data))
            verdicts[package is not None] += 1
        self.assertGreater(min(verdicts.values()), 10)


unittest.main()
