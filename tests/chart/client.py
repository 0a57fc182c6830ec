"""A client as an application has it: gRPC's own for Python, its retries by service config, over all coordinators."""

import json
import pathlib
import sys
import tempfile
import threading
import time

import grpc
from grpc_tools import protoc

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# What docs/operations.md tells callers: balance over the coordinators, try again what was refused before it was answered.
POLICY = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [{
        "name": [{"service": "sida.v1.Inference"}],
        "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]},
    }],
}


def messages():
    """The modules of sida/v1/inference.proto."""
    directory = tempfile.mkdtemp(prefix="sida-proto-")
    proto = REPOSITORY / "proto"
    code = protoc.main(["protoc", f"-I{proto}", f"--python_out={directory}", f"--grpc_python_out={directory}", *map(str, proto.glob("sida/v1/*.proto"))])
    assert code == 0
    sys.path.insert(0, directory)
    from sida.v1 import inference_pb2, inference_pb2_grpc
    return inference_pb2, inference_pb2_grpc


class Load:
    """Requests one after the other from some workers, until it is stopped; every answer is kept."""

    def __init__(self, addresses, texts, workers=3, tokens=8, traceparent=None):
        self.inference, rpc = messages()
        self.texts, self.tokens = texts, tokens
        self.metadata = [("traceparent", traceparent)] if traceparent else []
        self.answers, self.errors, self.stopped = [], [], threading.Event()
        self.channel = grpc.insecure_channel(
            "ipv4:" + ",".join(f"{address}:50051" for address in addresses),
            # Otherwise the list of addresses, which is no authority and is refused as such.
            options=[("grpc.default_authority", "sida"), ("grpc.service_config", json.dumps(POLICY)), ("grpc.max_reconnect_backoff_ms", 500)])
        self.stub = rpc.InferenceStub(self.channel)
        # The longest that this process was not run for: a machine that stalls breaks connections by itself.
        self.stall = 0.0
        self.threads = [threading.Thread(target=self.watch, daemon=True)] + [threading.Thread(target=self.work, args=(worker,)) for worker in range(workers)]

    def ask(self, text):
        """The token ids of an answer."""
        request = self.inference.GenerateRequest(text=text, max_tokens=self.tokens, ignore_eos=True)
        return tuple(answer.token_id for answer in self.stub.Generate(request, timeout=60, wait_for_ready=True, metadata=self.metadata))

    def watch(self):
        before = time.monotonic()
        while not self.stopped.wait(0.05):
            now = time.monotonic()
            self.stall, before = max(self.stall, now - before - 0.05), now

    def work(self, worker):
        number = worker
        while not self.stopped.is_set():
            text = self.texts[number % len(self.texts)]
            number += 1
            started = time.monotonic()
            try:
                self.answers.append((text, self.ask(text), time.monotonic() - started))
            except grpc.RpcError as error:
                self.errors.append((time.time(), error.code(), error.details()))

    def failures(self):
        """The first errors, and what this machine went through meanwhile."""
        return self.errors[:3] + [f"this process was not run for {self.stall:.2f} s"] if self.errors else []

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        self.channel.close()
