"""Quantised layouts written by the tools that define them, for tests/test_packed.c.

Each folder holds one linear called "m" of 16 outputs and 256 inputs (more outputs where blocks need
them) as its tool packs it, the config.json that the tool's users publish with it, and "want": the
values that the tool itself reads back, in f32, for 16 rows spread evenly. Where no tool can be had without a GPU build, the packing is
written out here from the layout's definition (marked "by hand").

  compressed-tensors  PackedQuantizationCompressor, NaiveQuantizationCompressor (float-quantized),
                      NVFP4PackedCompressor, MXFP4PackedCompressor
  autoawq             awq.modules.linear.gemm.WQLinear_GEMM, dequantize_gemm
  transformers        integrations.mxfp4.convert_moe_packed_tensors (reads; packing by hand)
  modelopt            torch.quantization.qtensor.NVFP4QTensor
  by hand             GPTQ v1 and v2, FP8 blocks of DeepSeek
"""
import json
import os
import sys
import types

import torch
from compressed_tensors.compressors import BaseCompressor, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

N, K = 16, 256
torch.manual_seed(20)
HERE = os.path.dirname(os.path.abspath(__file__))


def write(name, tensors, config, want, config_file="config.json"):
    folder = os.path.join(HERE, name)
    os.makedirs(folder, exist_ok=True)
    tensors = {(k if k.startswith("e.") else "m." + k): v.contiguous() for k, v in tensors.items()}
    if want.dim() == 2:
        want = want[::want.shape[0] // N]
    tensors["want"] = want.float().contiguous()
    save_file(tensors, os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, config_file), "w") as f:
        json.dump(config, f, indent=1)
        f.write("\n")


def weight(n=N, k=K):
    w = torch.randn(n, k) * 0.05
    return w * (1 + torch.rand(1, k) * 4)


# --- compressed-tensors ---------------------------------------------------------------------------

def ct_config(args, fmt):
    weights = json.loads(args.model_dump_json())
    return {"quantization_config": {
        "quant_method": "compressed-tensors", "format": fmt, "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights,
                                      "input_activations": None, "output_activations": None}},
        "ignore": ["lm_head"], "kv_cache_scheme": None}}


def compressed(name, fmt, scale_type, n=N, global_scale=None, **kw):
    args = QuantizationArgs(**kw)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    w = weight(n)
    s = str(getattr(args.strategy, "value", args.strategy))
    if s == "tensor":
        parts = w.reshape(1, 1, -1)
    elif s == "channel":
        parts = w.reshape(n, 1, K)
    elif s == "block":
        b = args.block_structure
        parts = w.reshape(n // b[0], b[0], K // b[1], b[1]).transpose(1, 2).flatten(2)
    else:
        parts = w.reshape(n, -1, args.group_size)
    lo, hi = parts.amin(-1), parts.amax(-1)
    extra = {}
    if s == "tensor_group":
        g = torch.tensor([448.0 * 6 / w.abs().max().item()], dtype=torch.float32)
        scale, zero = calculate_qparams(lo, hi, args, global_scale=g)
        extra["weight_global_scale"] = g
    else:
        scale, zero = calculate_qparams(lo, hi, args)
    if s == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    scale = scale.to(scale_type)
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero, **extra}
    tool = BaseCompressor.get_value_from_registry(fmt)
    packed = tool.compress(dict(state), scheme)
    wide = dict(packed)
    if wide["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        wide["weight_scale"] = wide["weight_scale"].float()
    if "weight_global_scale" in extra:  # the tool's own reading back rounds to bf16
        codes = unpack_fp4_from_uint8(packed["weight_packed"], n, K, dtype=torch.float32)
        steps = packed["weight_scale"].float() / extra["weight_global_scale"]
        want = codes * steps.repeat_interleave(16, 1)
    else:
        want = tool.decompress(wide, scheme)["weight"]
    packed = {k: v for k, v in packed.items() if k != "weight_zero_point" or not args.symmetric}
    write(name, packed, ct_config(args, fmt), want)


for bits in 4, 8:
    for group in 32, 64, 128, None:
        for sym in True, False:
            compressed(f"pack_w{bits}_{group or 'channel'}_{'sym' if sym else 'asym'}",
                       "pack-quantized", torch.bfloat16 if group == 64 else torch.float16,
                       num_bits=bits, type="int", symmetric=sym, group_size=group,
                       strategy="group" if group else "channel")
compressed("float_tensor", "float-quantized", torch.float32, num_bits=8, type="float",
           strategy="tensor")
compressed("float_channel", "float-quantized", torch.bfloat16, num_bits=8, type="float",
           strategy="channel")
compressed("float_block", "float-quantized", torch.float32, n=128, num_bits=8, type="float",
           strategy="block", block_structure=[128, 128])
compressed("int_channel", "int-quantized", torch.float32, num_bits=8, type="int",
           strategy="channel")
compressed("ct_nvfp4", "nvfp4-pack-quantized", torch.float32, num_bits=4, type="float",
           strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn,
           zp_dtype=torch.float8_e4m3fn)
compressed("ct_mxfp4", "mxfp4-pack-quantized", torch.float32, num_bits=4, type="float",
           strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8)


# --- AutoAWQ --------------------------------------------------------------------------------------

def awq(group):
    # The package's top level imports data sets for its calibration, which packing does not touch.
    sys.modules.setdefault("datasets", types.SimpleNamespace(load_dataset=None))
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm
    n = 32  # it packs no fewer
    w = weight(n).half()
    parts = w.float().reshape(n, -1, group)
    lo, hi = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = ((hi - lo) / 15).half()
    zero = (-lo / scale.float()).round().clamp(0, 15)
    q = (parts / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    linear = torch.nn.Linear(K, n, bias=False).half()
    linear.weight.data = ((q - zero[..., None]) * scale.float()[..., None]).reshape(n, K).half()
    m = WQLinear_GEMM.from_linear(linear, 4, group, False, scale.t().contiguous(),
                                  zero.t().contiguous())
    want = dequantize_gemm(m.qweight, m.qzeros, m.scales.float(), 4, group).t()
    write(f"awq_{group}", {"qweight": m.qweight, "qzeros": m.qzeros, "scales": m.scales},
          {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": group,
                                   "zero_point": True, "version": "gemm",
                                   "modules_to_not_convert": None}}, want)


awq(128)
awq(64)


# --- GPTQ, by hand --------------------------------------------------------------------------------

def words(q, bits, dim):
    """Fields of q along dim into int32, the first in the lowest bits."""
    per = 32 // bits
    q = q.to(torch.int64).movedim(dim, -1)
    q = q.reshape(*q.shape[:-1], -1, per)
    packed = (q << (torch.arange(per) * bits)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).movedim(-1, dim)


def gptq(name, bits, group, sym, order, fmt):
    w = weight()
    groups = K // group
    g_idx = torch.arange(K) // group
    if order:
        g_idx = g_idx[torch.randperm(K)]
    top = 2**bits - 1
    scale, zero = torch.zeros(groups, N), torch.zeros(groups, N)
    for g in range(groups):
        part = w[:, g_idx == g]
        if sym:
            scale[g], zero[g] = part.abs().amax(1) * 2 / top, 2 ** (bits - 1)
        else:
            lo, hi = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale[g] = (hi - lo) / top
            zero[g] = (-lo / scale[g]).round()
    scale = scale.half()
    zero[1:, ::5] = 0 if not sym else 2 ** (bits - 1)
    s, z = scale.float()[g_idx].t(), zero[g_idx].t()
    q = (w / s + z).round().clamp(0, top)
    stored = (zero - 1) % 2**bits if fmt == "gptq" else zero
    write(name, {"qweight": words(q.t(), bits, 0), "qzeros": words(stored, bits, 1),
                 "scales": scale, "g_idx": g_idx.to(torch.int32)},
          {"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": group,
                                   "desc_act": order, "sym": sym, "checkpoint_format": fmt,
                                   "lm_head": False}}, (q - z) * s)


