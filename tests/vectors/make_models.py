"""Tiny random checkpoints of every supported architecture, with the logits Hugging Face gives them.

Writes models/<name>/{config.json, config_v4.json, model*.safetensors, golden.safetensors} and
rope.json beside this script. Weights are drawn in float32, rounded to the dtype the checkpoint
stores, and the reference is computed in float32 from those stored values by loading the folder
that was just written (so Hugging Face itself reads the names and layouts tested here).

Scales are not those of a fresh model: with std 0.02 every logit is close to zero and attention is
flat, so a wrong mask or a wrong rotation would hide in the rounding. Each folder is therefore also
run once with its feature taken away, and the script stops unless the logits move a lot.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = Path(__file__).resolve().parent
OUT = HERE / "models"
TOKENS = 80  # past one 64-token page, and past every sliding window below
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MOE_MARGIN = 0.02  # least distance between the last chosen and the first refused router logit

# The dimensions most checkpoints share; two KV groups where the budget allows it.
SMALL = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, vocab_size=128, max_position_embeddings=256,
             bos_token_id=1, eos_token_id=2)
WIDE_HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32)


def rope(kind="default", theta=10000.0, **more):
    return {"rope_type": kind, "rope_theta": theta, **more}


YARN = dict(factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
GPT_OSS_YARN = dict(factor=8.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                    original_max_position_embeddings=32)

# name: model_type, dtype, settings; `without` takes the tested feature away and must change logits;
# `v4` are keys which only the transformers 4 spelling carries; `drop` are keys it does not know.
MODELS = {
    "llama": dict(
        type="llama", dtype="bfloat16",
        config=dict(vocab_size=256, rms_norm_eps=1e-5, rope_parameters=rope()),
        without=dict(rope_parameters=rope(theta=500.0)), drop=["head_dim"]),
    "llama_rope_llama3": dict(
        type="llama", dtype="float16", shards=2,
        config=dict(rms_norm_eps=1e-5, rope_parameters=rope("llama3", 10000.0, **LLAMA3)),
        without=dict(rope_parameters=rope())),
    "llama_rope_linear": dict(
        type="llama", dtype="float32",
        config=dict(intermediate_size=32, rms_norm_eps=1e-6,
                    rope_parameters=rope("linear", factor=2.0)),
        without=dict(rope_parameters=rope()), spelling="type"),
    "llama_bias_tied": dict(
        type="llama", dtype="bfloat16",
        config=dict(attention_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-5,
                    rope_parameters=rope())),
    "qwen2": dict(
        type="qwen2", dtype="bfloat16",
        config=dict(rms_norm_eps=1e-6, rope_parameters=rope(theta=1000000.0)),
        without=dict(rope_parameters=rope()),
        # A window that is switched off: real Qwen2.5 files carry one and it must be ignored.
        v4=dict(sliding_window=16, use_sliding_window=False, max_window_layers=1),
        drop=["layer_types"]),
    "qwen2_yarn": dict(
        type="qwen2", dtype="bfloat16",
        config=dict(rms_norm_eps=1e-6, rope_parameters=rope("yarn", 1000000.0, **YARN)),
        without=dict(rope_parameters=rope(theta=1000000.0)), spelling="type",
        v4=dict(sliding_window=16, use_sliding_window=False, max_window_layers=1),
        drop=["layer_types"]),
    "qwen3": dict(
        type="qwen3", dtype="bfloat16",
        config=dict(**WIDE_HEADS, tie_word_embeddings=True, rms_norm_eps=1e-6,
                    rope_parameters=rope(theta=1000000.0)),
        v4=dict(sliding_window=None, use_sliding_window=False, max_window_layers=2),
        drop=["layer_types"]),
    "qwen3_moe": dict(
        type="qwen3_moe", dtype="bfloat16",
        config=dict(head_dim=32, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3,
                    norm_topk_prob=True, rms_norm_eps=1e-6, decoder_sparse_step=1,
                    rope_parameters=rope(theta=1000000.0)),
        without=dict(norm_topk_prob=False), rename={"num_local_experts": "num_experts"}),
    "mistral": dict(
        type="mistral", dtype="bfloat16",
        config=dict(intermediate_size=32, head_dim=32, sliding_window=None, rms_norm_eps=1e-5,
                    rope_parameters=rope(theta=1000000.0))),
    "mistral_window": dict(
        type="mistral", dtype="float16",
        config=dict(intermediate_size=32, sliding_window=24, rms_norm_eps=1e-5,
                    rope_parameters=rope()),
        without=dict(sliding_window=None), drop=["head_dim"]),
    "mixtral": dict(
        type="mixtral", dtype="bfloat16",
        config=dict(intermediate_size=32, num_local_experts=4, num_experts_per_tok=2,
                    rms_norm_eps=1e-5, rope_parameters=rope(theta=1000000.0)),
        without=dict(num_experts_per_tok=1), drop=["head_dim"]),
    "gpt_oss": dict(
        type="gpt_oss", dtype="bfloat16",
        config=dict(intermediate_size=32, head_dim=32, num_local_experts=4, num_experts_per_tok=2,
                    sliding_window=16, layer_types=["sliding_attention", "full_attention"],
                    rms_norm_eps=1e-5, attention_bias=True, swiglu_limit=7.0,
                    rope_parameters=rope("yarn", 150000.0, **GPT_OSS_YARN)),
        without=dict(sliding_window=256), drop=["swiglu_alpha"],
        v4=dict(experts_per_token=2, initial_context_length=32)),
    "internlm2": dict(
        type="llama", dtype="bfloat16",
        config=dict(hidden_size=128, intermediate_size=32, num_attention_heads=4,
                    num_key_value_heads=2, rms_norm_eps=1e-5,
                    # As InternLM2.5 has it; below max_position_embeddings it changes nothing.
                    rope_parameters=rope("dynamic", 1000000.0, factor=2.0)),
        without=dict(rope_parameters=rope(theta=500.0)), spelling="type", drop=["head_dim"]),
}


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, (name, spec) in enumerate(MODELS.items(), start=1):
        make_model(name, spec, seed)
    write_rope()


def make_model(name, spec, seed):
    folder = OUT / name
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(spec["type"], **{**SMALL, **spec["config"]})
    weights = random_weights(config, spec["dtype"], seed)
    config.dtype = DTYPES[spec["dtype"]]  # from_config has just set it to float32
    write_configs(folder, config, spec)
    write_weights(folder, split_experts(spec["type"], weights), spec.get("shards", 1))
    tokens = choose_tokens(folder, config, seed)
    logits = run(folder, tokens)
    check_golden(name, folder, spec, weights, tokens, logits)
    if name == "internlm2":
        rewrite_as_internlm2(folder, weights)
    write_golden(folder, tokens, logits)
    if spec["type"] in ("qwen3_moe", "mixtral"):
        make_fused(name, folder, weights, tokens, logits)
    report(name, folder, logits)


# --- weights -------------------------------------------------------------------------------------


def random_weights(config, dtype, seed):
    """name -> tensor, in the names and shapes that the modules hold in memory."""
    draw = torch.Generator().manual_seed(seed)
    state = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: random_tensor(config, name, t.shape, draw).to(DTYPES[dtype]).contiguous()
            for name, t in sorted(state.items())}


def random_tensor(config, name, shape, draw):
    noise = torch.randn(tuple(shape), generator=draw)
    if name.endswith("norm.weight"):
        return 1.0 + 0.3 * noise
    if name.endswith("bias") or name.endswith("sinks"):
        return 0.7 * noise
    if name.endswith("embed_tokens.weight"):
        return noise * (0.4 if config.tie_word_embeddings else 1.0)
    # gpt_oss experts are stored [experts, in, out]; every other matrix is [.., out, in].
    transposed = config.model_type == "gpt_oss" and ".experts." in name
    fan_in = shape[-2] if transposed else shape[-1]
    gain = 1.5
    if name.endswith(("gate.weight", "router.weight", "lm_head.weight")):
        gain = 3.0
    elif transposed and "gate_up" in name:
        gain = 4.0  # wide enough that the clamp at 7 is reached on both sides
    return noise * gain / fan_in ** 0.5


def split_experts(model_type, weights):
    """The in-memory fused experts as the one-tensor-per-expert names of the published files."""
    if model_type not in ("qwen3_moe", "mixtral"):
        return weights
    names = {"qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
             "mixtral": ("block_sparse_moe", "w1", "w3", "w2")}[model_type]
    block, gate, up, down = names
    out = {}
    for name, tensor in weights.items():
        layer = name.split(".mlp.")[0]
        if name.endswith("experts.gate_up_proj"):
            for e, fused in enumerate(tensor):
                halves = fused.chunk(2, dim=0)
                out[f"{layer}.{block}.experts.{e}.{gate}.weight"] = halves[0].contiguous()
                out[f"{layer}.{block}.experts.{e}.{up}.weight"] = halves[1].contiguous()
        elif name.endswith("experts.down_proj"):
            for e, one in enumerate(tensor):
                out[f"{layer}.{block}.experts.{e}.{down}.weight"] = one.contiguous()
        else:
            out[name.replace(".mlp.", f".{block}.")] = tensor
    return out


def write_weights(folder, weights, shards=1):
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    # Round robin, so that the two halves of one layer do lie in different files.
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
             for i, name in enumerate(sorted(weights))}
    for file in sorted(set(where.values())):
        part = {name: weights[name] for name in weights if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in weights.values())
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": total}, "weight_map": where})


def make_fused(name, folder, weights, tokens, logits):
    """A twin folder that keeps the experts in the 3-D tensors of transformers 5's modules."""
    twin = OUT / f"{name}_fused"
    twin.mkdir()
    for config in ("config.json", "config_v4.json"):
        shutil.copy(folder / config, twin)
    write_weights(twin, weights)
    assert torch.equal(run(twin, tokens), logits), name
    write_golden(twin, tokens, logits)
    report(twin.name, twin, logits)


