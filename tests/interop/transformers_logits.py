"""Checkpoints that `transformers` writes, of drawn configurations, by logits.

    pip install torch transformers
    python tests/interop/transformers_logits.py build/amalgam workloads/tiny [CASES [SEED]]

For each architecture (InternLM2 aside, which transformers has not) CASES configurations are drawn: heads,
head_dim, biases, tied embeddings, rotary scalings, windows, experts, dtype, shards. `save_pretrained` writes
each with random weights, as anybody's checkpoint is written; `amalgam eval --logits` and transformers then
score the same ids on the cpu, transformers in f64 from the stored values.

The bound: relative Frobenius norm of the difference. Every linear, norm and softmax of a layer rounds in f32
(u = 2^-24); a product of K terms summed in lanes keeps within a few u sqrt(K), and a layer of three to five of
them after another in a residual stream of 2 to 4 layers within some 50 u sqrt(K): 5e-5 at K = 256 covers it,
and a router that is no tie. What a wrong engine does is above 1e-2: the twin of each case, one norm vector
times 1.1 in transformers, has to pass 1e-3. Prints one line a case and ends with status 1 when one fails.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

BOUND, TWIN = 5e-5, 1e-3
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gpt_oss")
VOCAB = 2048
WINDOW = 129

failed = 0


def rope(draw):
    theta = draw.choice([1e4, 5e5, 1e6])
    original = draw.choice([32, 64])
    return draw.choice([
        {"rope_type": "default", "rope_theta": theta},
        {"rope_type": "linear", "rope_theta": theta, "factor": draw.choice([2.0, 3.5])},
        {"rope_type": "llama3", "rope_theta": theta, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": original},
        {"rope_type": "yarn", "rope_theta": theta, "factor": draw.choice([4.0, 8.0]),
         "original_max_position_embeddings": original, **draw.choice([
             {}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"truncate": False},
             {"attention_factor": 1.25}, {"mscale": 1.0, "mscale_all_dim": 0.5}])},
    ])


def settings(kind, draw):
    head_dim, kv = draw.choice([32, 64]), draw.choice([1, 2, 3])
    heads = kv * draw.choice([1, 2, 4])
    own_dim = kind not in ("llama", "mixtral", "qwen2") or draw.random() < 0.5
    dim = heads * (draw.choice([16, 24, 40]) if own_dim else head_dim)
    layers = draw.choice([2, 3, 4])
    c = {"hidden_size": dim, "intermediate_size": draw.choice([64, 96, 224]), "num_hidden_layers": layers,
         "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": VOCAB,
         "max_position_embeddings": 512, "rms_norm_eps": draw.choice([1e-6, 1e-5]), "bos_token_id": 1,
         "eos_token_id": 2, "tie_word_embeddings": draw.random() < 0.5, "rope_parameters": rope(draw)}
    if own_dim or kind == "mixtral":  # transformers cannot make YaRN for it without
        c["head_dim"] = head_dim
    if kind in ("llama", "qwen3", "qwen3_moe"):
        c["attention_bias"] = draw.random() < 0.5
    if kind in ("mistral", "mixtral"):
        c["sliding_window"] = draw.choice([None, 20, 70])
    if kind in ("qwen2", "qwen3"):
        c.update(draw.choice([{}, {"use_sliding_window": True, "sliding_window": 24,
                                   "max_window_layers": draw.randrange(layers + 1)}]))
    if kind == "qwen3_moe":
        c.update(draw.choice([{}, {"use_sliding_window": True, "sliding_window": 24}]))
        c.update(moe_intermediate_size=draw.choice([32, 64]), num_experts=8,
                 num_experts_per_tok=draw.choice([1, 2, 4]), norm_topk_prob=draw.random() < 0.5)
    if kind in ("mixtral", "gpt_oss"):
        c.update(num_local_experts=draw.choice([4, 8]), num_experts_per_tok=draw.choice([1, 2, 3]))
    if kind == "gpt_oss":
        c["sliding_window"] = draw.choice([16, 40])
    return c


def randomise(model, seed):
    """Scales at which a wrong mask, rotation or bias shows: tests/vectors/make_models.py has the reason."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            z = torch.randn(p.shape, generator=noise)
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.3 * z)
            elif p.dim() == 1 or name.endswith(("bias", "sinks")):
                p.copy_(0.7 * z)
            elif name.endswith("embed_tokens.weight"):
                p.copy_(z * 0.5)
            else:
                inwards = "gpt_oss" in model.config.model_type and ".experts." in name
                p.copy_(z * 1.5 / p.shape[-2 if inwards else -1] ** 0.5)


def theirs(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager",
                                                 experts_implementation="eager")
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
        model.model.norm.weight[:] *= 1.1
        model.model.layers[0].input_layernorm.weight *= 1.1
        return logits, model(ids[None]).logits[0]


def run(folder, kind, seed):
    draw = random.Random(f"{kind} {seed}")
    c, dtype = settings(kind, draw), draw.choice(list(DTYPES))
    shard = draw.choice(["20GB", "300KB"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **c))
    randomise(model, seed)
    model.to(DTYPES[dtype]).save_pretrained(folder, max_shard_size=shard)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(TINY, file), folder)
    path = os.path.join(folder, "logits.safetensors")
    done = subprocess.run([AMALGAM, "eval", "--model", folder, "--text", TEXT, "--window", str(WINDOW),
                           "--stride", "64", "--logits", path], capture_output=True, text=True)
    shown = json.dumps({k: v for k, v in c.items() if k not in ("vocab_size", "bos_token_id")})
    if done.returncode:
        return False, f"{done.stderr.strip()}  {shown}"
    answer = load_file(path)
    logits, twin = theirs(folder, answer["input_ids"].long())
    ours = answer["logits"].double()
    e = ((ours - logits).norm() / logits.norm()).item()
    e_twin = ((ours - twin).norm() / twin.norm()).item()
    good = e <= BOUND and e_twin > TWIN and logits.std() > 0.1
    return good, f"{dtype} {e:.1e} (twin {e_twin:.1e}) {shard} " + ("" if good else shown)


def main():
    global failed
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for kind in TYPES:
        for case in range(CASES):
            with tempfile.TemporaryDirectory() as folder:
                good, shown = run(folder, kind, SEED + case)
            failed += not good
            print(f"{'ok  ' if good else 'FAIL'}  {kind} {SEED + case}  {shown}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


AMALGAM, TINY = sys.argv[1], sys.argv[2]
CASES = int(sys.argv[3]) if len(sys.argv) > 3 else 8
SEED = int(sys.argv[4]) if len(sys.argv) > 4 else 1
TEXT = os.path.join(TINY, "README.md")
sys.exit(main())
