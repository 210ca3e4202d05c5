/* vllm_keys.h - the measures in a result of vLLM's benchmark, under its names. */
#ifndef AMALGAM_VLLM_KEYS_H
#define AMALGAM_VLLM_KEYS_H

static const char *const vllm_keys[] = {"duration",
                                        "completed",
                                        "failed",
                                        "total_input_tokens",
                                        "total_output_tokens",
                                        "request_throughput",
                                        "request_goodput",
                                        "output_throughput",
                                        "total_token_throughput",
                                        "max_output_tokens_per_s",
                                        "max_concurrent_requests",
                                        "mean_ttft_ms",
                                        "median_ttft_ms",
                                        "std_ttft_ms",
                                        "p99_ttft_ms",
                                        "mean_tpot_ms",
                                        "median_tpot_ms",
                                        "std_tpot_ms",
                                        "p99_tpot_ms",
                                        "mean_itl_ms",
                                        "median_itl_ms",
                                        "std_itl_ms",
                                        "p99_itl_ms",
                                        "mean_e2el_ms",
                                        "median_e2el_ms",
                                        "std_e2el_ms",
                                        "p99_e2el_ms"};
#endif
