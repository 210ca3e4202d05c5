#!/usr/bin/env python3
"""Train the tiny checkpoint: a byte-level BPE tokenizer and a Llama-architecture model.

    make build
    python3 workloads/tiny/train.py --corpus-binary build/amalgam --out workloads/tiny

All text comes from `amalgam corpus` (engine/corpus.h) under training seeds; every batch is fresh,
so there are no epochs. What is measured uses held-out seeds only. Needs a CUDA GPU for a full run;
with `--device cpu --no-compile --steps 6 --rows 2 --length 256 --held-out-bytes 60000 --tasks 5
--shard-bytes 400000 --tokenizer-bytes 3000000 --workers 1` it shows on a CPU that it works.

Written to --out: config.json, model.safetensors (bf16), tokenizer.json, tokenizer_config.json,
generation_config.json, train.log. The model is Llama as transformers' LlamaForCausalLM defines it;
check_export compares the written files with that class.
"""

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import subprocess
import time

import numpy as np
import torch
import torch.nn.functional as F

VOCAB = 2048
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2; the literals of corpus.h
END = 0
HELD_OUT = 1 << 40  # CORPUS_SEED_HELD_OUT
CONTEXT = 2048
WHOLE_ROW = 1 << 20  # as a quantisation group: per output channel

# The split of Qwen2: single digits, so that arithmetic is not a table of numbers.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": END,
    "eos_token_id": END,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

# Minimal ChatML, as write_chat in corpus.c has it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# What precision costs, by simulation: (name, weight bits, weight group, KV bits).
CUTS = [
    ("W16", None, None, None),
    ("W8 per channel", 8, WHOLE_ROW, None),
    ("W4 g128", 4, 128, None),
    ("W4 per channel", 4, WHOLE_ROW, None),
    ("W3 g128", 3, 128, None),
    ("KV8", None, None, 8),
    ("KV4", None, None, 4),
    ("KV3", None, None, 3),
    ("W4 g128 KV4", 4, 128, 4),
]


# --- Text -----------------------------------------------------------------------------------------


