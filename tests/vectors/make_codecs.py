"""Rounding cases of the small float formats, with the bits PyTorch gives them: codecs.safetensors.

The conversions that only widen (fp16, bf16, e4m3 -> float32) are tested exhaustively in C against
their definition; what is kept here is what is easy to get wrong, the rounding.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parent / "codecs.safetensors"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


def main():
    torch.set_num_threads(1)
    x = torch.from_numpy(cases())
    e8m0 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    e2m1 = torch.from_numpy(np.concatenate([E2M1, -E2M1]))
    four_bit = torch.from_numpy(e2m1_cases())
    save_file({
        "input": x,
        "fp16": x.to(torch.float16).view(torch.uint16),
        "bf16": x.to(torch.bfloat16).view(torch.uint16),
        "e4m3": x.to(torch.float8_e4m3fn).view(torch.uint8),
        "e4m3_values": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float(),
        "ue8m0_values": e8m0,
        "e2m1_values": e2m1,
        "e2m1_input": four_bit,
        "e2m1": torch.from_numpy(np.array([e2m1_bits(v) for v in four_bit.numpy()], np.uint8)),
    }, OUT)
    check(x, e8m0)
    print(f"{len(x)} cases, {len(four_bit)} for e2m1, {OUT.stat().st_size / 1024:.0f} KiB")


def cases():
    """float32 [n]: representable values, halfway points, and their neighbours, of each format."""
    rng = np.random.default_rng(7)
    halves = np.arange(0, 0x7C01, dtype=np.uint16).view(np.float16).astype(np.float64)
    halves[-1] = 65536.0  # where the format would continue: 65520 is the overflow threshold
    brains = (np.arange(0, 0x7F81, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    brains[-1] = 2.0 ** 128
    eights = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    eights = np.append(eights, 480.0)
    out = []
    for grid, n in ((halves, 110), (brains, 110), (eights, None)):
        at = np.arange(len(grid) - 1)
        if n is not None:  # both ends (subnormals, overflow) and a sample between
            middle = rng.choice(at[24:-12], n, replace=False)
            at = np.concatenate([at[:24], middle, at[-12:]])
        out += [grid[at], (grid[at] + grid[at + 1]) / 2]
    # First subnormals of fp16 and the step to its normals; halfway are the odd multiples of 2^-25.
    out.append(np.arange(1, 64) * 2.0 ** -26)
    out.append(2.0 ** -14 + np.arange(-32, 32) * 2.0 ** -26)
    out.append([448, 449, 463, 464, 465, 479, 480, 512, 1e4, 65504, 65519, 65520, 65536, 1e30])
    out.append(rng.standard_normal(200) * np.exp2(rng.integers(-30, 20, 200)))
    with np.errstate(over="ignore"):
        x = np.concatenate([np.asarray(v, np.float64) for v in out]).astype(np.float32)
    x = x[np.isfinite(x)]
    x = np.unique(np.concatenate([x, np.nextafter(x, np.float32(np.inf)),
                                  np.nextafter(x, np.float32(0))]))
    x = np.concatenate([x, -x])
    special = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001,
                        0x7F801000, 0x7FFFFFFF, 0x7FA00000, 0x00000001, 0x80000001, 0x007FFFFF,
                        0x00000000, 0x80000000, 0x7F7FFFFF, 0xFF7FFFFF], np.uint32)
    return np.concatenate([x, special.view(np.float32)])


def e2m1_cases():
    middle = (E2M1[1:] + E2M1[:-1]) / 2
    x = np.concatenate([E2M1, middle, [6.5, 7, 100, np.inf]]).astype(np.float32)
    x = np.unique(np.concatenate([x, np.nextafter(x, np.float32(np.inf)),
                                  np.nextafter(x, np.float32(0))]))
    return np.concatenate([x, -x])


def e2m1_bits(x):
    """Nearest of the eight magnitudes, ties to the even code, saturating; the sign is kept."""
    distance = np.abs(E2M1.astype(np.float64) - min(abs(float(x)), 6.0))
    nearest = np.flatnonzero(distance == distance.min())
    code = nearest[0] if len(nearest) == 1 or nearest[0] % 2 == 0 else nearest[1]
    return code | (8 if np.signbit(x) else 0)


def check(x, e8m0):
    """PyTorch is a reference here only as far as it agrees with the definitions."""
    n = x.numpy()
    number = ~np.isnan(n)
    with np.errstate(over="ignore"):
        assert (x.to(torch.float16).view(torch.uint16).numpy()[number]
                == n[number].astype(np.float16).view(np.uint16)).all()
    bits = n[number].view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert (x.to(torch.bfloat16).view(torch.uint16).numpy()[number] == rounded).all()
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    eights = x.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    for v, code in zip(n[number], eights[number]):  # saturating, infinity included
        distance = np.abs(grid - min(abs(float(v)), 448.0))
        nearest = np.flatnonzero(distance == distance.min())
        even = nearest[0] if len(nearest) == 1 or nearest[0] % 2 == 0 else nearest[1]
        assert code == (even | (0x80 if np.signbit(v) else 0)), v
    powers = np.exp2(np.arange(255) - 127.0).astype(np.float32)
    assert (e8m0.numpy()[:255] == powers).all() and np.isnan(e8m0.numpy()[255])


if __name__ == "__main__":
    main()
