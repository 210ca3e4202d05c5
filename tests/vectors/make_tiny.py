"""What the references make of workloads/tiny: logits of transformers in float32 and token ids.

Writes, under tiny/: golden.safetensors (input_ids [T], logits [T, V]) and expected.jsonl (ids of each
line of tokenizers/corpus.jsonl, as make_tokenizers.py writes them).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from make_tokenizers import write_expected

HERE = Path(__file__).resolve().parent
TINY = HERE.parent.parent / "workloads" / "tiny"
OUT = HERE / "tiny"
TEXT = ("Once upon a time there was a clever girl named Nora who lived in a town near the sea.\n"
        "412 + 391 = 803\n2082 + 3465 = 5547\n"
        "The number 111 was painted on the green basket. \"Good morning,\" said Peter.\n") * 2
T = 72


def main():
    OUT.mkdir(exist_ok=True)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids[:T]
    assert len(ids) == T
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float().contiguous()
    save_file({"input_ids": torch.tensor(ids, dtype=torch.int32), "logits": logits},
              str(OUT / "golden.safetensors"))
    corpus = [json.loads(line) for line in open(HERE / "tokenizers" / "corpus.jsonl")]
    write_expected(OUT, tokenizer, [(row["name"], row["text"]) for row in corpus])
    print(f"{T} tokens, {logits.shape[1]} logits each, {len(corpus)} texts")


main()
