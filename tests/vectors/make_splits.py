"""Golden encodings of pre-tokenizers: every behaviour of Split with patterns that match anything from
nothing to runs, Digits and Metaspace, as the library tokenizers has them.

Run from the root of the checkout with tokenizers installed:
    python tests/vectors/make_splits.py
Writes tokenizers/splits.jsonl: first {"model": ...}, which all share, then a line a pre-tokenizer with
its texts and their ids.
"""

import json
import pathlib
import random

from tokenizers import Tokenizer

OUT = pathlib.Path(__file__).parent / "tokenizers" / "splits.jsonl"
ALPHABET = "ab 1\uff129-_.\n\tñ漢é  X'"
MERGES = ["ab", "ab a", "19", "\u2581a", "  ", "--", "ba", "aa", "11", "11 9", "__", "éé", "漢漢", "99",
          "\u2581\u2581", "\n\n", "..", "XX", " a", "a "]
PATTERNS = [r"\d+", r"\p{N}", r"\s+", r"[^\s\w]+", r"a|b", r"(?i:x)", r"\h+", r" ?\p{L}+", r"x*", r"(?=a)",
            r"\W", r"[ \t]"]
BEHAVIORS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


def model():
    vocab = {c: i for i, c in enumerate(sorted(set(ALPHABET + "\u2581")))}
    merges = []
    for pair in MERGES:
        left, right = (pair[:-2], pair[-1]) if len(pair) > 2 else pair
        vocab.setdefault(left + right, len(vocab))
        merges.append([left, right])
    return {"type": "BPE", "vocab": vocab, "merges": merges}


def pre_tokenizers():
    for p in PATTERNS:
        for b in BEHAVIORS:
            yield {"type": "Split", "pattern": {"Regex": p}, "behavior": b,
                   "invert": (PATTERNS.index(p) + BEHAVIORS.index(b)) % 2 == 1}
    for s in ["ab", "-"]:
        for b in BEHAVIORS:
            yield {"type": "Split", "pattern": {"String": s}, "behavior": b, "invert": False}
    for each in (True, False):
        yield {"type": "Digits", "individual_digits": each}
    for scheme in ("always", "first", "never"):
        for split in (True, False):
            yield {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}
    yield {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"Regex": " ?\\p{L}+"}, "behavior": "MergedWithNext", "invert": True},
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}]}


def main():
    draw = random.Random(7)
    shared = model()
    with open(OUT, "w", encoding="utf-8") as out:
        out.write(json.dumps({"model": shared}, ensure_ascii=False) + "\n")
        for spec in pre_tokenizers():
            whole = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": shared,
                                                   "pre_tokenizer": spec}))
            texts = ["".join(draw.choice(ALPHABET) for _ in range(draw.randint(1, 20))) for _ in range(6)]
            ids = [whole.encode(t, add_special_tokens=False).ids for t in texts]
            out.write(json.dumps({"pre_tokenizer": spec, "texts": texts, "ids": ids}, ensure_ascii=False) + "\n")


main()
