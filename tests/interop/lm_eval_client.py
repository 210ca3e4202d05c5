"""The model `local-completions` of lm-eval against a running `amalgam serve`, through its own code.

    pip install "lm-eval[api]"
    build/amalgam serve --model DIR --port 8000 &
    python tests/interop/lm_eval_client.py http://127.0.0.1:8000

Log-likelihoods of continuations and of whole texts (batches of prompts as token ids, the server's
tokenizer) against those of single requests, and generation up to a stop string. Prints one line a
check and ends with status 1 when one fails.
"""

import os
import sys

import requests

os.environ.setdefault("OPENAI_API_KEY", "none")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402

failed = 0


def check(name, good, shown=""):
    global failed
    failed += not good
    print(f"{'ok  ' if good else 'FAIL'}  {name} {shown if not good else ''}")


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def post(url, path, **body):
    answer = requests.post(url + path, json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()


def ids_of(url, text):
    return post(url, "/tokenize", prompt=text, add_special_tokens=False)["tokens"]


def scores(url, ids):
    """Of a prompt alone: nothing is drawn."""
    answer = post(url, "/v1/completions", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert answer["usage"]["completion_tokens"] == 0
    return answer["choices"][0]["logprobs"]["token_logprobs"]


def main():
    url = sys.argv[1].rstrip("/")
    name = requests.get(url + "/v1/models", timeout=60).json()["data"][0]["id"]
    model = LocalCompletionsAPI(base_url=url + "/v1/completions", model=name, batch_size=3,
                                max_length=1024)
    check("the server's tokenizer is found", model.tokenizer_backend == "remote")

    pairs = [("Once upon a", " time"), ("Once upon a", " list"), ("The sky is", " blue and wide"),
             ("One, two,", " three")]
    got = model.loglikelihood(instances("loglikelihood", pairs))
    for (context, more), (logprob, greedy) in zip(pairs, got):
        n = len(ids_of(url, context))
        want = scores(url, ids_of(url, context + more))[n:]
        check(f"log-likelihood of '{more}'", abs(logprob - sum(want)) < 1e-6, (logprob, want))
        first = post(url, "/v1/completions", prompt=ids_of(url, context), max_tokens=len(want),
                     temperature=0, return_token_ids=True)["choices"][0]["token_ids"]
        check(f"greedy or not: '{more}'", greedy == (first == ids_of(url, context + more)[n:]), first)
    check("twin: another continuation", got[0][0] != got[1][0], got)

    text = "Once upon a time there was a boy who lived by the sea with his sister."
    rolled = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))[0]
    want = sum(scores(url, [model.prefix_token_id] + ids_of(url, text))[1:])
    check("log-likelihood of a text", abs(rolled - want) < 1e-4, (rolled, want))

    said = model.generate_until(instances(
        "generate_until", [("Once upon a time", {"until": ["."], "max_gen_toks": 40}),
                           ("The", {"until": ["\n"], "max_gen_toks": 5})]))
    check("generation", len(said) == 2 and "." not in said[0] and len(said[1]) > 0, said)
    print(f"{failed} failed")
    return 1 if failed else 0


sys.exit(main())
