"""Small tokenizers built like those of the real families, and what each makes of a nasty corpus.

Writes, under tokenizers/: corpus.jsonl, invalid_utf8.jsonl and, per family, tokenizer.json,
expected.jsonl (one line per line of the corpus) and decode.jsonl. The training text and the corpus
are in tokenizer_corpus.py. Everything expected comes from reading tokenizer.json back, so that the
file which is tested is the file that was asked.
"""

import json
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tokenizer_corpus import INVALID, cases, training_lines

OUT = Path(__file__).resolve().parent / "tokenizers"

# The families' own patterns.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + TAIL)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?"
         rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + TAIL)
SPM_TRAIN = "\u2581*[^\u2581]+|\u2581+"  # only for training: words and runs of spaces

LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                   "<|end_header_id|>", "<|eot_id|>"]
QWEN2_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GPT_OSS_SPECIALS = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>",
                    "<|end|>", "<|message|>"]


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    corpus = write_corpus()
    for name, make in FAMILIES.items():
        (OUT / name).mkdir()
        path = OUT / name / "tokenizer.json"
        path.write_text(dump(make(), indent=1) + "\n")
        tokenizer = Tokenizer.from_file(str(path))
        write_expected(OUT / name, tokenizer, corpus)
        write_decode(OUT / name, tokenizer)
        print(f"{name:10} vocabulary {tokenizer.get_vocab_size():5} "
              f"file {path.stat().st_size / 1024:.0f} KiB")


# --- families: each returns the content of a tokenizer.json --------------------------------------


def llama3():
    spec = train_bytes(1000, split(LLAMA3))
    drop_merges(spec, ["Ġengine", "Ġhello", "Ġworld", "Ġweights"])
    spec["model"]["ignore_merges"] = True
    spec["post_processor"] = {"type": "Sequence", "processors": [
        byte_level(True, False, True), template("<|begin_of_text|>", len(spec["model"]["vocab"]))]}
    return finish(spec, LLAMA3_SPECIALS, merges_as_strings=True)


def qwen2():
    spec = train_bytes(1200, split(QWEN2), normalizers.NFC())
    # The same holes as llama3, but without ignore_merges: these words must come out in pieces.
    drop_merges(spec, ["Ġengine", "Ġhello"])
    spec["normalizer"] = {"type": "NFC"}
    spec["post_processor"] = byte_level(False, False, False)
    return finish(spec, QWEN2_SPECIALS, merges_as_strings=True)


def gpt_oss():
    spec = train_bytes(1000, split(O200K))
    drop_merges(spec, ["Ġengine", "Ġhello", "The"])
    spec["model"]["ignore_merges"] = True
    spec["post_processor"] = byte_level(True, False, True)
    return finish(spec, GPT_OSS_SPECIALS)


def gpt2():
    spec = train_bytes(700, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    spec["post_processor"] = byte_level(True, False, True)
    return finish(spec, ["<|endoftext|>"], merges_as_strings=True)


def llama2():
    normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                       normalizers.Replace(" ", "\u2581")])
    spec = train_spm(1000, normalizer, pre_tokenizers.Split(Regex(SPM_TRAIN), "isolated"))
    spec["pre_tokenizer"] = None
    return finish_spm(spec, ["<unk>", "<s>", "</s>"], merges_as_strings=True)


def mistral():
    space = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    words = pre_tokenizers.Sequence([space, pre_tokenizers.Split(Regex(SPM_TRAIN), "isolated")])
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"]
    spec = train_spm(1000, None, words, specials)
    spec["pre_tokenizer"] = json.loads(space.__getstate__())
    return finish_spm(spec, specials)


def added():
    """No real family: every flag an added token can carry, over qwen2's pipeline."""
    spec = train_bytes(400, split(QWEN2), normalizers.NFC())
    spec["normalizer"] = {"type": "NFC"}
    spec["post_processor"] = byte_level(False, False, False)
    spec = finish(spec, ["<|endoftext|>", "<s>", "</s>"])
    for content, flags in {
            "<left>": dict(lstrip=True), "<right>": dict(rstrip=True),
            "<both>": dict(lstrip=True, rstrip=True), "word": dict(single_word=True),
            "<caf\u00e9>": dict(normalized=True), "<raw-\u00e9>": dict(normalized=False),
            "<long>": {}, "<longer>": {}, "<longest>": dict(special=True)}.items():
        add_token(spec, content, **flags)
    return spec


FAMILIES = {"llama3": llama3, "qwen2": qwen2, "gpt_oss": gpt_oss, "gpt2": gpt2, "llama2": llama2,
            "mistral": mistral, "added": added}


# --- the parts they are made of ------------------------------------------------------------------


