"""Triton's own client for Python against `sida up`: what an application sees that speaks to Triton or KServe already. Needs the
binary that SIDA_BINARY names, by default the release build of this tree. Run: python tests/open_inference/test_triton.py"""

import os
import pathlib
import queue
import subprocess
import sys

import numpy as np
import tritonclient.grpc as triton
import tritonclient.http as triton_http

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("SIDA_BINARY", REPOSITORY / "target/release/sida"))
MODEL = "switch-tiny-64"
TEXT = "sst2 sentence: a gorgeous , witty , seductive movie ."


def texts(name, values, client=triton, **options):
    tensor = client.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode() for value in values], dtype=np.object_), **options)
    return tensor


def flag(name, value):
    tensor = triton.InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([value]))
    return tensor


def expect_error(named, ask):
    try:
        ask()
    except triton_http.InferenceServerException as error:
        assert named in str(error), error
    else:
        raise AssertionError(f"{named} was not refused")


def main():
    command = [BINARY, "up", "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--metrics-listen", "off"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            addresses = [next(line for line in server.stdout if line.startswith("listening ")).split()[-1] for _ in range(2)]
            http, grpc = addresses
            check(triton.InferenceServerClient(grpc))
            check_http(triton_http.InferenceServerClient(http))
        finally:
            server.terminate()
    print("a client of Triton gets the model's answers")


def check(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(MODEL) and not client.is_model_ready("another")
    metadata = client.get_model_metadata(MODEL)
    assert metadata.name == MODEL and [tensor.name for tensor in metadata.inputs][0] == "text_input"
    config = client.get_model_config(MODEL).config
    assert config.name == MODEL and config.input[0].name == "text_input" and config.model_transaction_policy.decoupled
    before = client.get_inference_statistics(MODEL).model_stats[0].inference_stats.success.count

    result = client.infer(MODEL, [texts("text_input", [TEXT, TEXT])], request_id="1", parameters={"max_tokens": 8})
    first, second = result.as_numpy("text_output")
    assert first == second == b"positive", (first, second)
    assert list(result.as_numpy("finish_reason")) == [b"stop", b"stop"]

    stats = client.get_inference_statistics().model_stats[0]
    assert stats.inference_stats.success.count == before + 1 and stats.inference_stats.success.ns > 0 and stats.last_inference > 0

    embedding = triton.InferRequestedOutput("embedding")
    rows = client.infer(MODEL, [texts("text_input", [TEXT, "another text"])], outputs=[embedding]).as_numpy("embedding")
    assert rows.dtype == np.float32 and rows.shape[0] == 2 and np.isfinite(rows).all() and not (rows[0] == rows[1]).all()

    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for request_id in "ab":
        inputs = [texts("text_input", [TEXT]), flag("stream", True), texts("sampling_parameters", ['{"max_tokens": "8"}'])]
        client.async_stream_infer(MODEL, inputs, request_id=request_id, enable_empty_final_response=True)
    pieces, open_ids = {"a": b"", "b": b""}, {"a", "b"}
    while open_ids:
        result, error = answers.get(timeout=60)
        assert error is None, error
        response = result.get_response()
        pieces[response.id] += result.as_numpy("text_output")[0]
        if response.parameters["triton_final_response"].bool_param:
            open_ids.remove(response.id)
    assert pieces == {"a": first, "b": first}, pieces
    client.stop_stream()

    expect_error("model_name", lambda: client.infer("another", [texts("text_input", [TEXT])]))
    expect_error("best_of", lambda: client.infer(MODEL, [texts("text_input", [TEXT])], parameters={"best_of": 2}))
    expect_error("text_input", lambda: client.infer(MODEL, [texts("prompt", [TEXT])]))


def check_http(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(MODEL, "1") and not client.is_model_ready("another")
    assert client.get_server_metadata()["name"] == "sida" and client.get_model_metadata(MODEL)["name"] == MODEL
    assert client.get_model_config(MODEL)["input"][0]["data_type"] == "TYPE_STRING"
    mixed = [texts("text_input", [TEXT], triton_http, binary_data=True), texts("sampling_parameters", ['{"max_tokens": 8}'], triton_http, binary_data=False)]
    assert list(client.infer(MODEL, mixed).as_numpy("text_output")) == [b"positive"]
    assert client.get_inference_statistics(MODEL)["model_stats"][0]["inference_stats"]["success"]["count"] > 0
    embedding = [triton_http.InferRequestedOutput("embedding")]
    for is_binary in (True, False):
        inputs = [texts("text_input", [TEXT, TEXT], triton_http, binary_data=is_binary)]
        outputs = [triton_http.InferRequestedOutput(name, binary_data=is_binary) for name in ("text_output", "finish_reason")]
        result = client.infer(MODEL, inputs, outputs=outputs, request_id="7", parameters={"max_tokens": 8})
        assert result.get_response()["id"] == "7"
        answers = [text if isinstance(text, str) else text.decode() for text in result.as_numpy("text_output")]
        assert answers == ["positive"] * 2, answers
        rows = client.infer(MODEL, inputs, outputs=embedding).as_numpy("embedding")
        assert rows.dtype == np.float32 and rows.shape[0] == 2 and (rows[0] == rows[1]).all()
    assert list(client.infer(MODEL, inputs).as_numpy("finish_reason")) == [b"stop"] * 2
    expect_error("model_name", lambda: client.infer("another", inputs))
    expect_error("best_of", lambda: client.infer(MODEL, inputs, parameters={"best_of": 2}))


if __name__ == "__main__":
    sys.exit(main())
