--- The commands as a user meets them: numbers out of range, help, standard output that ends.

local amalgam = require("amalgam")
local experiment = require("lib_experiment")
local test = require("lib_test")

local binary = experiment.quoted(os.getenv("AMALGAM_BINARY") or "build/amalgam")

--- What a command says on both outputs, and its exit status.
---@param words string of a shell; %s stands for the program
local function command(words)
  local line = words:gsub("%%s", function() return binary end)
  local pipe = assert(io.popen("{ " .. line .. "\n} 2>&1"))
  local said = pipe:read("a")
  local _, _, code = pipe:close()
  return code, said
end

local function refused(words, reason)
  local code, said = command("%s " .. words)
  test.equal(code, 2, words)
  test.contains(said, reason)
end

test.case("a closed standard output is no file of ours", function()
  local path = os.tmpname()
  local script = path .. ".lua"
  local f = assert(io.open(script, "w"))
  f:write(("local f = io.open(%q, 'w') io.stdout:write('out') io.stdout:flush() "):format(path),
    "io.stderr:write('error') f:write('file') f:close()")
  f:close()
  for _, closed in ipairs({ "", "0<&-", ">&-", "2>&-", "0<&- >&-", "0<&- >&- 2>&-" }) do
    command(("%%s lua %s %s"):format(script, closed))
    test.equal(assert(io.open(path)):read("a"), "file", closed)
  end
  os.remove(script)
  os.remove(path)
end)

