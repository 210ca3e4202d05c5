"""Golden renderings of chat templates: jinja2 set up as transformers does (apply_chat_template).

Run from the root of the checkout with transformers and jinja2 installed:
    python tests/vectors/make_chat.py
Reads tests/vectors/chat/*.jinja and writes expected.jsonl beside them: one line a case with the
template's name, the inputs, and the text or (for a case that must fail) "error": true. The templates
are our own, written in the manner of the families whose names they bear.
"""

import json
import pathlib

import jinja2
import transformers.utils.chat_template_utils as utils

ROOT = pathlib.Path(__file__).parent / "chat"
NOW = 1753012800  # 2025-07-20, noon in UTC: the same day in every zone but the outermost


def environment():
    """The environment of transformers, its strftime_now at NOW."""
    template = utils._compile_jinja_template("")
    env = template.environment
    import datetime

    env.globals["strftime_now"] = lambda f: datetime.datetime.fromtimestamp(NOW).strftime(f)
    return env


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather "now" at a <place> & time',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Ort, z.\u202fB. München"},
                "days": {"type": "integer", "default": 3, "enum": [1, 3, 7]},
                "metric": {"type": "boolean"},
                "limits": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["place"],
        },
    },
}
CALL = {"type": "function", "id": "call00001",
        "function": {"name": "get_weather", "arguments": {"place": "Köln", "days": 1, "x": 1.5}}}

CONVERSATIONS = {
    "one": [{"role": "user", "content": "Hello"}],
    "system": [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": " Hi\n"}],
    "turns": [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And\nin German? äöü 日本 🙂"},
    ],
    "thought": [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "<think>\nlong\nthought\n</think>\n\nanswer one"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "done", "reasoning_content": "\nbecause\n"},
        {"role": "user", "content": "q3"},
    ],
    "tool": [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": 21}', "tool_call_id": "call00001", "name": "get_weather"},
        {"role": "tool", "content": "sunny", "tool_call_id": "call00001", "name": "get_weather"},
        {"role": "assistant", "content": "21 degrees."},
        {"role": "user", "content": "Thanks"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    "wrong_order": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "empty": [],
}


def main():
    env = environment()
    with open(ROOT / "expected.jsonl", "w", encoding="utf-8") as out:
        for path in sorted(ROOT.glob("*.jinja")):
            template = env.from_string(path.read_text(encoding="utf-8"))
            for name, messages in CONVERSATIONS.items():
                for variant in range(4):
                    variables = {}
                    if variant == 1:
                        variables = {"enable_thinking": False, "reasoning_effort": "high"}
                    if variant == 3:
                        variables = {"custom": [3, "x", None, True, 1e20, 0.1], "enable_thinking": True}
                    inputs = {
                        "messages": messages,
                        "tools": [WEATHER, WEATHER] if variant in (2, 3) else None,
                        "add_generation_prompt": variant != 2,
                        "bos_token": "<s>",
                        "eos_token": "</s>",
                    }
                    case = {"template": path.stem, "case": f"{name}/{variant}", "variables": variables}
                    case.update(inputs)
                    try:
                        case["text"] = template.render(documents=None, **inputs, **variables)
                    except (jinja2.TemplateError, TypeError) as e:
                        case["error"] = str(e)
                    out.write(json.dumps(case, ensure_ascii=False) + "\n")


main()
