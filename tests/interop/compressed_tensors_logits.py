"""Checkpoints between `amalgam` and the compressed-tensors and llm-compressor packages, by logits.

    pip install torch transformers compressed-tensors llmcompressor
    python tests/interop/compressed_tensors_logits.py build/amalgam workloads/tiny

Ours to theirs: `amalgam quantize` writes every format, transformers loads it through compressed-tensors, and
both give logits of the same ids. Theirs to ours: llm-compressor quantises by its own presets, `amalgam` reads.
Both compute in float32. What differs is the type that the packages unpack a weight to: that of its
scale, so 16-bit scales round each weight once (u = 2^-12 in f16, 2^-9 in bf16, at most), and scales in f32,
or a scale that is a power of two, round nothing. The bounds are those of tests/gpu_forward.c, where a 16-bit
device rounds as often: relative Frobenius norm 3e-3 in f16, 8 times as much in bf16; without rounding 1e-5.

Twin: one linear's weights times 1.1 in transformers must pass the widest bound. Prints one line a check
and ends with status 1 when one fails; nothing is skipped.
"""

import os
import subprocess
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.utils import logging

EXACT, F16, BF16 = 1e-5, 3e-3, 8 * 3e-3

# Format, bound, does the package's other way to load (compressed, unpacked in the first forward) work? Not
# with zero points, which compressed-tensors 0.19 and 0.20 shape unpacked when a model is made on no
# device (llm-compressor's own W4A16_ASYM fails alike), and not with 4-bit floats in a float32 model.
OURS = (
    ("W4", F16, False), ("W4g64", F16, False), ("W4g32", F16, False), ("W4gK", F16, False),
    ("W4sym", F16, True), ("W8", EXACT, True), ("W8g64", EXACT, True), ("WFP8", EXACT, True),
    ("WFP8b", EXACT, True), ("WMXFP4", EXACT, False), ("WNVFP4", BF16, False),
)

# llm-compressor's presets, or groups of its own; the precision to read them in.
THEIRS = (
    ("W4A16", "auto"), ("W4A16_ASYM", "auto"), ("W8A8", "auto"), ("FP8_DYNAMIC", "auto"),
    ("FP8_BLOCK", "auto"), ("NVFP4A16", "auto"), ("W8A16", "auto"), ("W8 group 64", "auto"),
    ("W8 group 32 asym", "W16"),
)

failed = 0


def check(name, good, shown):
    global failed
    failed += not good
    print(f"{'ok  ' if good else 'FAIL'}  {name}  {shown}", flush=True)


def amalgam(*arguments):
    done = subprocess.run([AMALGAM, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def ours(folder, precision):
    path = os.path.join(folder, "logits.safetensors")
    amalgam("eval", "--model", folder, "--precision", precision, "--text", TEXT, "--window", "129",
            "--stride", "64", "--logits", path)
    answer = load_file(path)
    os.unlink(path)
    return answer["input_ids"].long(), answer["logits"]


def load(folder, unpacked):
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if unpacked else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                attn_implementation="eager", **extra)


def distance(model, ids, logits):
    with torch.no_grad():
        theirs = model(ids[None]).logits[0].float()
    return ((theirs - logits).norm() / logits.norm()).item()


def compare(name, folder, precision, bound, as_packed):
    ids, logits = ours(folder, precision)
    model = load(folder, True)
    e = distance(model, ids, logits)
    check(name, e <= bound, f"{e:.2e} (at most {bound:g})")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 1.1
    e = distance(model, ids, logits)
    check(name + ", twin", e > BF16, f"{e:.2e}")
    if as_packed:
        e = distance(load(folder, False), ids, logits)
        check(name + ", loaded packed", e <= bound, f"{e:.2e} (at most {bound:g})")


def recipe_of(name):
    from llmcompressor.modifiers.quantization import QuantizationModifier
    if not name.startswith("W8 group"):
        return QuantizationModifier(targets="Linear", scheme=name, ignore=["lm_head"])
    weights = {"num_bits": 8, "type": "int", "symmetric": "asym" not in name, "strategy": "group",
               "group_size": int(name.split()[2])}
    return QuantizationModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
                                ignore=["lm_head"])


def compress(name, folder):
    from llmcompressor import oneshot
    from transformers import AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    oneshot(model=model, recipe=recipe_of(name))
    model.save_pretrained(folder, save_compressed=True)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name, bound, as_packed in OURS:
            out = os.path.join(folder, name)
            amalgam("quantize", "--model", TINY, "--method", "rtn", "--precision", name, "--out", out)
            compare("ours " + name, out, "auto", bound, as_packed)
        for name, precision in THEIRS:
            out = os.path.join(folder, name.replace(" ", "_"))
            compress(name, out)
            compare("theirs " + name, out, precision, BF16, False)
    print(f"{failed} failed")
    return 1 if failed else 0


AMALGAM, TINY = sys.argv[1], sys.argv[2]
TEXT = os.path.join(TINY, "README.md")
sys.exit(main())
