"""OpenAI's own client for Python against `sida up`: what an application sees that speaks to OpenAI already. Needs the binary that
SIDA_BINARY names, by default the release build of this tree. Run: python tests/openai/test_openai.py"""

import asyncio
import base64
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import urllib.request

import openai

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("SIDA_BINARY", REPOSITORY / "target/release/sida"))
TEXT = "sst2 sentence: a gorgeous , witty , seductive movie ."
KEY = "a-key-of-the-openai-test"
# As models write them: who speaks, and where the answer begins.
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
TOOL_TEMPLATE = (REPOSITORY / "tests/parity/chat/tools.jinja").read_text()


class Served:
    """`sida up` over a model, on ports that the system picks."""

    def __init__(self, model, *flags):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SIDA_")}
        self.log = tempfile.TemporaryFile("w+")
        command = [BINARY, "up", "--model", model, "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--predictor", "off", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        for line in self.process.stdout:
            if line.startswith("listening for HTTP on "):
                self.address = line.split()[-1]
            if line.startswith("listening on "):
                break
        else:
            raise AssertionError(self.told())
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def told(self):
        self.log.seek(0)
        return self.log.read()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=30)
        assert status == 0 or kind, self.told()
        if kind:
            print(self.told(), file=sys.stderr)

    def client(self, kind=openai.OpenAI, key="none", **options):
        return kind(base_url=f"http://{self.address}/v1", api_key=key, timeout=30, max_retries=0, **options)


def refused(error, field, call):
    """The refusal of a call, as the client raises it."""
    try:
        call()
    except error as refusal:
        assert refusal.body and refusal.param == field, (refusal, refusal.body)
        return refusal
    raise AssertionError(f"{field}: it was answered")


def test_completions(served):
    """Would break: an application written for OpenAI gets no answer, or another one where it streams."""
    client = served.client()
    model = client.models.list().data[0].id
    assert client.models.retrieve(model).id == model
    whole = client.completions.create(model=model, prompt=TEXT, max_tokens=8, extra_body={"ignore_eos": True, "routing": {"mode": "exact"}})
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 8
    assert whole.usage.sida["routing"]["mode"] == "exact" and whole._request_id
    parts = list(client.completions.create(
        model=model, prompt=TEXT, max_tokens=8, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}))
    assert "".join(part.choices[0].text for part in parts[:-1]) == whole.choices[0].text
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens and not parts[-1].choices
    several = client.completions.create(model=model, prompt=[TEXT, TEXT], n=2, seed=5, temperature=1.5, max_tokens=4, logprobs=3, logit_bias={"5": -100}, frequency_penalty=0.5)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3] and texts[:2] == texts[2:], texts
    assert len(several.choices[0].logprobs.token_logprobs) == len(several.choices[0].logprobs.tokens)


def test_errors(served):
    """Would break: an application cannot tell its own mistakes from a server that is busy or broken."""
    client = served.client()
    model = client.models.list().data[0].id
    create = client.completions.create
    assert refused(openai.NotFoundError, "model", lambda: create(model="gpt-4", prompt="a")).code == "model_not_found"
    refused(openai.BadRequestError, "temperature", lambda: create(model=model, prompt="a", temperature=101))
    refused(openai.BadRequestError, "suffix", lambda: create(model=model, prompt="a", suffix="b"))
    refused(openai.BadRequestError, "best_of", lambda: create(model=model, prompt="a", best_of=2))
    refused(openai.BadRequestError, "prompt", lambda: create(model=model, prompt="good " * 2000))
    refused(openai.InternalServerError, None, lambda: create(model=model, prompt=TEXT, max_tokens=1000, extra_body={"ignore_eos": True}, extra_headers={"x-request-timeout": "0.001"}))
    hello = [{"role": "user", "content": "Hi"}]
    missing = refused(openai.BadRequestError, None, lambda: client.chat.completions.create(model=model, messages=hello))
    assert missing.code == "no_chat_template" and "chat_template.jinja" in missing.message


def test_embeddings(served):
    """Would break: vectors that the client asks for as base64, as it does by itself, are others than those told as numbers."""
    client = served.client()
    create = client.embeddings.create
    model = client.models.list().data[0].id
    by_default = create(model=model, input=[TEXT, "dull"])
    numbers = create(model=model, input=[TEXT, "dull"], encoding_format="float")
    assert [entry.embedding for entry in by_default.data] == [
        list(struct.unpack(f"<{len(entry.embedding)}f", struct.pack(f"<{len(entry.embedding)}f", *entry.embedding))) for entry in numbers.data]
    raw = create(model=model, input="dull", encoding_format="base64", dimensions=len(numbers.data[0].embedding))
    decoded = raw.data[0].embedding
    if isinstance(decoded, str):
        decoded = list(struct.unpack(f"<{len(base64.b64decode(decoded)) // 4}f", base64.b64decode(decoded)))
    # One vector in company and alone.
    assert decoded == by_default.data[1].embedding
    refused(openai.BadRequestError, "dimensions", lambda: create(model=model, input="dull", dimensions=3))


