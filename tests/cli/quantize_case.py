"""What the tests of moe4 quantize share: models to quantize, and what a folder holds."""
import json
import shutil
import struct

import tensors
from cli_case import MODEL, ROOT, CliCase

EXPERTS = ROOT / "tests" / "vectors" / "bf16-experts.safetensors"  # four of layer 2's, as the bundled model had them before
TINY = ROOT / "tests" / "vectors" / "hf-qwen3-moe"
TINY_IDS = f"{TINY}-logits.safetensors"
JOURNAL, CALIBRATION = "moe4-quantize.json", ".moe4-calibration"
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E4M3 = [(b & 7) * 2.0**-9 if b < 8 else (8 + (b & 7)) * 2.0 ** ((b >> 3) - 10) for b in range(127)]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def raw_tensors(path):
    """{name: (dtype, shape, bytes)} and the metadata."""
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    metadata = header.pop("__metadata__", None)
    return {k: (t["dtype"], t["shape"], raw[8 + n :][slice(*t["data_offsets"])]) for k, t in header.items()}, metadata


def number(tensor):
    return struct.unpack("<f", tensor[2])[0]


def decoded(out, module):
    (codes, scales), g = (out[f"{module}.{s}"][2] for s in ("weight", "weight_scale")), number(out[f"{module}.weight_scale_2"])
    values = []
    for i, byte in enumerate(codes):
        for code in (byte & 15, byte >> 4):
            values.append(E2M1[code & 7] * (-1 if code & 8 else 1) * E4M3[scales[i // 8]] * g)
    return values


class QuantizeCase(CliCase):
    def quantize(self, model, name, *args, **kwargs):
        out = self.folder / name
        self.moe4("quantize", model, out, *args, **kwargs)
        return out

    def tiny(self, **tensors_too):
        model = tensors.TinyModel(self.folder / "tiny")
        model.tensors.update(tensors_too)
        tensors.write(model.folder / "model.safetensors", model.tensors)
        return model

    def experts(self):
        """A model that is nothing but four trained experts."""
        folder = self.folder / "experts"
        folder.mkdir()
        shutil.copy(EXPERTS, folder / "model.safetensors")
        config = json.loads((MODEL / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        return folder

    def assert_same(self, made, wanted, why=None):
        """Not assertEqual: it would take minutes to say how large files differ."""
        self.assertEqual({*made}, {*wanted}, why)
        self.assertEqual([k for k in made if made[k] != wanted[k]], [], why)
