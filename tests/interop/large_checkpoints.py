"""Checkpoints of the size of Llama-3.1-8B's layers in each quantised layout, for `amalgam bench load`.

    python3 large_checkpoints.py DIR [LAYERS]

writes DIR/NAME for bf16, awq, gptq, compressed-tensors W4, fp8 blocks and MXFP4: valid files of random
codes and constant scales, needing nothing but Python. About 0.44 GB a layer in bf16, 0.12 in 4 bits.
"""
import json
import os
import struct
import sys

DIM, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 256
LINEARS = [
    ("self_attn.q_proj", HEADS * HEAD_DIM, DIM),
    ("self_attn.k_proj", KV_HEADS * HEAD_DIM, DIM),
    ("self_attn.v_proj", KV_HEADS * HEAD_DIM, DIM),
    ("self_attn.o_proj", DIM, HEADS * HEAD_DIM),
    ("mlp.gate_proj", FFN, DIM),
    ("mlp.up_proj", FFN, DIM),
    ("mlp.down_proj", DIM, FFN),
]
SIZES = {"I32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "F8_E4M3": 1}
# One element of a scale, a value that all layouts can hold: 2^-8.
SCALES = {"F16": struct.pack("<e", 2**-8), "BF16": b"\x80\x3b", "F32": struct.pack("<f", 2**-8), "U8": b"\x77"}
GROUP = 128


def awq(n, k):
    return [("qweight", "I32", (k, n // 8), None), ("qzeros", "I32", (k // GROUP, n // 8), None),
            ("scales", "F16", (k // GROUP, n), "F16")]


def gptq(n, k):
    return [("qweight", "I32", (k // 8, n), None), ("qzeros", "I32", (k // GROUP, n // 8), None),
            ("scales", "F16", (k // GROUP, n), "F16")]


def pack(n, k):
    return [("weight_packed", "I32", (n, k // 8), None), ("weight_scale", "BF16", (n, k // GROUP), "BF16")]


def fp8(n, k):
    return [("weight", "F8_E4M3", (n, k), None), ("weight_scale_inv", "F32", (-(-n // 128), k // 128), "F32")]


def mxfp4(n, k):
    return [("weight_packed", "U8", (n, k // 2), None), ("weight_scale", "U8", (n, k // 32), "U8")]


def bf16(n, k):
    return [("weight", "BF16", (n, k), None)]


def scheme(fmt, **weights):
    return {"quant_method": "compressed-tensors", "format": fmt,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


LAYOUTS = {
    "bf16": (bf16, None),
    "awq": (awq, {"quant_method": "awq", "version": "gemm", "w_bit": 4, "q_group_size": GROUP, "zero_point": True}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False,
                    "checkpoint_format": "gptq_v2"}),
    "compressed_tensors": (pack, scheme("pack-quantized", num_bits=4, type="int", strategy="group",
                                        group_size=GROUP, symmetric=True)),
    "fp8_block": (fp8, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}),
    "mxfp4": (mxfp4, scheme("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group",
                            group_size=32, symmetric=True)),
}


def write(folder, make, config, layers):
    os.makedirs(folder, exist_ok=True)
    tensors = [("model.embed_tokens.weight", "BF16", (VOCAB, DIM), None), ("lm_head.weight", "BF16", (VOCAB, DIM), None),
               ("model.norm.weight", "BF16", (DIM,), "BF16")]
    for i in range(layers):
        at = f"model.layers.{i}."
        tensors += [(at + name, "BF16", (DIM,), "BF16")
                    for name in ("input_layernorm.weight", "post_attention_layernorm.weight")]
        for name, n, k in LINEARS:
            tensors += [(f"{at}{name}.{end}", kind, shape, scale) for end, kind, shape, scale in make(n, k)]
    header, offset = {}, 0
    for name, kind, shape, _ in tensors:
        size = SIZES[kind]
        for d in shape:
            size *= d
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Bytes that are finite as bf16 and e4m3, and any nibbles.
    noise = os.urandom(1 << 22).translate(bytes((b & 0xBB) for b in range(256)))
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, kind, shape, scale in tensors:
            begin, end = header[name]["data_offsets"]
            block = SCALES[scale] * (1 << 20) if scale else noise
            while begin < end:
                part = block[: end - begin]
                f.write(part)
                begin += len(part)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": DIM,
                   "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
                   "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "max_position_embeddings": 8192,
                   "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
                   "tie_word_embeddings": False, "torch_dtype": "bfloat16",
                   **({"quantization_config": config} if config else {})}, f)


def main():
    layers = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    for name, (make, config) in LAYOUTS.items():
        write(os.path.join(sys.argv[1], name), make, config, layers)


if __name__ == "__main__":
    main()