def split(pattern):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_bytes(size, pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(training_lines(), trainers.BpeTrainer(
        vocab_size=size, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    spec = json.loads(tokenizer.to_str())
    spec["decoder"] = byte_level(True, True, True)
    return spec


def train_spm(size, normalizer, pre_tokenizer, specials=("<unk>", "<s>", "</s>")):
    """SentencePiece's order: specials, then the 256 bytes, then what was learnt."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(spm_lines(), trainers.BpeTrainer(
        vocab_size=size, show_progress=False,
        special_tokens=list(specials) + [f"<0x{b:02X}>" for b in range(256)]))
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = []
    return spec


def spm_lines():
    """The training text in an alphabet too small for the corpus, so that bytes must step in.

    Not the trainer's limit_alphabet: it breaks ties by hash order, differently in every run. No
    line feed either, which makes it <0x0A> as in the real vocabularies.
    """
    lines = training_lines()
    count = Counter(c for line in lines for c in line if c > "~")
    common = sorted(count, key=lambda c: (-count[c], c))[:130]
    keep = set(common) | {chr(c) for c in range(0x20, 0x7F)} | {"\t"}
    ascii_once = " ".join(chr(c) for c in range(0x21, 0x7F))
    return ["".join(c for c in line if c in keep) for line in lines] + [ascii_once]


def byte_level(add_prefix_space, trim_offsets, use_regex):
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space,
            "trim_offsets": trim_offsets, "use_regex": use_regex}


def template(token, number):
    sequence = [{"SpecialToken": {"id": token, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}]
    pair = sequence + [{"SpecialToken": {"id": token, "type_id": 1}},
                       {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": sequence, "pair": pair,
            "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}}}


def add_token(spec, content, **flags):
    vocab = spec["model"]["vocab"]
    taken = [t["id"] for t in spec["added_tokens"]]
    number = vocab.get(content, max([*vocab.values(), *taken]) + 1)
    entry = dict(id=number, content=content, single_word=False, lstrip=False, rstrip=False,
                 normalized=False, special=False)
    spec["added_tokens"].append({**entry, **flags})


def drop_merges(spec, words):
    """Leaves the words in the vocabulary but out of reach of merges: ignore_merges matters."""
    merges = spec["model"]["merges"]
    for word in words:
        assert word in spec["model"]["vocab"], word
        kept = [m for m in merges if "".join(m) != word]
        assert len(kept) == len(merges) - 1, word
        merges = kept
    spec["model"]["merges"] = merges


def finish(spec, specials, merges_as_strings=False):
    for content in specials:
        add_token(spec, content, special=True)
    if merges_as_strings:
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    return spec


def finish_spm(spec, specials, **style):
    spec["post_processor"] = template("<s>", 1)
    spec["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    return finish(spec, specials, **style)


# --- corpus and expectations ---------------------------------------------------------------------


def write_corpus():
    invalid = [(data, data.decode("utf-8", errors="replace")) for data in INVALID]
    corpus = cases() + [(f"replaced {i}", text) for i, (_, text) in enumerate(invalid)]
    assert len({name for name, _ in corpus}) == len(corpus)
    write_lines(OUT / "corpus.jsonl", [{"name": name, "text": text} for name, text in corpus])
    write_lines(OUT / "invalid_utf8.jsonl", [{"hex": d.hex(), "text": text} for d, text in invalid])
    print(f"corpus: {len(corpus)} texts, {len(invalid)} of them repaired")
    return corpus


def write_expected(folder, tokenizer, corpus):
    """What equals its source (ids_special its ids, a decoded text the corpus) is left out."""
    rows = []
    for _, source in corpus:
        row = {"ids": tokenizer.encode(source, add_special_tokens=False).ids}
        special = tokenizer.encode(source, add_special_tokens=True).ids
        text = tokenizer.decode(special, skip_special_tokens=True)
        text_special = tokenizer.decode(special, skip_special_tokens=False)
        if special != row["ids"]:
            row["ids_special"] = special
        if text != source:
            row["text"] = text
        if text_special != source:
            row["text_special"] = text_special
        rows.append(row)
    assert all(0 <= i < tokenizer.get_vocab_size() for row in rows for i in row["ids"])
    write_lines(folder / "expected.jsonl", rows)


def write_decode(folder, tokenizer):
    """Texts cut inside a character: what the pieces of a character decode to, alone and in runs."""
    rows = []
    for text in ("\U0001f600", "\u4e2d\u6587", "\u00e9", "a\U0001f468\u200d\U0001f469b",
                 "\u0e01\u0e33\U00010348", "hello \U0001f600 hello"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        cuts = {tuple(c) for c in (ids[:-1], ids[1:], ids[::2], ids[::-1], ids[1:-1])}
        rows += [{"ids": list(c), "text": tokenizer.decode(list(c), skip_special_tokens=False)}
                 for c in sorted(cuts)]
    write_lines(folder / "decode.jsonl", rows)


def write_lines(path, rows):
    assert all(json.loads(dump(row)) == row for row in rows)
    path.write_text("".join(dump(row) + "\n" for row in rows))


def dump(value, indent=None):
    """JSON with readable letters, but with every invisible character escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return "".join(c if visible(c) else escape(c) for c in text)


def visible(c):
    return c in " \n" or (unicodedata.category(c)[0] not in "CZ")


def escape(c):
    return json.dumps(c, ensure_ascii=True)[1:-1] if ord(c) != 0x7F else "\\u007f"


if __name__ == "__main__":
    main()
