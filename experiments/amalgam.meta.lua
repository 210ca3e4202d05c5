---@meta amalgam
-- luacheck: ignore
-- Types of the module `amalgam` for editors (LuaLS). No code: that is engine/lua_api.c.
-- ORDER lua api: functions are in the order of the table at the end of that file.

---@class amalgam
local amalgam = {}

---What a scheduler may do. Defaults are those of engine/sched.h.
---@class SchedulerOptions
---@field token_budget? integer tokens of a step at most (8192)
---@field max_seqs? integer running sequences at most (256)
---@field max_queue? integer waiting requests at most, further ones are refused; 0 = no limit (0)
---@field chunked_prefill? boolean cut prompts to fill a step (true)
---@field prefix_cache? boolean share pages of equal beginnings (true)
---@field static_batching? boolean baseline: a batch runs until its last request ends (false)

---Options of every call that opens an engine. Keys that a call does not read are refused, here and
---in all tables of options, with the nearest that it does.
---@class EngineOptions
---@field model string a name under workloads/models, or a folder with config.json
---@field weights? "checkpoint"|"synthetic" (checkpoint)
---@field weights_seed? integer of synthetic weights (0)
---@field precision? string "W4A16KV8" (W16A16KV16)
---@field device? "cpu"|"cuda"|"sim"|"null" (cpu)
---@field gpu? string sim: a data sheet under workloads/gpus
---@field tp? integer tensor-parallel degree (1); absent in capacity: the smallest that fits
---@field threads? integer cpu: 0 = all cores (0)
---@field memory_fraction? number of the device memory that may be used (0.9)
---@field ctx_max? integer prompt + output of a request at most (the model's limit)
---@field pages? integer KV pages of 64 tokens (as many as fit)
---@field scheduler? SchedulerOptions
---@field dequant_first? boolean baseline: expand low-bit weights to 16 bits before use (false)
---@field kernel_family? "hopper"|"ampere" cuda (the newest that the GPU runs)
---@field no_graphs? boolean cuda: launch decode steps a kernel at a time (false)
---@field lockstep? boolean cuda: wait for the tokens of a step before the next is launched (false)
---@field trace? string file to record the scheduler to

---Tokens of a prompt or an output: fixed, or uniform in lo..hi, or log-normal by mu and sigma.
---@class LengthLaw
---@field fixed? integer
---@field lo? integer
---@field hi? integer
---@field mu? number mean of the logarithm
---@field sigma? number standard deviation of the logarithm
---@field min? integer lengths below become this (1)
---@field max? integer lengths above become this

---@class Sampling
---@field temperature? number 0 = greedy (0)
---@field top_k? integer 0 = all (0)
---@field top_p? number 1 = all (1)
---@field min_p? number 0 = all (0)
---@field repetition_penalty? number 1 = none (1)
---@field presence_penalty? number off what the output has, -2 to 2 (0)
---@field frequency_penalty? number off that for each time, -2 to 2 (0)
---@field min_tokens? integer no end or stop token, nor stop string, in the first so many (0)
---@field logit_bias? table<integer, number> onto the logit of a token id, -100 to 100
---@field seed? integer

---@class WorkloadOptions
---@field preset? "sharegpt"|"reasoning"|"longdoc"|"fixed" lengths and defaults (fixed)
---@field name? string in records
---@field file? string a trace instead of generated requests
---@field format? "sharegpt"|"burstgpt"|"azure"|"mooncake"|"jsonl" of the file
---@field n_requests? integer (1000)
---@field prompt? LengthLaw
---@field output? LengthLaw
---@field prefix? integer tokens that prompts begin with in common (0)
---@field n_prefixes? integer how many such beginnings there are (1)
---@field arrival? "at_once"|"poisson"|"gamma"|"constant"|"trace"|"closed" (at_once)
---@field rate_per_s? number mean request rate
---@field burstiness? number gamma: 1 = Poisson, below 1 burstier
---@field speed? number trace: time stamps are divided by it
---@field users? integer closed loop
---@field seed? integer
---@field salted? boolean every request its own prefix-cache namespace
---@field sampling? Sampling
---@field ignore_eos? boolean run to the drawn output length whatever is generated (true)
---@field contents? "random"|"corpus" prompt tokens: random ids, or held-out text (random)

---@class Limits of a good request, for goodput_per_s
---@field ttft_ms? number
---@field tpot_ms? number
---@field e2e_ms? number

---@class ServeOptions: EngineOptions
---@field workload WorkloadOptions
---@field limits? Limits

---What a point gives back, and what the runner stores.
---@class Result
---@field status "ok"|"skipped"|"oom"|"invalid"|"failed"
---@field reason? string when it is not ok
---@field origin? "measured"|"predicted"|"reference"
---@field checkpoint? string digest of the weights; goes into the natural key
---@field tp? integer goes into the natural key when it is no axis
---@field gpu? table what NVML said while it ran; goes into the provenance as gpu_during
---@field precision? string canonical name; goes into the natural key when it is no axis
---@field metrics? table<string, number> names end in a unit; NaN and infinity are refused

---Serve a workload from its first arrival to its last finish. What does not fit is a result
---(`oom`), and so is what a device cannot run (`skipped`), each with the reason.
---@param options ServeOptions
---@return Result # metrics: engine/metrics.h, then steps, batch_mean, kv_tokens, weight_bytes, ...
function amalgam.serve(options) end

---@class BenchServeOptions
---@field url string "http://127.0.0.1:8000" of a server that runs already
---@field path? string (/v1/completions)
---@field model? string (the first that the server names)
---@field api_key? string
---@field workload WorkloadOptions
---@field limits? Limits
---@field concurrency? integer requests in flight at most; 0 = no limit (0)
---@field timeout_s? number of a request; 0 = none (0)
---@field tokenizer? string folder: prompts are sent as its text; absent: as token ids
---@field vocab? integer ids are drawn below it (asked of the server)

---A workload against an OpenAI-compatible server, ours or another, open loop. `invalid` when the
---load generator itself was late: p99 over 1 ms or over 1 % of the mean gap.
---@param options BenchServeOptions
---@return Result # metrics: as amalgam.serve's from the client's side, and own_lag_p99_ms
function amalgam.bench_serve(options) end

---What fits where, with nothing loaded.
---@param options EngineOptions
---@return Result # tp; metrics: weight_bytes, workspace_bytes, kv_page_bytes, kv_bytes, kv_tokens
function amalgam.capacity(options) end

---@class EvaluateOptions: EngineOptions
---@field text? { seed?: integer, bytes?: integer } held-out text for perplexity
---@field tasks? { kind?: "arithmetic"|"recall", n?: integer, seed?: integer }[]
---@field window? integer tokens of context at most (512)
---@field stride? integer tokens between windows (256)
---@field against? string checkpoint that is run in 16 bit beside it, over `text`

---Perplexity of held-out text and exact answers to held-out tasks.
---@param options EvaluateOptions
---@return Result # metrics: perplexity, nll_nats, scored_tokens, <kind>_accuracy, <kind>_n; with
---`against` also greedy_agreement, kl_nats, kl_nats_max, reference_perplexity
function amalgam.evaluate(options) end

---@return string[] names of the models of the sweep
function amalgam.models() end

---@return string[] names of the GPU data sheets
function amalgam.gpus() end

---@return string[] names of the devices of this build
function amalgam.devices() end

---@class ModelFacts
---@field name string
---@field arch string
---@field dim integer
---@field layers integer
---@field heads integer
---@field kv_heads integer
---@field head_dim integer
---@field vocab integer
---@field ctx_max integer
---@field experts integer
---@field top_k integer experts of a token
---@field expert_ffn integer rows of an expert's gate, and of its up
---@field parameters integer
---@field active_parameters integer

---@param name string
---@return ModelFacts
function amalgam.model(name) end

---@class GpuFacts rates are dense
---@field name string
---@field title string
---@field sm integer compute capability times 10
---@field memory_bytes integer
---@field dram_bytes_per_s number
---@field f16_flops number
---@field int8_ops number 0 = no such unit
---@field fp8_flops number
---@field calibrated string "" or what it was calibrated with

---@param name string
---@return GpuFacts
function amalgam.gpu(name) end

---@param name string
---@return string|nil canonical nil when it is no precision
---@return string|nil reason
function amalgam.precision(name) end

---@class QuantizeOptions
---@field model string folder of a 16-bit checkpoint
---@field out string folder to write
---@field method? "rtn"|"gptq"|"awq"
---@field precision? string
---@field layout? string
---@field calibration? { seed?: integer, bytes?: integer }
---@field device? "cpu"|"cuda" of gptq and awq ("cpu")
---@field threads? integer

--- Write a quantised checkpoint: method "rtn" (default), "gptq" or "awq"; layout
--- "compressed-tensors" (default), "awq", "gptq", "gptq_v2", "fp8", "modelopt" or "gpt-oss";
--- calibration text of the seeded generator (for gptq and awq). Raises on failure.
---@param options QuantizeOptions
function amalgam.quantize(options) end

---`amalgam bench NAME --json` in a process of its own. Options are those of the command, without
---dashes before and with underscores inside: a list is joined by commas, true is a flag.
---@param name string "linear", "attention", "step", ...
---@param options table<string, any>
---@return table[]|nil lines one table for each; nil when it does not fit or cannot be done here. A
---last one of kind "gpu", what NVML says after the others, is taken for the row of a point
---@return string|nil status "oom" or "skipped"
---@return string|nil reason
function amalgam.bench(name, options) end

---@param value any tables with string keys, or arrays; NaN is refused
---@return string # one line, keys sorted, 15 significant digits
function amalgam.json_encode(value) end

---@param text string
---@return any
function amalgam.json_decode(text) end

---@param word string
---@param names string[]
---@return string|nil # of the names the one with the fewest letters different; the first of several
function amalgam.nearest(word, names) end

---@param bytes string
---@return string # 16 hexadecimal digits
function amalgam.hash(bytes) end

---@class Identity
---@field commit string
---@field diff string hash of the difference to it, "" when clean
---@field version string names the files of rows
---@field machine string
---@field schema integer of rows
---@field root string folder of the checkout
---@field time string UTC, ISO 8601
---@field provenance table<string, any> cpu, cores, memory, kernel, load, compiler, flags, ...

---@return Identity
function amalgam.identity() end

---Append one line by a single write; folders are made. Raises when the disk is full.
---@param path string
---@param line string
function amalgam.append(path, line) end

---@param path string a missing file has no rows
---@return table[] rows
---@return integer n_broken lines that are no JSON objects
function amalgam.rows(path) end

---@param path string
---@return string
function amalgam.read_file(path) end

---Through a temporary beside it: readers see the old file or the new one. Folders are made.
---@param path string
---@param data string
function amalgam.write_file(path, data) end

---@param dir string a missing folder is empty
---@return string[] # sorted, without hidden names; folders end in "/"
function amalgam.list(dir) end

---Take a lock on a file until "none" gives it back or the program ends.
---@param path string made when missing
---@param kind "exclusive"|"shared"|"none"
---@param wait? boolean
---@return boolean # false: another program has it (only when not waiting)
function amalgam.lock(path, kind, wait) end

---run(i) for i = 1..n in child processes; done is called here, as each ends.
---@param n integer
---@param jobs integer at a time
---@param timeout_s number a job past it is killed; 0 = none
---@param run fun(index: integer): table
---@param done fun(index: integer, result: table|nil, reason: string|nil, wall_s: number)
function amalgam.isolate(n, jobs, timeout_s, run, done) end

---@param title string
---@param total integer
function amalgam.progress_start(title, total) end

---@param done integer
---@param note? string
function amalgam.progress_show(done, note) end

---@param text string
function amalgam.progress_line(text) end

function amalgam.progress_end() end

return amalgam
