/* golden.h - the checkpoints of tests/vectors/models, one of each kind of architecture. Each folder
 * has golden.safetensors: input_ids, and the logits that transformers gives for them. */
#ifndef AMALGAM_GOLDEN_H
#define AMALGAM_GOLDEN_H

#define GOLDENS "tests/vectors/models"

static const char *const golden_names[] = {"gpt_oss",
                                           "internlm2",
                                           "llama",
                                           "llama_bias_tied",
                                           "llama_rope_linear",
                                           "llama_rope_llama3",
                                           "mistral",
                                           "mistral_window",
                                           "mixtral",
                                           "mixtral_fused",
                                           "qwen2",
                                           "qwen2_yarn",
                                           "qwen3",
                                           "qwen3_moe",
                                           "qwen3_moe_fused"};
#endif
