"""Makes tests/vectors/codec.safetensors: rows, and what each recipe of docs/numerics.md makes of them.

Independent of the library: numpy in fp32 with IEEE division, one operation at a time; E4M3 from ml_dtypes. Deterministic.
Usage: make_codec_vectors.py OUT, or --check FILE (exit 1 when FILE is not what this program makes).
"""
import json
import struct
import sys

import ml_dtypes
import numpy as np

f32, f64 = np.float32, np.float64
FLT_MAX = np.finfo(f32).max
MAGNITUDE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], f64)
MIDDLE = (MAGNITUDE[1:] + MAGNITUDE[:-1]) / 2
np.seterr(all="ignore")


# ---- rows: integers of a generator of our own, so that no numpy release changes them ----

class Random:
    def __init__(self, seed):
        self.state = seed

    def u32(self, n):
        out = np.empty(n, np.uint32)
        for i in range(n):
            self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
            out[i] = self.state >> 32
        return out

    def normal(self, n):
        return sum((self.u32(n) >> 8).astype(f64) * 2.0**-24 for _ in range(12)) - 6

    def sign(self, n):
        return np.where(self.u32(n) >> 31, -1.0, 1.0)


def make_rows(kind, rows, cols):
    r = Random(sum(kind.encode()) + 1)
    n = rows * cols
    if kind == "normal":
        x = 0.02 * r.normal(n)
    elif kind == "ties":  # quarters: every middle between two values, and both zeros
        x = r.sign(n) * (r.u32(n) % 25) / 4
    elif kind == "outliers":
        x = np.where(r.u32(n) % 100 == 0, 50.0, 0.01) * r.normal(n)
    elif kind == "gaps":  # whole blocks of zeros of either sign, blocks of tiny numbers
        x = r.normal(n).reshape(-1, 16)
        x[1::4] *= 0
        x[2::4] *= 1e-9
        x[3::8] *= 1e-30
    elif kind == "edges":  # amax 2688 in every row; block scales in the middle of two E4M3 values, or one bit below or above
        value = e4m3_value(np.arange(20, 101, dtype=np.uint8))
        b = np.resize(f32(3) * (value[:-1] + value[1:]), n // 16)
        b[1::2] /= f32(1.1)  # for a given scale of 1.1
        b = np.nextafter(b, np.choose(r.u32(len(b)) % 3, [0 * b, b, 2 * b]))
        x = (0.2 * r.normal(n)).clip(-0.9, 0.9).reshape(-1, 16) * b[:, None].astype(f64)
        x[:, 5] = b * r.sign(len(b))
        x[:: cols // 16, 0] = 2688
    elif kind == "close":  # both scales of four over six are as good, but for a nudge that an fp32 sum of the errors does not see
        x = close_blocks(r, rows, cols)
    elif kind == "subnormal":
        x = r.sign(n) * (r.u32(n) >> 14) * 2.0**-149
    elif kind == "tiny":  # amax / 2688 is not a number fp32 has
        x = r.sign(n) * (r.u32(n) % 1200) * 2.0**-149
    elif kind == "huge":
        x = r.sign(n) * float(FLT_MAX) * ((r.u32(n) >> 8) * 2.0**-24)
    elif kind == "bits":  # every exponent
        u = r.u32(n)
        x = np.where((u & 0x7F800000) == 0x7F800000, u & 0x807FFFFF, u).astype(np.uint32).view(f32)
    else:  # zeros
        x = r.sign(n) * 0.0
    return np.asarray(x, f64).astype(f32).reshape(rows, cols)


def close_blocks(r, rows, cols):
    """Each row: a block with the amax 1536, so that s2 = 1, and blocks of amax 6 where the errors with scales 1 and 1.5 are equal; then one
    small element moves by 2^-25, so that one of them is smaller in fp64."""
    def errors(x):
        s = np.array([[0x38], [0x3C]], np.uint8)
        x = np.stack([x, x])[:, None]
        return block_errors(x, modelopt_codes(x, e4m3_value(s), np.ones((2, 1), f32)), s, np.ones(2, f32))[:, 0]

    blocks = []
    while len(blocks) < rows * (cols // 16 - 1):
        x = f32(r.sign(16) * (r.u32(16) % 25) / 4)
        x[5], x[9] = 6, x[9] / 16
        moved = x.copy()
        moved[9] += f32(r.sign(1)[0] * 2.0**-25)
        (a, b), (c, d) = errors(x), errors(moved)
        if a == b >= 1 and c != d:
            blocks.append(moved)
    first = np.resize(f32([1536, -3, 0.5, 96]), (rows, 16))
    return np.concatenate([first, np.array(blocks, f32).reshape(rows, -1)], 1)


# ---- the numbers ----

def e4m3(q):
    """fp32 >= 0 -> bytes, to nearest even, saturating."""
    return np.minimum(q, f32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def e4m3_value(byte):
    return byte.view(ml_dtypes.float8_e4m3fn).astype(f32)


def e2m1(v):
    """|v| -> magnitude codes, to nearest, ties to the even code, NaN -> 7."""
    a = np.abs(v.astype(f64))
    below = np.searchsorted(MIDDLE, a, side="left")  # middles less than a
    above = np.searchsorted(MIDDLE, a, side="right")
    code = np.where((below != above) & (above % 2 == 0), above, below)
    return np.where(np.isnan(a), 7, code).astype(np.uint8)


def bf16_bits(v):
    """fp64 -> bf16, rounded once."""
    _, exponent = np.frexp(v)
    step = np.ldexp(1.0, np.maximum(exponent - 8, -133))
    with_step = np.rint(v / step) * step
    return (with_step.astype(f32).view(np.uint32) >> 16).astype(np.uint16)


# ---- recipes: x [rows, blocks, 16], g [rows] -> codes, scale bytes, q ----

def first_global(recipe, amax, four_over_six):
    amax = np.asarray(amax, f32)
    if recipe in ("modelopt", "modelopt_static"):
        g = amax / f32(1536 if four_over_six else 2688)
        g = np.where(g == 0, f32(2.0**-149), g)
    else:
        g = np.minimum(f32(2688) / amax, FLT_MAX)
    return np.where(amax == 0, f32(1), g).astype(f32)


def modelopt_codes(x, sf8, s2):
    return e2m1(x / (sf8 * s2)[..., None]) | np.where(x < 0, 8, 0).astype(np.uint8)


def modelopt(x, g, amax):
    s2 = g[:, None]
    q = np.abs(x).max(-1) / (f32(6) * s2)
    q = np.where(q == 0, f32(1), q)
    scale = e4m3(np.clip(q, f32(2.0**-9), f32(448)))
    return modelopt_codes(x, e4m3_value(scale), s2), scale, q


def modelopt_static(x, g, amax):
    b6 = np.abs(x).max(-1) / f32(6)
    b6 = np.where(b6 == 0, f32(1), b6)
    q = b6 * f32(448) / (amax / f32(6))[:, None]
    scale = e4m3(np.clip(q, f32(2.0**-9), f32(448)))
    return modelopt_codes(x, e4m3_value(scale), g[:, None]), scale, q


def activation(x, g, amax):
    S = g[:, None]
    q = np.abs(x).max(-1) * (S * (f32(1) / f32(6)))
    scale = e4m3(q)
    sf8 = e4m3_value(scale)
    factor = np.minimum(f32(1) / (sf8 * (f32(1) / S)), FLT_MAX)
    codes = e2m1(x * factor[..., None]) | np.where(np.signbit(x), 8, 0).astype(np.uint8)
    return np.where((scale == 0)[..., None], np.uint8(0), codes), scale, q


def compressed_tensors(x, g, amax):
    gs = g[:, None]
    q = gs * (np.abs(x).max(-1) / f32(6))
    scale = e4m3(q)
    scale = np.where(scale == 0, np.uint8(0x20), scale)
    sf8 = e4m3_value(scale)
    return e2m1(x / (sf8 / gs)[..., None]) | np.where(x < 0, 8, 0).astype(np.uint8), scale, q


def four_over_six(x, g, amax):
    codes, scale, q = modelopt(x, g, amax)
    q2 = f32(1.5) * q
    scale2 = e4m3(np.clip(q2, f32(2.0**-9), f32(448)))
    codes2 = modelopt_codes(x, e4m3_value(scale2), g[:, None])
    error, error2 = (block_errors(x, c, s, g) for c, s in ((codes, scale), (codes2, scale2)))
    better = error2 < error
    return np.where(better[..., None], codes2, codes), np.where(better, scale2, scale), np.where(better, q2, q)


def block_errors(x, codes, scale, g):
    e = x.astype(f64) - exact(codes, scale) * g.astype(f64)[:, None, None]
    total = np.zeros(e.shape[:-1], f64)
    for k in range(16):
        total = total + e[..., k] * e[..., k]
    return total


def exact(codes, scale):
    value = MAGNITUDE[codes & 7] * np.where(codes & 8, -1.0, 1.0)
    return value * e4m3_value(scale).astype(f64)[..., None]


RECIPES = {"modelopt": modelopt, "modelopt_static": modelopt_static, "activation": activation,
           "compressed_tensors": compressed_tensors, "four_over_six": four_over_six}


def decode(recipe, codes, scale, g):
    """-> fp32, and fp64 that rounds to shorter formats as the exact value does."""
    v, g = exact(codes, scale), g[:, None, None]
    if recipe == "compressed_tensors":
        return v.astype(f32) / g, v / g.astype(f64)
    if recipe == "activation":
        g = f32(1) / g
    return v.astype(f32) * g, v * g.astype(f64)


def run(recipe, x, given, per_row):
    """All tensors of one case; `given`: a factor on the global scale that the amax asks for, or None."""
    rows, cols = x.shape
    amax = np.abs(x).max(-1) if per_row else np.full(rows, np.abs(x).max(), f32)
    family = "modelopt" if recipe == "four_over_six" else recipe
    g = first_global(family, amax, recipe == "four_over_six")
    amax = np.where(amax == 0, f32(2688), amax)
    if given is not None:
        g = np.clip(g * f32(given), f32(2.0**-127), f32(1e35)).astype(f32)
        amax = f32(2688) * g
    codes, scale, q = RECIPES[recipe](x.reshape(rows, -1, 16), g, amax)
    y, y64 = decode(recipe, codes, scale, g)
    flat = codes.reshape(rows, cols)
    out = {"codes": flat[:, 0::2] | flat[:, 1::2] << 4, "scales": scale, "global": g if per_row else g[:1],
           "saturated": np.array([(q > f32(464)).sum()], np.int64)}
    if given is None:
        out |= {"y_f32": y.reshape(rows, cols), "y_bf16": bf16_bits(y64).reshape(rows, cols),
                "y_f16": y64.astype(np.float16).reshape(rows, cols)}
    return out


# ---- the file ----

def make():
    out = {}
    for kind in ("normal", "ties", "outliers", "gaps", "edges", "close", "subnormal", "tiny", "huge", "bits", "zeros"):
        x = make_rows(kind, 16 if kind in ("edges", "close") else 3, 80)
        out[f"{kind}.x"] = x
        for recipe in RECIPES:
            given = f32(1.1) if kind == "edges" else f32(3)
            if "modelopt" in recipe or recipe == "four_over_six":
                given = f32(1) / given
            cases = {"tensor": (None, False), "row": (None, True), "given": (given, False)}
            for name, (given, per_row) in cases.items():
                for tensor, data in run(recipe, x, given, per_row).items():
                    out[f"{kind}.{recipe}.{name}.{tensor}"] = data
    r = Random(99)
    x = np.concatenate([(r.normal(512) * 2.0 ** (r.u32(512) % 60 - 40.0)).astype(f32), make_rows("bits", 1, 512)[0]])
    out["numbers.x"] = x
    out["numbers.bf16"] = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    out["numbers.f16"] = x.astype(np.float16)
    out["numbers.e4m3"] = e4m3(np.abs(x)) | np.where(np.signbit(x), 0x80, 0).astype(np.uint8)
    return out


def safetensors(tensors):
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16", "uint8": "U8", "int64": "I64"}
    header, data = {}, b""
    for name, t in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        raw = np.ascontiguousarray(t).tobytes()
        header[name] = {"dtype": names[t.dtype.name], "shape": list(t.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def main():
    made = safetensors(make())
    if len(sys.argv) == 3 and sys.argv[1] == "--check":
        if open(sys.argv[2], "rb").read() != made:
            sys.exit(f"{sys.argv[2]} is not what {sys.argv[0]} makes")
    elif len(sys.argv) == 2:
        open(sys.argv[1], "wb").write(made)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