async def test_asynchronous(served):
    """Would break: applications that ask many things at once get answers of others, or none."""
    async with served.client(openai.AsyncOpenAI) as client:
        model = (await client.models.list()).data[0].id

        async def streamed(text):
            stream = await client.completions.create(model=model, prompt=text, max_tokens=6, stream=True)
            return "".join([part.choices[0].text async for part in stream if part.choices])

        texts = [f"sst2 sentence: movie {number} ." for number in range(8)]
        together = await asyncio.gather(*map(streamed, texts))
        assert together == [await streamed(text) for text in texts]
        # Who stops listening is not computed for, and may ask again.
        stream = await client.completions.create(model=model, prompt=TEXT, max_tokens=1000, stream=True, extra_body={"ignore_eos": True})
        async for _ in stream:
            break
        await stream.close()
        assert await streamed(texts[0]) == together[0]


def test_chat(served):
    """Would break: a chat application, or one with a key, is not answered."""
    with urllib.request.urlopen(f"http://{served.address}/openapi.json") as answer:
        assert "/v1/chat/completions" in json.load(answer)["paths"]
    nobody = served.client()
    try:
        nobody.models.list()
        raise AssertionError("answered without a key")
    except openai.AuthenticationError as refusal:
        assert refusal.code == "invalid_api_key", refusal
    client = served.client(key=KEY)
    model = client.models.list().data[0].id
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "the router"}]}]
    create = client.chat.completions.create
    whole = create(model=model, messages=messages, max_completion_tokens=8, logprobs=True, top_logprobs=2, n=2, seed=3, temperature=1)
    assert len(whole.choices) == 2 and len(whole.choices[0].logprobs.content) == 8
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    written = "system: Be brief.\nuser: the router\nassistant:"
    same = client.completions.create(model=model, prompt=written, max_tokens=8, n=2, seed=3, temperature=1)
    assert [choice.message.content for choice in whole.choices] == [choice.text for choice in same.choices]
    parts = list(create(model=model, messages=messages, max_completion_tokens=8, seed=3, temperature=1, stream=True))
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == "length"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    schema = {"type": "object", "properties": {"seen": {"type": "boolean"}}, "required": ["seen"], "additionalProperties": False}
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    for seed in range(3):
        answer = create(model=model, messages=messages, max_tokens=300, seed=seed, temperature=1.5, response_format=response_format)
        assert type(json.loads(answer.choices[0].message.content)["seen"]) is bool, answer
    unknown = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "text"}}}
    refused(openai.BadRequestError, "response_format", lambda: create(model=model, messages=messages, response_format=unknown))


def test_tools(served):
    """Would break: an agent by OpenAI's client has no tools, or cannot tell what they answered."""
    client = served.client()
    model = client.models.list().data[0].id
    create = client.chat.completions.create
    parameters = {"type": "object", "properties": {"city": {"enum": ["Rom", "Wien"]}}, "required": ["city"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": parameters}}]
    messages = [{"role": "user", "content": "Is it raining in Rom?"}]
    asked = {"model": model, "messages": messages, "tools": tools, "max_tokens": 900, "seed": 1, "temperature": 1, "parallel_tool_calls": False}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = create(**asked, tool_choice=choice).choices[0]
        [call] = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls" and call.function.name == "weather" and answer.message.content is None, answer
        assert json.loads(call.function.arguments)["city"] in ("Rom", "Wien"), call
        with client.chat.completions.stream(**asked, tool_choice=choice) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls" and final.message.tool_calls[0].function.arguments == call.function.arguments, final
    # What the client gives back is read as it was written.
    told = [*messages, answer.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "It is."}]
    freely = create(model=model, messages=told, tools=tools, max_tokens=8, extra_body={"ignore_eos": True}).choices[0]
    assert freely.finish_reason == "length" and isinstance(freely.message.content, str), freely
    refused(openai.BadRequestError, "tool_choice", lambda: create(**{**asked, "tool_choice": {"type": "function", "function": {"name": "other"}}}))


def chat_model(directory, template=TEMPLATE, name="chat"):
    """The small decoder-only model with a chat template."""
    model = pathlib.Path(directory) / name
    model.mkdir()
    for file in (REPOSITORY / "tests/data/parity/causal-text").iterdir():
        (model / file.name).symlink_to(file)
    (model / "chat_template.jinja").write_text(template)
    return model


def main():
    with Served(REPOSITORY / "models/switch-tiny-64") as served:
        test_completions(served)
        test_errors(served)
        test_embeddings(served)
        asyncio.run(test_asynchronous(served))
    with tempfile.TemporaryDirectory() as directory:
        keys = pathlib.Path(directory) / "keys"
        keys.write_text(f"test:{KEY}\n")
        with Served(chat_model(directory), "--api-keys", keys) as served:
            test_chat(served)
        with Served(chat_model(directory, TOOL_TEMPLATE, "tools"), "--prompt-tokens-max", "1024") as served:
            test_tools(served)
    print("openai", openai.__version__, "is served")


if __name__ == "__main__":
    main()