def rewrite_as_internlm2(folder, weights):
    """Renames the llama twin; wqkv holds, per KV group, its query heads, its key, its value."""
    config = json.loads((folder / "config.json").read_text())
    groups, heads = config["num_key_value_heads"], config["num_attention_heads"]
    dim = config["hidden_size"] // heads
    out = {"model.tok_embeddings.weight": weights["model.embed_tokens.weight"],
           "model.norm.weight": weights["model.norm.weight"],
           "output.weight": weights["lm_head.weight"]}
    plain = {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
             "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
             "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for old, new in plain.items():
            out[f"{layer}{new}.weight"] = weights[f"{layer}{old}.weight"]
        q, k, v = (weights[f"{layer}self_attn.{x}_proj.weight"]
                   .reshape(groups, -1, dim, heads * dim) for x in "qkv")
        out[f"{layer}attention.wqkv.weight"] = \
            torch.cat([q, k, v], dim=1).reshape(-1, heads * dim).contiguous()
    (folder / "model.safetensors").unlink()
    write_weights(folder, out)
    for path in (folder / "config.json", folder / "config_v4.json"):
        config = json.loads(path.read_text())
        config.update(model_type="internlm2", architectures=["InternLM2ForCausalLM"], bias=False)
        for key in ("attention_bias", "mlp_bias", "head_dim"):
            config.pop(key, None)
        write_json(path, config)


# --- configurations ------------------------------------------------------------------------------


def write_configs(folder, config, spec):
    """config.json as transformers 5 saves it, config_v4.json as transformers 4 spelled the same."""
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    now = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", now)
    old = {k: v for k, v in now.items() if k not in spec.get("drop", []) and k != "_name_or_path"}
    for ours, theirs in spec.get("rename", {}).items():
        if ours in old:
            old[theirs] = old.pop(ours)
    parameters = dict(old.pop("rope_parameters"))
    old["rope_theta"] = parameters.pop("rope_theta")
    old["rope_scaling"] = parameters if parameters["rope_type"] != "default" else None
    if old["rope_scaling"] and spec.get("spelling") == "type":  # before transformers 4.43
        parameters["type"] = parameters.pop("rope_type")
    old["torch_dtype"] = old.pop("dtype")
    old["transformers_version"] = "4.46.0"
    old.update(spec.get("v4", {}))
    write_json(folder / "config_v4.json", old)


def load(folder, config_name="config.json", **changes):
    """The folder's model in float32; changes override its configuration."""
    with tempfile.TemporaryDirectory() as temp:
        for file in folder.iterdir():
            if not file.name.startswith("config"):
                shutil.copy(file, temp)
        shutil.copy(folder / config_name, Path(temp) / "config.json")
        config = AutoConfig.from_pretrained(temp, **changes)
        model, info = AutoModelForCausalLM.from_pretrained(
            temp, config=config, dtype=torch.float32, attn_implementation="eager",
            experts_implementation="eager", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def run(folder, tokens, config_name="config.json", **changes):
    with torch.no_grad():
        return load(folder, config_name, **changes)(tokens[None], use_cache=False).logits[0].clone()


# --- goldens and what is asked of them -----------------------------------------------------------


def choose_tokens(folder, config, seed):
    """Random tokens; for MoE, drawn again until no routing decision is close to a tie."""
    model = load(folder)
    routers = [m for n, m in model.named_modules() if type(m).__name__.endswith("TopKRouter")]
    gaps = []

    def keep_gap(module, _, output):
        top = output[0].topk(config.num_experts_per_tok + 1, dim=-1).values
        gaps.append((top[:, -2] - top[:, -1]).min().item())

    for router in routers:
        router.register_forward_hook(keep_gap)
    for attempt in range(5000):
        draw = torch.Generator().manual_seed(1000 * seed + attempt)
        tokens = torch.randint(0, config.vocab_size, (TOKENS,), generator=draw)
        gaps.clear()
        with torch.no_grad():
            model(tokens[None], use_cache=False)
        if not gaps or min(gaps) > MOE_MARGIN:
            return tokens
    raise SystemExit(f"{folder.name}: no tokens with clear routing")


def check_golden(name, folder, spec, weights, tokens, logits):
    assert torch.isfinite(logits).all() and logits.std() > 1, name
    assert torch.equal(run(folder, tokens, "config_v4.json"), logits), f"{name}: config_v4 differs"
    if "without" in spec:
        moved = (run(folder, tokens, **spec["without"]) - logits).abs().max()
        assert moved > 0.5, f"{name}: {spec['without']} moves logits by {moved} only"
    model = load(folder)
    with torch.no_grad():
        attentions = torch.stack(model(tokens[None], output_attentions=True).attentions)
    mean = attentions.max(-1).values.mean()
    assert 0.15 < mean < 0.95, f"{name}: attention is flat or one-hot, mean largest weight {mean}"
    check_vectors(name, model, tokens, logits)
    if spec["type"] == "gpt_oss":
        check_gpt_oss(model, tokens)


def check_vectors(name, model, tokens, logits):
    """Every bias, norm and sink matters: a neutral one in its place moves the logits."""
    neutral = {"norm.weight": 1.0, "bias": 0.0, "sinks": -100.0}
    for which, parameter in model.named_parameters():
        value = [v for end, v in neutral.items() if which.endswith(end)]
        if not value:
            assert parameter.dim() > 1, which
            continue
        with torch.no_grad():
            kept = parameter.clone()
            parameter.fill_(value[0])
            moved = (model(tokens[None], use_cache=False).logits[0] - logits).abs().max()
            parameter.copy_(kept)
        assert moved > 0.5, f"{name}: {which} moves logits by {moved} only"


def check_gpt_oss(model, tokens):
    """The clamps are reached: gate above, up above and below; and gate has no clamp below."""
    high = []
    experts = model.model.layers[0].mlp.experts
    plain = experts._apply_gate

    def watch(gate_up):
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        high.append([(gate > 7).any(), (up > 7).any(), (up < -7).any(), (gate < -7).any()])
        return plain(gate_up)

    experts._apply_gate = watch
    with torch.no_grad():
        model(tokens[None], use_cache=False)
    assert all(torch.tensor(high).any(dim=0)), "a clamp was never reached"


def write_golden(folder, tokens, logits):
    save_file({"input_ids": tokens.to(torch.int32), "logits": logits.contiguous()},
              folder / "golden.safetensors")
    assert set(load_file(folder / "golden.safetensors")) == {"input_ids", "logits"}


def report(name, folder, logits):
    size = sum(f.stat().st_size for f in folder.glob("model*.safetensors"))
    print(f"{name:20} {size / 1024:6.0f} KiB  logits std {logits.std():.2f} "
          f"range {logits.min():.1f}..{logits.max():.1f}")


# --- rope.json -----------------------------------------------------------------------------------

# name: model_type, settings, length at which the frequencies are asked for (dynamic only).
ROPES = {
    "llama2_7b_default": ("llama", 4096, 128, rope(theta=10000.0), None),
    "llama2_7b_linear2": ("llama", 4096, 128, rope("linear", 10000.0, factor=2.0), None),
    "llama31_8b": ("llama", 131072, 128, rope(
        "llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192), None),
    "qwen25_yarn4": ("llama", 32768, 128, rope(
        "yarn", 1000000.0, factor=4.0, original_max_position_embeddings=32768), None),
    "qwen3_yarn4_theta5e6": ("llama", 131072, 128, rope(
        "yarn", 5000000.0, factor=4.0, original_max_position_embeddings=32768), None),
    "yarn_given_attention_factor": ("llama", 131072, 64, rope(
        "yarn", 1000000.0, factor=4.0, original_max_position_embeddings=32768,
        attention_factor=1.25, beta_fast=16.0, beta_slow=2.0), None),
    "gpt_oss_yarn32": ("gpt_oss", 131072, 64, rope(
        "yarn", 150000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=4096), None),
    "dynamic2_within": ("llama", 32768, 128, rope("dynamic", 1000000.0, factor=2.0), 32768),
    "dynamic2_at_50000": ("llama", 32768, 128, rope("dynamic", 1000000.0, factor=2.0), 50000),
}


def write_rope():
    rows = []
    for name, (kind, positions, head_dim, parameters, length) in ROPES.items():
        config = AutoConfig.for_model(kind, hidden_size=head_dim * 32, num_attention_heads=32,
                                      head_dim=head_dim, max_position_embeddings=positions,
                                      rope_parameters=dict(parameters))
        if parameters["rope_type"] == "default":
            model = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
            freq, factor = model.compute_default_rope_parameters(config)
        else:
            freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
        row = {"name": name, "head_dim": head_dim, "max_position_embeddings": positions,
               "rope_parameters": parameters, "attention_factor": float(factor),
               "inv_freq": [float(str(np.float32(x))) for x in freq.tolist()]}
        if length is not None:
            row["seq_len"] = length
        assert len(row["inv_freq"]) == head_dim // 2
        rows.append(json.dumps(row))
    (HERE / "rope.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