test.case("generate shows what stops it, and special tokens, when asked", function()
  local function text(words)
    local code, said = command("%s generate --model workloads/tiny --prompt 'Once upon a time'"
      .. " --max-tokens 40 " .. words)
    test.equal(code, 0, words)
    return (said:gsub("\n$", ""))
  end
  local whole, cut = text(""), text("--stop ' the'")
  test.equal(text("--stop ' the' --include-stop"), cut .. " the")
  test.equal(whole:sub(1, #cut + 4), cut .. " the")
  local ends = "--logit-bias 0=100" -- <|endoftext|>, which is also what ends an answer
  test.equal(text(ends), "")
  test.equal(text(ends .. " --include-stop"), "")
  test.equal(text(ends .. " --show-special"), "")
  local shown = text(ends .. " --show-special --include-stop")
  test.contains(shown, "<|")
  test.equal(text(ends .. " --show-special --ignore-eos --max-tokens 2"), shown .. shown)
end)

test.case("serve takes no more of a GPU than it may", function()
  refused("serve --model workloads/tiny --memory-fraction 0", "outside 0.01 to 1")
  local function start(fraction) -- and end it when it serves
    return command("f=$(mktemp); %s serve --model Llama-3.1-8B --device sim --gpu h200 --port 0"
      .. " --memory-fraction " .. fraction .. [[ >$f 2>&1 & p=$!
      until grep -q "KV cache of" $f || ! kill -0 $p 2>/dev/null; do sleep 0.1; done
      kill $p 2>/dev/null; wait $p; code=$?; cat $f; rm $f; exit $code]])
  end
  local code, said = start("0.05")
  test.equal(code, 3)
  test.contains(said, "(5 % of 139.4 GiB)")
  local function tokens(fraction)
    return tonumber((select(2, start(fraction)):match("a KV cache of (%d+)")))
  end
  test.equal(tokens("0.2") * 4 < tokens("0.9"), true)
end)

test.case("too little address space is called that", function()
  -- The address sanitizer maps more than that before the command has begun.
  if command("ulimit -v 800000; %s --version") ~= 0 then return end
  local code, said = command("ulimit -v 800000; %s generate --model workloads/tiny --prompt a")
  test.equal(code, 1)
  test.contains(said, "GB of address space: Cannot allocate memory (ulimit -v")
end)

test.case("a number that 32 bits do not hold is refused, not cut", function()
  local over = 2 ^ 32 + 1
  for words, range in pairs({
    ["generate --model workloads/tiny --prompt a --tp %d"] = "--tp 4294967297 is outside 1 to 64",
    ["chat --model workloads/tiny --tp %d"] = "--tp 4294967297 is outside 1 to 64",
    ["eval --model workloads/tiny --text README.md --tp %d"] = "--tp 4294967297 is outside 1 to 64",
    ["serve --model workloads/tiny --ctx %d"] = "--ctx 4294967297 is outside 0 to 16777216",
    ["bench serve --url http://127.0.0.1:1 --n %d"] = "--n 4294967297 is outside 1 to 16777216",
    ["quantize --model workloads/tiny --out x --tokens %d"] = "is outside 2 to 16777216",
    ["eval --model workloads/tiny --text README.md --threads %d"] = "is outside 0 to 1024",
    ["inspect plan --model Qwen3-8B --gpu h200 --samples %d"] = "is outside 0 to 1",
  }) do
    refused(words:format(over), range)
  end
  refused("bench serve --url http://127.0.0.1:1 --n 0", "--n 0 is outside 1 to")
  for _, name in ipairs({ "chat", "generate --prompt a" }) do
    for words, range in pairs({ ["--temperature -1"] = "temperature -1 is not in 0..100",
      ["--top-p 0"] = "top_p 0 is not in (0, 1]", ["--min-p 2"] = "min_p 2 is not in 0..1",
      ["--repetition-penalty 0"] = "repetition_penalty 0 is not in (0, 100]",
      ["--presence-penalty 3"] = "presence_penalty 3 is not in -2..2",
      ["--frequency-penalty -3"] = "frequency_penalty -3 is not in -2..2" }) do
      refused(name .. " --model no-such-model " .. words .. " </dev/null", range)
    end
  end
  refused("generate --model no-such-model --prompt a --stop ''", "--stop: an empty string")
  refused("generate --model no-such-model --prompt a --max-tokens 4 --min-tokens 5",
    "--min-tokens 5 is outside 0 to 4")
  refused("chat --model no-such-model --system \xff </dev/null", "no UTF-8 text")
  refused("eval --model workloads/tiny --text no-such-text --against no-such-model",
    "no-such-model")
  for _, other in ipairs({ "--against workloads/tiny", "--json",
    "--precision W16 --precision W8" }) do
    refused("eval --model no-such-model --text no-such-text --logits x " .. other,
      "--logits writes a file alone")
  end
  for _, limit in ipairs({ "ttft", "ttft:", "ttft:x", "ttft:-1", "itl:5", ":5" }) do
    refused("bench serve --url http://127.0.0.1:1 --goodput " .. limit,
      ("--goodput '%s' is none of ttft:MS, tpot:MS, e2e:MS"):format(limit))
  end
  refused("bench serve --url http://127.0.0.1:1 --save-detailed", "--save-result, which is not")
  refused("serve --model workloads/tiny --served-model-name ''", "--served-model-name is empty")
  local code = command("%s inspect plan --model Qwen3-8B --gpu h200 --tokens 8 --samples 8")
  test.equal(code, 0, "the limit itself is taken")
end)

test.case("a window longer than the text is as long as the text", function()
  local function scored(window)
    local code, said = command("%s eval --json --model workloads/tiny --text baselines/fp16.lua "
      .. "--against workloads/tiny --precision W4A16KV4 --stride 50 --window " .. window)
    test.equal(code, 0, said)
    return said
  end
  -- A room of 1000000 rows of logits was asked for: "buffer of 1000000 x 256", status 1.
  local whole = scored(1000)
  test.contains(whole, '"positions":')
  test.equal(scored(1000000), whole)
  test.equal(scored(100) ~= whole, true)
end)

test.case("quantize refuses what it would not use", function()
  for words, reason in pairs({
    ["--precision W4A8KV4"] = "--precision W4A8KV4: a checkpoint has weights alone",
    ["--precision FP8"] = "a checkpoint has weights alone",
    ["--precision W4A16K8V4"] = "a checkpoint has weights alone",
    ["--calibration README.md"] = "--calibration is of gptq and awq",
    ["--no-act-order"] = "--no-act-order is of gptq",
    ["--method awq --no-act-order"] = "--no-act-order is of gptq",
  }) do
    refused("quantize --model workloads/tiny --out no/such/folder " .. words, reason)
  end
end)

test.case("one of two is wanted, not both", function()
  refused("generate --model workloads/tiny --prompt a --prompt-file README.md", ", not both")
  refused("tokenize --model workloads/tiny --text a --file README.md", ", not both")
end)

test.case("text comes through a pipe as from a file", function()
  for options, n in pairs({ ["tokenize --json --file /dev/stdin"] = 20000, -- more than a pipe holds
    ["generate --json --max-tokens 2 --prompt-file /dev/stdin"] = 3,
    ["eval --json --text /dev/stdin"] = 300 }) do
    local words = options .. " --model workloads/tiny"
    local text = ("awk 'BEGIN { for (i = 0; i < %d; i++) print \"one two\", i }'"):format(n)
    local code, piped = command(text .. " | %s " .. words)
    test.equal(code, 0, piped)
    local name = os.tmpname()
    local _, filed = command(text .. " >" .. name .. "; %s " .. words .. " <" .. name)
    os.remove(name)
    local times = '"[%a_]+_m?s": *[%d.e+-]+'
    test.equal(piped:gsub(times, ""), filed:gsub(times, ""), options)
  end
  local code, said = command("printf '' | %s generate --model workloads/tiny " ..
    "--prompt-file /dev/stdin")
  test.equal(code, 2)
  test.contains(said, "the prompt is empty")
  code, said = command("%s tokenize --model workloads/tiny --file /tmp")
  test.equal(code, 2)
  test.equal(said, "amalgam: /tmp: not a regular file\n")
end)

test.case("a checkpoint is scored in several precisions at once", function()
  local text = os.tmpname()
  command("%s corpus --seed 1099511627776 --bytes 1500 >" .. text)
  local words = "%s eval --model workloads/tiny --text " .. text
  local code, said = command(words .. " --against workloads/tiny --precision W16 --precision W4gK"
    .. " --precision W4A4 --precision FP8 2>&1")
  test.equal(code, 2, "that of the one which is refused")
  local agreement, kl = {}, {}
  for name, _, share, nats in said:gmatch("(%S+) +(%d+%.%d+) +(%d+%.%d+) +(%d+%.%d+) +%d") do
    agreement[name], kl[name] = tonumber(share), tonumber(nats)
  end
  test.contains(said, "amalgam: W4A4: ")
  test.equal(agreement["W16A16KV16"] == 1 and kl["W16A16KV16"] == 0, true, said)
  -- The twin: coarser codes are told from finer ones, and both from 16 bits.
  test.equal(kl["W4gKA16KV16"] > kl["WFP8AFP8KVFP8"] and kl["WFP8AFP8KVFP8"] > 0, true, said)
  local _, all = command(words .. " --json --precision W16 --precision W4A16KV8")
  local _, one = command(words .. " --json --precision W4A16KV8")
  test.equal(all:match("\n(.*)$"), one, "as alone")
  local _, alone = command(words .. " --precision W4gK --against workloads/tiny")
  test.contains(alone, ("KL divergence %.5f nats"):format(kl["W4gKA16KV16"]))
  os.remove(text)
end)

test.case("options of draws, tokens and texts do what their help says", function()
  local function said(words)
    local code, text = command("%s " .. words)
    test.equal(code, 0, words .. "\n" .. text)
    return text
  end
  local generate = "generate --model workloads/tiny --prompt 'Once upon a time' --max-tokens 40 "
  local greedy, draw = said(generate), "--temperature 5 --seed 3"
  test.equal(said(generate .. draw .. " --top-k 1"), greedy)
  test.equal(said(generate .. draw) ~= greedy, true, "the twin: of all tokens")
  test.equal(said(generate .. "--stream"), greedy)
  local function n_tokens(words)
    local line = said("tokenize --json --model workloads/tiny " .. words)
    return tonumber(line:match('"tokens":(%d+)'))
  end
  local chat = "--text 'a<|endoftext|>'"
  test.equal(n_tokens(chat), 2)
  test.equal(n_tokens(chat .. " --plain") > 2, true)
  local bos = "tokenize --json --model tests/vectors/tokenizers/llama2 --text a"
  test.contains(said(bos), '"ids":[1,490]')
  test.contains(said(bos .. " --no-bos"), '"ids":[490]')
  for line in said("corpus --tasks arithmetic --count 40 --digits 1"):gmatch("[^\n]+") do
    test.equal(line:find('"prompt":"%d [+-] %d ="') ~= nil, true, line)
  end
  local function length(n)
    return #said("corpus --tasks recall --count 5 --sentences " .. n)
  end
  test.equal(length(1) < length(30), true)
end)

test.case("serve's key is that of the environment, too", function()
  for _, row in ipairs({
    { "AMALGAM_API_KEY=a", "--api-key b", "--api-key and AMALGAM_API_KEY differ" },
    { "AMALGAM_API_KEY=", "", "AMALGAM_API_KEY is empty" },
    { "", "--api-key ''", "--api-key is empty" },
    { "AMALGAM_API_KEY=a", "--api-key a", "no model 'no-such-model'" },
  }) do
    local code, said = command(row[1] .. " %s serve --model no-such-model " .. row[2])
    test.equal(code, 2, row[3])
    test.contains(said, row[3])
  end
end)

test.case("formats knows a GPU by its data sheet, and says what its architecture lacks", function()
  local dir = test.folder()
  assert(os.execute((([[mkdir -p %s/experiments %s/workloads/gpus
    cp experiments/amalgam.meta.lua %s/experiments; cd workloads/gpus
    cp h200.json %s/workloads/gpus/gh200.json
    sed 's/"value": 90,/"value": 100,/' h200.json >%s/workloads/gpus/next.json]]):gsub("%%s",
    function() return dir end))))
  local code, said = command("%s --root " .. dir .. " formats --gpu gh200")
  test.equal(code, 0, said)
  test.contains(said, "sm_90 (H100-SXM, H200), devices cuda and sim")
  code, said = command("%s --root " .. dir .. " formats --gpu next")
  test.equal(code, 2)
  test.contains(said, "GPU 'sm_100' is none of")
  code, said = command("%s --root " .. dir .. " formats --gpu h201")
  test.equal(code, 2)
  test.contains(said, "GPU 'h201' is none of")
end)

test.case("benchmarks of kernels refuse what they do not know", function()
  if (command("%s bench linear --m 1 --experts 0")) == 4 then return end -- no CUDA in the build
  for words, reason in pairs({
    ["attention --dtype f32"] = "--dtype 'f32' is neither fp16 nor bf16",
    ["attention --phase both"] = "--phase 'both' is neither decode nor prefill",
    ["attention --kernel-family new"] = "--kernel-family 'new' is neither hopper nor ampere",
    ["attention --head-dim 4294967424"] = "--head-dim 4294967424 is outside 1 to 1024",
    ["linear --experts 0"] = "--experts 0 is outside 1 to 65536",
    ["linear --experts 4 --topk 5"] = "--topk 5 is outside 1 to 4",
    ["linear --replays 0"] = "--replays 0 is outside 1 to 65536",
    ["ops --rows 0"] = "--rows 0 is outside 1 to 65536",
    ["tune --replays 0"] = "--replays 0 is outside 1 to 1000",
    ["tune --only W5A16"] = "--only 'W5A16' is none of W16A16 W8A16 W4A16",
  }) do
    refused("bench " .. words, reason)
  end
end)

test.case("without a GPU benchmarks of kernels say so, and a table that is there stays", function()
  local _, doctor = command("%s doctor")
  if not doctor:find("cuda device in this build +yes") or not doctor:find("device node +no") then
    return -- a GPU would begin to work
  end
  local path = os.tmpname()
  local f = assert(io.open(path, "w"))
  f:write("times of another GPU\n")
  f:close()
  for _, words in ipairs({ "attention", "linear", "ops --model Llama-3.1-8B",
    "tune --out " .. path }) do
    local code, said = command("%s bench " .. words)
    test.equal(code, 1, words)
    test.contains(said, "amalgam: no NVIDIA GPU", words)
  end
  test.equal(assert(io.open(path)):read("a"), "times of another GPU\n")
  os.remove(path)
end)

-- What each says of the parts that a reader looks for; all of them end well.
test.case("models, steps, files, machines and ourselves are shown", function()
  for words, parts in pairs({
    ["inspect model --model workloads/tiny"] = { "embed ", "model.layers.0.mlp.gate_proj.weight",
      "tiny (LlamaForCausalLM), W16A16KV16, rank of tp 1" },
    ["inspect model --model gpt-oss-120b --precision WMXFP4 --tp 2 --json"] = {
      '{"weight":"experts_gate_up","layers":36', '"format":"WMXFP4"', '"rank_bytes":' },
    ["bench step --device sim --gpu h200 --model Qwen3-30B-A3B --batch 1,8 --json"] = {
      '"batch":1,', '"batch":8,', '"experts_share":0.062' },
    ["bench load --model workloads/tiny --json"] = { '{"kind":"load","bytes":10492416,' },
    ["bench harness --json"] = { '"name":"sim_1000_requests_s"', '"name":"cpu_decode_batch8_' },
    ["doctor"] = { "devices: ", "cpu", "sim", "null" },
    ["eval --model workloads/tiny --text baselines/fp16.lua --against workloads/tiny --window 64 "
      .. "--stride 63 --json"] = { '"greedy_agreement":1', '"kl_nats":0' },
  }) do
    local code, said = command("%s " .. words)
    -- The status of these two is 1 where the machine was too busy: a limit on time was missed.
    local timed = words:find("^bench harness") or words:find("^bench load")
    test.equal(timed and code == 1 or code == 0, true, words .. "\n" .. said)
    for _, part in ipairs(parts) do test.contains(said, part) end
  end
end)

test.case("every command takes --help", function()
  local _, list = command("%s --help")
  local n = 0
  for name in list:gmatch("\n  amalgam (%S+)") do
    test.equal((command("%s " .. name .. " --help")), 0, name .. " --help")
    n = n + 1
  end
  test.equal(n >= 18, true, "commands found")
  for what in select(2, command("%s bench --help")):gmatch("\n  (%S+)") do
    test.equal((command("%s bench " .. what .. " --help")), 0, what)
  end
end)

test.case("a full disk is said with its reason, a reader that has left is not", function()
  for _, words in ipairs({ "--help", "--version", "corpus --bytes 100000", "models --json",
    "corpus --tasks arithmetic --count 20000", "inspect plan --model Qwen3-8B --gpu h200" }) do
    local code, said = command("%s " .. words .. " >/dev/full")
    test.equal(code, 1, words)
    test.equal(said, "amalgam: standard output: No space left on device\n", words)
  end
  for _, words in ipairs({ "corpus --bytes 3000000", "corpus --tasks arithmetic --count 60000" }) do
    local code, said = command("%s " .. words .. " | head -c 5 >/dev/null")
    test.equal(code, 0, words)
    test.equal(said, "", words)
  end
end)

test.case("the exit status tells whose fault it is", function()
  local cases = {
    { 2, "eval --model workloads/tiny --text no/such", "no/such: No such file or directory" },
    { 2, "eval --model workloads/tiny --text .", ".: not a regular file" },
    { 2, "tokenize --model workloads/tiny --file README.md/x", "Not a directory" },
    { 2, "inspect trace no/such", "no/such: No such file or directory" },
    { 2, "generate --model no/such --prompt x", "no model 'no/such'" },
    { 2, "generate --model workloads/tiny --prompt x --device tpu", 'no device named "tpu"' },
    { 2, "run e10 --device tpu", "--device tpu: this build has " },
    { 2, "generate --model workloads/tiny --prompt x --max-tokens many", "'many' is no integer" },
    { 2, "generate --model workloads/tiny --prompt x --temperature=hot", "'hot' is no number" },
    { 2, "models extra", "unexpected argument 'extra'" },
    { 2, "models -- --json", "unexpected argument '--json'" },
    { 2, "served", "unknown command 'served': the nearest is 'serve'" },
    { 2, "lua no/such.lua", "cannot open no/such.lua" },
    { 2, "serve --model workloads/tiny --host localhost", "'localhost' is no IP address" },
    { 4, "generate --model workloads/tiny --prompt x --tp 2", "the cpu device has one rank" },
    { 1, "bench serve --url http://127.0.0.1:1 --n 1", "connect" },
  }
  local without = true
  for _, name in ipairs(amalgam.devices()) do without = without and name ~= "cuda" end
  if without then
    for _, words in ipairs({
      "generate --model workloads/tiny --prompt x", "chat --model workloads/tiny",
      "serve --model workloads/tiny --port 0", "eval --model workloads/tiny --text README.md",
      "quantize --model workloads/tiny --method gptq --out build/none", "run e10 --results no/such",
      "bench load --model workloads/tiny", "bench step --model workloads/tiny",
      "inspect plan --model workloads/tiny",
    }) do
      cases[#cases + 1] = { 4, words .. " --device cuda", "make CUDA_ARCH=" }
    end
    for _, words in ipairs({ "bench linear", "bench attention", "bench ops", "tune" }) do
      cases[#cases + 1] = { 4, words, "this build has no CUDA" }
    end
  end
  for _, c in ipairs(cases) do
    local code, said = command("%s " .. c[2] .. " </dev/null")
    test.equal(code, c[1], c[2])
    test.contains(said, c[3])
  end
end)

--- A limit of the file size stands for a disk that is full; in blocks of 512 bytes, or of 1024.
test.case("what cannot be written in whole leaves what was there", function()
  local words = "%s quantize --model workloads/tiny --out "
  local function limited(blocks, line) return command(("ulimit -f %d; "):format(blocks) .. line) end
  local dir = test.folder()
  local code, said = limited(64, words .. dir)
  test.equal(code, 1)
  test.contains(said, "/model.safetensors: File too large")
  test.equal(#amalgam.list(dir), 0)
  code, said = limited(1, ("%%s corpus --bytes 30000 >%s/text"):format(dir))
  test.equal(code, 1)
  test.contains(said, "amalgam: standard output: ")
  os.remove(dir .. "/text")

  -- The weights are written, what comes after them is not: no checkpoint rather than a mixed one.
  local copies = test.folder()
  test.equal(command(words .. dir .. " --precision W8"), 0)
  test.equal(command(("cp -r workloads/tiny %s && head -c 9000000 /dev/zero >>%s/tokenizer.json")
    :format(copies, copies)), 0)
  code, said = limited(8000, ("%%s quantize --model %s --out %s"):format(copies, dir))
  test.equal(code, 1)
  test.contains(said, "/tokenizer.json: File too large")
  code, said = command("%s generate --prompt x --model " .. dir)
  test.equal(code, 2, said)
  test.contains(said, "no model")

  -- The whole folder as it was where the weights themselves do not fit.
  test.equal(command(words .. dir .. " --precision W8"), 0)
  local before = select(2, command("cat " .. dir .. "/* | cksum"))
  test.equal(limited(64, words .. dir), 1)
  test.equal(select(2, command("cat " .. dir .. "/* | cksum")), before)
end)

test.case("what is misspelt is answered with the nearest there is, before any work", function()
  refused("run e03 --only gpuu=h200", "has no axis 'gpuu': the nearest is 'gpu'")
  refused("run e03 --only gpu=h20", "no value of gpu: the nearest is 'h200'")
  refused("run e03_troughput", "the nearest is 'e03_throughput'")
  local code, said = command("%s run e03 e99 --only gpu=h200 --only model=Llama-3.1-8B "
    .. "--results " .. test.folder())
  test.equal(code, 2)
  test.contains(said, "amalgam: no experiment 'e99'")
  test.equal(said:find("e03", 1, true), said:find("e03_", 1, true)) -- as the nearest alone
  refused("rows e03 --only modle=x", "no row has 'modle': the nearest is 'model'")
  refused("compare bad0a57f 1fc66593 --only e77", "no rows of 'bad0a57f' of experiments 'e77...'")
  refused("bench server", "no benchmark 'server': the nearest is 'serve'")
  refused("servers vlm", "no server 'vlm': the nearest is 'vllm'")
end)

test.case("chat passes over blank lines, and says what cannot be read", function()
  local chat = "%s chat --model workloads/tiny --max-tokens 2 "
  local code, said = command("printf '\\n  \\n\\t\\r\\nhi\\n \\n' | " .. chat)
  test.equal(code, 0)
  test.equal(select(2, said:gsub("tokens of prompt", "")), 1, said)
  code, said = command(chat .. "< /tmp")
  test.equal(code, 1)
  test.contains(said, "standard input: Is a directory")
end)

test.case("a killed quantize leaves nothing beside its files", function()
  local dir = test.folder()
  local function temporaries()
    local n = 0
    for _, name in ipairs(amalgam.list(dir)) do n = n + (name:find("%.tmp$") and 1 or 0) end
    return n
  end
  -- Killed when its temporary is seen; the files may be finished before the signal comes.
  local function killed(signal)
    return command(("rm -rf %s; %%s quantize --model workloads/tiny --out %s & p=$!; "
      .. "while kill -0 $p 2>/dev/null; do set -- %s/*.tmp; if [ -e \"$1\" ]; then "
      .. "kill -%s $p; break; fi; done; wait $p"):format(dir, dir, dir, signal))
  end
  local n_killed = 0
  for _ = 1, 10 do
    n_killed = n_killed + (killed("TERM") ~= 0 and 1 or 0)
    test.equal(temporaries(), 0)
  end
  test.equal(n_killed > 0, true)
  for _ = 1, 10 do -- the twin, which is also what the next run clears
    if killed("KILL") ~= 0 and temporaries() > 0 then break end
  end
  test.equal(temporaries(), 1)
  test.equal(command("%s quantize --model workloads/tiny --out " .. dir), 0)
  test.equal(temporaries(), 0)
end)

test.case("a file that cannot be written is refused before the load", function()
  for path, why in pairs({ ["README.md/x"] = "Not a directory", ["/tmp"] = "Is a directory" }) do
    local code, said = command("%s bench serve --url http://127.0.0.1:1 --save-result " .. path)
    test.equal(code, 1)
    test.contains(said, why) -- and not that nobody listens there
  end
end)

test.case("a folder that cannot be written is refused before the work", function()
  local code, said = command("%s quantize --model workloads/tiny --out README.md")
  test.equal(code, 1)
  test.equal(said, "amalgam: README.md: Not a directory\n")
end)

test.case("a folder that is no checkout is named", function()
  for _, name in ipairs({ "run e01", "report", "compare a b", "servers" }) do
    refused("--root /tmp " .. name, "amalgam: /tmp is no checkout of Amalgam: --root DIR names one")
  end
end)

test.finish()
