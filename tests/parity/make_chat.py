"""Writes tests/data/parity/chat.json: what transformers makes of conversations by the templates of tests/parity/chat, which the
chat templates of crates/model are held against. Run by hand: python tests/parity/make_chat.py (needs transformers, tokenizers)."""

import json
import pathlib

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).resolve().parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def say(*turns):
    return [{"role": role, "content": content} for role, content in turns]


ASK = say(("user", "  What is an expert?\n"))
TALK = say(("system", " You answer\tin one word. "), ("user", "Colour of the sky?"), ("assistant", " Blue. \n"), ("user", "é日本 <b> & \"quotes\" 'n' {{ braces }}"))
CALLED = [
    {"role": "user", "content": "Is it raining in Rom, and in Köln?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"where": "Rom", "at": 7}}},
        {"id": "2", "type": "function", "function": {"name": "weather", "arguments": {"where": "Köln", "at": None}}},
    ]},
    {"role": "tool", "tool_call_id": "1", "content": "dry"},
    {"role": "tool", "tool_call_id": "2", "content": "wet"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells the \"weather\" & <sky>.", "parameters": {"type": "object", "properties": {"where": {"type": "string"}, "at": {"type": ["integer", "null"]}}, "required": ["where"]}}}]
NAMED = [{"role": "user", "content": "Hi", "name": "Ada"}]
THOUGHT = say(("user", "1+1?"), ("assistant", "<think>\neasy\n</think>\n\n2"), ("user", "<result>x</result>"), ("assistant", "<think>\n\nhm\n</think>\n\n\nok"))
CASES = [
    ("marked_turns", [(ASK, True, {}), (TALK, True, {}), (TALK, False, {})]),
    ("alternating", [(ASK, True, {}), (TALK, True, {}), (say(("assistant", "I begin")), True, {}), (say(("user", "a"), ("user", "b")), True, {}), (say(("user", "a"), ("tool", "b")), True, {})]),
    ("headers", [(ASK, True, {"date": "1 Jan 2030"}), (TALK, False, {"date": "x"}), (NAMED, True, {"date": "x"}), (say(("developer", " d ")), True, {"date": "x"})]),
    ("thoughts", [(ASK, True, {}), (ASK, True, {"enable_thinking": False}), (TALK, True, {}), (THOUGHT, True, {"enable_thinking": True}), (THOUGHT, False, {}), (say(("user", "x"), ("assistant", None)), True, {})]),
    ("tools", [(ASK, True, {}), (TALK, True, {}, TOOLS), (CALLED, True, {}, TOOLS), (CALLED, False, {})]),
    ("machinery", [(TALK, True, {}), (say(("developer", "d"), ("user", "a\tb"), ("assistant", "c")), True, {"options": {"depth": 1}}), (say(("tool", "t"), ("assistant", None), ("user", "u")), True, {"options": {}})]),
]


def expected(tokenizer, messages, add_generation_prompt, variables, tools):
    try:
        return {"text": tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=add_generation_prompt, **variables)}
    except Exception as error:  # What raise_exception raises is jinja2's, of which only the text counts.
        return {"error": str(error)}


def main():
    written = []
    for name, conversations in CASES:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")), **TOKENS)
        tokenizer.chat_template = (HERE / "chat" / f"{name}.jinja").read_text()
        for messages, add_generation_prompt, variables, *tools in conversations:
            [tools] = tools or [[]]
            written.append({
                "template": name, "messages": messages, "add_generation_prompt": add_generation_prompt, "variables": variables,
                **({"tools": tools} if tools else {}),
                **expected(tokenizer, messages, add_generation_prompt, variables, tools),
            })
    (HERE.parent / "data" / "parity" / "chat.json").write_text(json.dumps(written, ensure_ascii=False, indent=1) + "\n")


main()
