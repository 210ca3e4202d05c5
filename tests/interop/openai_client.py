"""The official `openai` client against a running `amalgam serve`.

    pip install openai
    build/amalgam serve --model DIR --port 8000 &
    python tests/interop/openai_client.py http://127.0.0.1:8000

Models, completions, chat, streams of both, log-probabilities, stop strings, several choices, errors.
Prints one line a check and ends with status 1 when one fails; nothing is skipped.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import openai

failed = 0


def check(name, good, shown=""):
    global failed
    failed += not good
    print(f"{'ok  ' if good else 'FAIL'}  {name} {shown if not good else ''}")


def main():
    url = sys.argv[1].rstrip("/")
    client = openai.OpenAI(base_url=url + "/v1", api_key=sys.argv[2] if len(sys.argv) > 2 else "none")
    models = client.models.list().data
    model = models[0].id
    check("models", len(models) == 1, models)
    check("one model", client.models.retrieve(model).id == model, models)

    extra = {"ignore_eos": True}
    whole = client.completions.create(model=model, prompt="Hello", max_tokens=20, temperature=0,
                                      logprobs=3, extra_body=extra)
    text = whole.choices[0].text
    check("completion", len(text) > 0 and whole.usage.completion_tokens == 20, whole)
    check("completion finish", whole.choices[0].finish_reason == "length", whole)
    check("completion logprobs", len(whole.choices[0].logprobs.token_logprobs) == 20, whole)
    check("top logprobs", len(whole.choices[0].logprobs.top_logprobs[0]) == 3, whole)

    events = list(client.completions.create(model=model, prompt="Hello", max_tokens=20, temperature=0,
                                            stream=True, stream_options={"include_usage": True},
                                            extra_body=extra))
    check("completion stream", "".join(e.choices[0].text for e in events if e.choices) == text)
    check("one event a token", sum(1 for e in events if e.choices) == 20, len(events))
    check("usage in the last event", events[-1].usage.completion_tokens == 20, events[-1])

    several = client.completions.create(model=model, prompt=["a", "b"], n=2, max_tokens=5, seed=1,
                                        extra_body=extra)
    check("prompts x choices", [c.index for c in several.choices] == [0, 1, 2, 3], several)
    again = client.completions.create(model=model, prompt=["a", "b"], n=2, max_tokens=5, seed=1,
                                      extra_body=extra)
    check("seed", [c.text for c in several.choices] == [c.text for c in again.choices])

    def seeded(seed):
        return client.completions.create(model=model, prompt="Hello", max_tokens=20, temperature=1,
                                         seed=seed, extra_body=extra).choices[0].text

    alone = [seeded(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        check("a seed draws the same in company", list(pool.map(seeded, range(6))) == alone)
    check("seeds differ", len(set(alone)) > 3, alone)
    ids = client.completions.create(model=model, prompt=[5, 6, 7], max_tokens=4, extra_body=extra)
    check("token ids", ids.usage.prompt_tokens == 3, ids)

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0,
                                          logprobs=True, top_logprobs=2, extra_body=extra)
    said = chat.choices[0].message.content
    check("chat", chat.choices[0].message.role == "assistant" and chat.usage.completion_tokens == 16)
    check("chat logprobs", len(chat.choices[0].logprobs.content) == 16
          and len(chat.choices[0].logprobs.content[0].top_logprobs) == 2)
    tokens = chat.choices[0].logprobs.content
    check("bytes of the tokens are the text", b"".join(bytes(t.bytes) for t in tokens).decode() == said)
    check("greedy tokens are the likeliest", all(t.logprob == t.top_logprobs[0].logprob for t in tokens))
    stream = list(client.chat.completions.create(model=model, messages=messages, max_tokens=16,
                                                 temperature=0, stream=True, extra_body=extra))
    check("chat stream", "".join(e.choices[0].delta.content or "" for e in stream) == said)
    check("role first", stream[0].choices[0].delta.role == "assistant", stream[0])
    check("finish last", stream[-1].choices[0].finish_reason == "length", stream[-1])

    ids = {"return_token_ids": True, **extra}

    def drawn(**options):
        answer = client.completions.create(model=model, prompt="Hello", max_tokens=20, temperature=0,
                                           extra_body=ids, **options)
        return answer.choices[0].model_extra["token_ids"]

    check("logit_bias", set(drawn(logit_bias={"65": 100})) == {65})
    two = drawn(logit_bias={"65": 100, "66": 100}, frequency_penalty=2)
    check("frequency_penalty", min(two.count(65), two.count(66)) >= 5, two)
    check("presence_penalty", len(set(drawn(presence_penalty=2))) >= len(set(drawn())))

    echoed = client.completions.create(model=model, prompt="Hello", max_tokens=20, temperature=0,
                                       echo=True, logprobs=1, extra_body=extra)
    check("echo", echoed.choices[0].text == "Hello" + text, echoed)
    scores = echoed.choices[0].logprobs.token_logprobs
    check("prompt logprobs", scores[0] is None and all(s <= 0 for s in scores[1:])
          and len(scores) == echoed.usage.total_tokens, scores)

    alone = client.completions.create(model=model, prompt=["Hello", [5, 6, 7]], max_tokens=0,
                                      echo=True, logprobs=1)
    check("a prompt alone", alone.usage.completion_tokens == 0
          and alone.choices[0].logprobs.token_logprobs == scores[:-20]
          and len(alone.choices[1].logprobs.token_logprobs) == 3, alone)
    two = list(client.chat.completions.create(model=model, messages=messages, max_tokens=6, n=2,
                                              stream=True, stream_options={"include_usage": True},
                                              extra_body=extra))
    check("two streams in one", sorted(c.index for e in two for c in e.choices if c.finish_reason)
          == [0, 1] and two[-1].usage.completion_tokens == 12, two[-1])
    cut = client.chat.completions.create(model=model, messages=messages, max_tokens=60,
                                         temperature=0, stop=list("etaoi"), extra_body=extra)
    check("stop list", not set(cut.choices[0].message.content) & set("etaoi"), cut)

    scored = client.chat.completions.create(model=model, messages=messages, max_tokens=2,
                                            extra_body={"prompt_logprobs": 2, **extra})
    entries = scored.model_extra["prompt_logprobs"]
    check("prompt_logprobs of chat", len(entries) == scored.usage.prompt_tokens
          and entries[0] is None and all(2 <= len(e) <= 3 for e in entries[1:]), entries)
    half = text[:len(text) // 2]
    messages.append({"role": "assistant", "content": said[:len(said) // 2]})
    rest = client.chat.completions.create(model=model, messages=messages, max_tokens=4, temperature=0,
                                          extra_body={"continue_final_message": True,
                                                      "add_generation_prompt": False, **extra})
    check("an answer gone on with", rest.usage.prompt_tokens > chat.usage.prompt_tokens, rest)
    messages.pop()
    short = client.completions.create(model=model, prompt=half + "Hello", max_tokens=1,
                                      extra_body={"truncate_prompt_tokens": 1})
    check("a prompt cut to its end", short.usage.prompt_tokens == 1, short)

    letters = [c for c in text if c.isascii() and c.isalnum()]
    if letters:
        cut = client.completions.create(model=model, prompt="Hello", max_tokens=20, temperature=0,
                                        stop=letters[-1], extra_body=extra)
        check("stop string", cut.choices[0].text == text.split(letters[-1])[0]
              and cut.choices[0].finish_reason == "stop", (cut.choices[0], text))
        kept = client.completions.create(model=model, prompt="Hello", max_tokens=20, temperature=0,
                                         stop=letters[-1], extra_body={
                                             "include_stop_str_in_output": True, **extra})
        check("stop string kept", kept.choices[0].text == cut.choices[0].text + letters[-1], kept)

    for name, error, call in (
        ("bad parameter is 400", openai.BadRequestError,
         lambda: client.completions.create(model=model, prompt="a", temperature=-1)),
        ("alternatives without logprobs is 400", openai.BadRequestError,
         lambda: client.chat.completions.create(model=model, messages=messages, top_logprobs=2)),
        ("bad bias is 400", openai.BadRequestError,
         lambda: client.completions.create(model=model, prompt="a", logit_bias={"65": 101})),
        ("JSON mode is refused", openai.BadRequestError,
         lambda: client.chat.completions.create(model=model, messages=messages,
                                                response_format={"type": "json_object"})),
        ("a tool that must be called is refused", openai.BadRequestError,
         lambda: client.chat.completions.create(
             model=model, messages=messages, tool_choice="required",
             tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])),
        ("sound is refused", openai.BadRequestError,
         lambda: client.chat.completions.create(model=model, messages=messages,
                                                modalities=["text", "audio"])),
        ("unknown model is 404", openai.NotFoundError,
         lambda: client.completions.create(model="nobody", prompt="a")),
        ("no messages is 400", openai.BadRequestError,
         lambda: client.chat.completions.create(model=model, messages=[])),
    ):
        try:
            call()
            check(name, False, "no error")
        except error as e:
            check(name, bool(e.message))

    left = client.completions.create(model=model, prompt="a", max_tokens=200, stream=True,
                                     extra_body=extra)
    next(iter(left))
    left.close()
    after = client.completions.create(model=model, prompt="a", max_tokens=2, extra_body=extra)
    check("a stream left early", after.usage.completion_tokens == 2)
    print(f"{failed} failed")
    return 1 if failed else 0


sys.exit(main())