def corpus(binary, *args):
    """What `amalgam corpus ARGS` prints."""
    command = [binary, "corpus", *map(str, args)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode("ascii")


def train_tokenizer(text):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    for literal in SPECIAL[1:]:
        text = text.replace(literal, SPECIAL[END])
    tokenizer.train_from_iterator(text.split(SPECIAL[END]), trainer)
    assert tokenizer.get_vocab_size() == VOCAB, tokenizer.get_vocab_size()
    return tokenizer


def encode_text(tokenizer, text):
    """uint16 ids of whole documents, each followed by the end-of-text token."""
    ids = []
    for encoding in tokenizer.encode_batch(text.split(SPECIAL[END])[:-1]):
        ids.extend(encoding.ids)
        ids.append(END)
    return np.array(ids, dtype=np.uint16)


def encode_seeds(binary, tokenizer_path, seeds, size, out):
    """Worker process: the ids of one training seed after the other."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the parallelism is the workers
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_path)
    for seed in seeds:
        out.put(encode_text(tokenizer, corpus(binary, "--seed", seed, "--bytes", size)))


def shards(args, tokenizer_path):
    """Ids of seeds 1, 2, 3, ..., in this order whatever the number of workers. Each worker stays a
    bounded number of seeds ahead; they end with this process."""
    context = multiprocessing.get_context("spawn")
    queues = []
    for worker in range(args.workers):
        seeds = range(1 + worker, HELD_OUT, args.workers)
        queues.append(context.Queue(maxsize=4))
        arguments = (args.corpus_binary, tokenizer_path, seeds, args.shard_bytes, queues[-1])
        context.Process(target=encode_seeds, args=arguments, daemon=True).start()
    while True:
        for q in queues:
            yield q.get()


def cut_rows(ids, length, rng):
    """Rows of length + 1 ids. Half begin where the last one ended; the other half begin with a
    document, and half of those behind the end-of-text token before it: prompts with and without a
    leading token both occur."""
    ends = np.flatnonzero(ids == END)
    rows, at = [], 0
    while at + length + 1 <= len(ids):
        rows.append(ids[at : at + length + 1])
        at += length
        if rng.random() < 0.5:
            k = np.searchsorted(ends, at)
            at = int(ends[k]) + int(rng.random() < 0.5) if k < len(ends) else len(ids)
    return np.stack(rows)[rng.permutation(len(rows))]


def batches(args, tokenizer_path):
    rng = np.random.default_rng(args.seed)
    for ids in shards(args, tokenizer_path):
        rows = torch.from_numpy(cut_rows(ids, args.length, rng).astype(np.int32)).to(args.device)
        for i in range(0, len(rows) - args.rows + 1, args.rows):
            yield rows[i : i + args.rows].long()


# --- Model ----------------------------------------------------------------------------------------


def rms_norm(x, weight):
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"])
    return (x32 * scale).type_as(x) * weight.type_as(x)


def rope_tables(length):
    d = CONFIG["head_dim"]
    frequency = CONFIG["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    angle = torch.cat([angle, angle], dim=-1)  # [T, D]: i is paired with i + D/2
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x * cos + turned * sin).type_as(x)


def fake_quantise(x, bits, group):
    """Rounded to nearest, asymmetric, over groups of `group` along the last dimension."""
    if bits is None:
        return x
    x32 = x.float().reshape(-1, min(group, x.shape[-1]))
    lo, hi = x32.amin(-1, keepdim=True), x32.amax(-1, keepdim=True)
    step = ((hi - lo) / (2**bits - 1)).clamp_min(1e-8)
    return (((x32 - lo) / step).round() * step + lo).reshape(x.shape).type_as(x)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        e, f, d = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
        h, g = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        linear = lambda k, n: torch.nn.Linear(k, n, bias=False)
        self.input_layernorm = torch.nn.Parameter(torch.ones(e))
        self.q_proj, self.k_proj, self.v_proj = linear(e, h * d), linear(e, g * d), linear(e, g * d)
        self.o_proj = linear(h * d, e)
        self.post_attention_layernorm = torch.nn.Parameter(torch.ones(e))
        self.gate_proj, self.up_proj, self.down_proj = linear(e, f), linear(e, f), linear(f, e)

    def forward(self, x, cos, sin, mask, cache, kv_bits):
        n, t, _ = x.shape
        d = CONFIG["head_dim"]
        y = rms_norm(x, self.input_layernorm)
        heads = lambda z: z.view(n, t, -1, d).transpose(1, 2)  # [n, heads, T, D]
        q = rotate(heads(self.q_proj(y)), cos, sin)
        k = rotate(heads(self.k_proj(y)), cos, sin)
        v = heads(self.v_proj(y))
        k, v = fake_quantise(k, kv_bits, d), fake_quantise(v, kv_bits, d)
        if cache is not None:
            end = cache["at"] + t
            cache["k"][:, :, cache["at"] : end], cache["v"][:, :, cache["at"] : end] = k, v
            k, v = cache["k"][:, :, :end], cache["v"][:, :, :end]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        x = x + self.o_proj(y.transpose(1, 2).reshape(n, t, -1))
        y = rms_norm(x, self.post_attention_layernorm)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(VOCAB, CONFIG["hidden_size"])
        self.layers = torch.nn.ModuleList(Block() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = torch.nn.Parameter(torch.ones(CONFIG["hidden_size"]))
        depth = 2 * CONFIG["num_hidden_layers"]
        for name, p in self.named_parameters():
            if p.dim() == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                torch.nn.init.normal_(p, std=0.02 / math.sqrt(depth) if out else 0.02)
        cos, sin = rope_tables(CONTEXT)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden(self, ids, position=None, mask=None, caches=None, kv_bits=None):
        """[n, T, E] after the last norm; `position` [n, T] where it is not 0, 1, 2, ..."""
        if position is None:
            cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        else:
            cos, sin = self.cos[position].unsqueeze(1), self.sin[position].unsqueeze(1)
        x = self.embed_tokens(ids)
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, mask, caches[i] if caches else None, kv_bits)
        return rms_norm(x, self.norm)

    def logits(self, hidden):
        return F.linear(hidden, self.embed_tokens.weight)

    def forward(self, rows):
        logits = self.logits(self.hidden(rows[:, :-1]))
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def copy_of(model, dtype, bits=None, group=None):
    """For evaluation: parameters in `dtype`, the linear weights of the blocks rounded to `bits`."""
    copy = Llama().to(model.embed_tokens.weight.device)
    copy.load_state_dict(model.state_dict())
    for name, p in copy.named_parameters():
        p.requires_grad_(False)
        p.data = p.data.to(dtype)
        if name.endswith("_proj.weight"):
            p.data = fake_quantise(p.data, bits, group)
    return copy


# --- Evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model, ids, kv_bits=None):
    """Over rows of one whole context each, in which all tokens but the first are predicted."""
    device = model.embed_tokens.weight.device
    n = len(ids) // CONTEXT * CONTEXT
    rows = torch.from_numpy(ids[:n].astype(np.int64)).view(-1, CONTEXT)
    total = 0.0
    for i in range(0, len(rows), 32):
        row = rows[i : i + 32].to(device)
        logits = model.logits(model.hidden(row, kv_bits=kv_bits)[:, :-1]).float()
        total += F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (len(rows) * (CONTEXT - 1)))


@torch.no_grad()
def exact_answers(model, tokenizer, tasks, kv_bits=None, max_new=8):
    """Per cent of the tasks whose greedy continuation begins with the answer. Prompts are padded on
    the left; positions and mask leave the padding out."""
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    g, d = CONFIG["num_key_value_heads"], CONFIG["head_dim"]
    right = 0
    tasks = sorted(tasks, key=lambda task: len(task["prompt"]))
    for i in range(0, len(tasks), 125):
        part = tasks[i : i + 125]
        prompts = [e.ids for e in tokenizer.encode_batch([task["prompt"] for task in part])]
        n, t = len(part), max(map(len, prompts))
        size = t + max_new
        ids = torch.zeros(n, t, dtype=torch.long)
        valid = torch.ones(n, size, dtype=torch.bool)
        for r, prompt in enumerate(prompts):
            ids[r, t - len(prompt) :] = torch.tensor(prompt)
            valid[r, : t - len(prompt)] = False
        step, valid = ids.to(device), valid.to(device)
        position = (valid.long().cumsum(1) - 1).clamp_min(0)
        causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
        own = torch.eye(size, dtype=torch.bool, device=device)  # padding sees itself: no empty row
        mask = (causal & valid[:, None, :] | own)[:, None]  # [n, 1, size, size]
        caches = [
            {x: torch.zeros(n, g, size, d, device=device, dtype=dtype) for x in "kv"}
            for _ in model.layers
        ]
        said, at = [], 0
        for _ in range(max_new):
            end = at + step.shape[1]
            for cache in caches:
                cache["at"] = at
            hidden = model.hidden(
                step, position[:, at:end], mask[:, :, at:end, :end], caches, kv_bits
            )
            step = model.logits(hidden[:, -1:]).argmax(-1)
            said.append(step)
            at = end
        for task, answer in zip(part, torch.cat(said, 1).tolist()):
            text = tokenizer.decode(answer, skip_special_tokens=False)
            right += text.startswith(task["answer"])
    return 100 * right / len(tasks)


class HeldOut:
    """Held-out text and tasks, made once."""

    def __init__(self, args, tokenizer):
        self.tokenizer = tokenizer
        ask = lambda *more: corpus(args.corpus_binary, *more)
        text = lambda *more: encode_text(tokenizer, ask("--bytes", args.held_out_bytes, *more))
        self.text = text("--seed", HELD_OUT)
        self.story = text("--seed", HELD_OUT, "--kind", "story")
        tasks = lambda kind, *more: [
            json.loads(line)
            for line in ask(
                "--tasks", kind, "--seed", HELD_OUT, "--count", args.tasks, *more
            ).splitlines()
        ]
        self.tasks = {f"sum{d}": tasks("arithmetic", "--digits", d) for d in (2, 3, 4)}
        for s in (0, 20, 40, 80):
            self.tasks[f"recall{s}"] = tasks("recall", "--pairs", 12, "--sentences", s)

    def measure(self, model, kv_bits=None, share=1):
        """A row of figures, from a 1/share of everything."""
        cut = lambda x: x[: len(x) // share]
        row = {
            "ppl": perplexity(model, cut(self.text), kv_bits),
            "ppl_story": perplexity(model, cut(self.story), kv_bits),
        }
        for name, tasks in self.tasks.items():
            row[name] = exact_answers(model, self.tokenizer, cut(tasks), kv_bits)
        form = lambda k, v: f"{k} {v:.4f}" if k.startswith("ppl") else f"{k} {v:5.1f}"
        return "  ".join(form(k, v) for k, v in row.items())


# --- Training -------------------------------------------------------------------------------------


def learning_rate(args, step):
    """Linear warm-up, then a cosine to 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))