gptq("gptq_v1_sym", 4, 128, True, False, "gptq")
gptq("gptq_v1_order", 4, 64, False, True, "gptq")
gptq("gptq_v2_order", 4, 32, True, True, "gptq_v2")
gptq("gptq_v2_w8", 8, 128, False, False, "gptq_v2")
gptq("gptq_v1_w8_channel", 8, K, True, False, "gptq")


# --- FP8 by blocks, by hand -----------------------------------------------------------------------

def fp8_block(n):
    w = weight(n)
    rows = -(-n // 128)
    scale = torch.zeros(rows, K // 128)
    q = torch.zeros(n, K)
    for i in range(rows):
        for j in range(K // 128):
            block = w[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128]
            scale[i, j] = block.abs().max() / 448
            q[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128] = block / scale[i, j]
    q = q.to(torch.float8_e4m3fn)
    want = q.float() * scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
    write("fp8_block", {"weight": q, "weight_scale_inv": scale},
          {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3",
                                   "activation_scheme": "dynamic",
                                   "weight_block_size": [128, 128]}}, want)


fp8_block(160)


# --- gpt-oss: packed by hand, read by transformers ------------------------------------------------

def gpt_oss():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    experts, n, k = 2, 32, 64
    blocks = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8)
    scales = torch.randint(110, 132, (experts, n, k // 32), dtype=torch.uint8)
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    if want.shape != (experts, n, k):  # transposed to [experts, k, n]
        want = want.transpose(1, 2)
    write("gpt_oss", {"e.proj_blocks": blocks, "e.proj_scales": scales},
          {"quantization_config": {"quant_method": "mxfp4",
                                   "modules_to_not_convert": ["lm_head"]}}, want)


gpt_oss()


# --- ModelOpt -------------------------------------------------------------------------------------

def modelopt():
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    w = weight()
    scale_2 = NVFP4QTensor.get_weights_scaling_factor_2(w)
    q, scale, scale_2 = NVFP4QTensor.quantize(w, 16, weights_scaling_factor_2=scale_2)
    want = q.dequantize(dtype=torch.float32, scale=scale, double_scale=scale_2,
                        block_sizes={-1: 16})
    config = {"producer": {"name": "modelopt", "version": "0.47.0"},
              "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None,
                               "group_size": 16, "exclude_modules": ["lm_head"]}}
    write("modelopt_nvfp4",
          {"weight": q._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2,
           "input_scale": torch.tensor(0.01)}, config, want, "hf_quant_config.json")


modelopt()