def train(args, model, tokenizer_path, held_out, log):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device == "cuda"
    )
    forward = torch.compile(model) if args.compile else model
    source = batches(args, tokenizer_path)
    seconds = probed = 0.0  # training time, evaluation left out
    losses = []
    mark = time.monotonic()
    for step in range(1, 1 << 30):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step - 1)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = forward(next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

        last = step == args.steps
        if step % args.log_every == 0 or last:
            mean = torch.stack(losses).mean().item()  # waits for the device
            losses.clear()
            now = time.monotonic()
            speed = (step % args.log_every or args.log_every) / (now - mark)
            seconds, mark = seconds + now - mark, now
            tokens = step * args.rows * args.length
            log(f"step {step}  tokens {tokens / 1e6:.1f}M  loss {mean:.4f}  "
                f"lr {learning_rate(args, step - 1):.2e}  {speed:.2f} steps/s  {seconds:.0f} s")
            if args.seconds and step == 2 * args.log_every:
                args.steps = step + max(200, int((args.seconds - seconds) * speed))
                log(f"{args.steps} steps fit {args.seconds:.0f} s")
        if step % args.eval_every == 0 or last:
            row = held_out.measure(copy_of(model, torch.bfloat16), share=5)
            log(f"step {step}  held-out: {row}")
            export(args, model)
            mark = time.monotonic()
        if last:
            break


# --- Export ---------------------------------------------------------------------------------------


def hf_name(name):
    """layers.0.q_proj.weight -> model.layers.0.self_attn.q_proj.weight."""
    parts = name.split(".")
    if parts[-1] != "weight":
        parts.append("weight")
    if parts[0] == "layers" and parts[2].endswith("_proj"):
        parts.insert(2, "self_attn" if parts[2][0] in "qkvo" else "mlp")
    return "model." + ".".join(parts)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def export(args, model):
    from safetensors.torch import save_file

    tensors = {
        hf_name(name): p.detach().to("cpu", torch.bfloat16).contiguous()
        for name, p in model.named_parameters()
    }
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    (args.out / "model.safetensors").chmod(0o644)
    write_json(args.out / "config.json", CONFIG)
    generation = {"bos_token_id": END, "eos_token_id": [0, 2], "pad_token_id": END}
    write_json(args.out / "generation_config.json", generation | {"do_sample": False})
    flags = ("lstrip", "normalized", "rstrip", "single_word")
    added = {
        str(i): {"content": t} | dict.fromkeys(flags, False) | {"special": True}
        for i, t in enumerate(SPECIAL)
    }
    write_json(
        args.out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": SPECIAL[2],
            "pad_token": SPECIAL[END],
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "added_tokens_decoder": added,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def check_export(args, model, held_out, log):
    """The files, loaded by transformers, against the model that wrote them; then a conversation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    ours = copy_of(copy_of(model, torch.bfloat16), torch.float32).cpu()
    row = torch.from_numpy(held_out.text[:512].astype(np.int64))[None]
    with torch.no_grad():
        a, b = theirs(row).logits, ours.logits(ours.hidden(row))
    error = ((a - b).norm() / a.norm()).item()
    log(f"exported files in transformers, f32: relative error of the logits {error:.1e}")
    assert error < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    for question in ("What is 412 + 391?", "Tell me a story about Nora and a green kite."):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        assert chat == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", chat
        ids = tokenizer(chat, return_tensors="pt").input_ids
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60)
        log(f"chat: {json.dumps(tokenizer.decode(out[0]))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus-binary", required=True, help="the amalgam binary")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=0, help="choose --steps from the speed")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--shard-bytes", type=int, default=12_000_000)
    parser.add_argument("--tokenizer-bytes", type=int, default=32_000_000)
    parser.add_argument("--held-out-bytes", type=int, default=3_000_000)
    parser.add_argument("--tasks", type=int, default=1000, help="held-out tasks of each sort")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--eval-every", type=int, default=2000)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    log_file = open(args.out / "train.log", "w")

    def log(line):
        print(line, flush=True)
        print(line, file=log_file, flush=True)

    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    log(f"torch {torch.__version__} on {name}")
    skipped = ("corpus_binary", "out", "workers")
    log("options: " + "  ".join(f"{k} {v}" for k, v in vars(args).items() if k not in skipped))

    # Seed 0 makes the tokenizer; batches come from seeds 1, 2, 3, ...
    text = corpus(args.corpus_binary, "--seed", 0, "--bytes", args.tokenizer_bytes)
    tokenizer = train_tokenizer(text)
    tokenizer_path = str(args.out / "tokenizer.json")
    tokenizer.save(tokenizer_path, pretty=False)
    held_out = HeldOut(args, tokenizer)
    log(f"held-out text: {args.held_out_bytes} bytes, {len(held_out.text)} tokens; "
        f"stories alone: {len(held_out.story)} tokens")

    model = Llama().to(args.device)
    log(f"parameters: {sum(p.numel() for p in model.parameters())}")
    train(args, model, tokenizer_path, held_out, log)

    check_export(args, model, held_out, log)
    log(f"final, held-out, bf16, {args.tasks} tasks of each sort, exact answers in %; "
        "sumN: operands of N digits; recallS: 12 pairs, S sentences before the question")
    for name, bits, group, kv_bits in CUTS:
        cut = copy_of(model, torch.bfloat16, bits, group)
        log(f"{name:15s} {held_out.measure(cut, kv_bits)}")
    total = sum((args.out / f).stat().st_size for f in ("model.safetensors", "tokenizer.json"))
    log(f"model.safetensors + tokenizer.json: {total / 1e6:.2f} MB")
    assert total <= 12e6


if __name__ == "__main__":
    main()
