"""More requests than a server can bear: how many are answered in time at 0.8, 1.5 and 5 times its capacity, at both doors in
turns, how soon others are refused, and what memory it takes.

    python tests/bench/overload.py --sida target/release/sida --server-cores 0,1 --client-cores 2-15

Capacity is what 32 callers in a closed loop are answered. Of use is what is answered within --slo. The server and its load are kept
on cores of their own; without these flags they share all, and the load takes what it needs from the server. Needs no Python package.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SHARES = [0.8, 1.5, 5]


def on(cores, command):
    return ["taskset", "-c", cores, *command] if cores else command


class Server:
    def __init__(self, args, log):
        command = [args.sida, "up", "--model", args.model, "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--metrics-listen", "off", "--log", "error"]
        self.process = subprocess.Popen(on(args.server_cores, command), stdout=subprocess.PIPE, stderr=log, text=True)
        said = ""
        while not said.startswith("listening on "):
            said = self.process.stdout.readline()
            if not said:
                raise SystemExit(f"{' '.join(command)} did not start: {pathlib.Path(log.name).read_text().strip()}")
            if "HTTP" in said:
                self.http = f"http://{said.split()[-1]}/v1"
        self.grpc = f"http://{said.split()[-1]}"

    def memory(self):
        """The most it has had, in MiB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) >> 10

    def end(self):
        self.process.terminate()
        self.process.wait(timeout=60)


def bench(args, door, *flags):
    command = [args.sida, "bench", "--json", *door, "--file", args.file, "--max-tokens", "32", "--ignore-eos", "--duration", args.duration, *flags]
    done = subprocess.run(on(args.client_cores, command), capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"bench failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def refused_ms(report):
    """Half and 99% of the refused were told so within this, from when they were sent."""
    refused = sorted(sample["e2e_ms"] - sample["late_ms"] for sample in report["samples"] if sample["failure"] in ("ResourceExhausted", "429"))
    return [round(refused[int(share * (len(refused) - 1))], 2) for share in (0.5, 0.99)] if refused else None


def measure(args, server):
    doors = {"gRPC": ["--endpoint", server.grpc], "HTTP": ["--url", server.http]}
    found = {name: [] for name in doors}
    for _ in range(args.rounds):
        for name, door in doors.items():
            capacity = bench(args, door, "--concurrency", "32")["requests_per_s"]
            line = {"door": name, "capacity": round(capacity)}
            for share in SHARES:
                report = bench(args, door, "--rate", str(capacity * share), "--slo", f"e2e={args.slo}", "--timeout", args.slo)
                line[f"good_{share}"] = round(report["goodput_per_s"])
            # Of the last, at 5 times.
            line |= {"late_p99_ms": report["late_ms"]["p99"], "failures": report["failures"], "refused_p50_p99_ms": refused_ms(report), "memory_mib": server.memory()}
            line["of_the_best"] = round(line["good_5"] / max(line[f"good_{share}"] for share in SHARES), 3)
            found[name].append(line)
            print(json.dumps(line), flush=True)
    for name, lines in found.items():
        shares = [line["of_the_best"] for line in lines]
        print(json.dumps({"door": name, "of_the_best": statistics.median(shares), "range": [min(shares), max(shares)]}), flush=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sida", required=True)
    arguments.add_argument("--model", default=str(REPOSITORY / "models/switch-tiny-64"))
    arguments.add_argument("--file", default=str(REPOSITORY / "tests/data/sentences.txt"), help="the prompts, a line each")
    arguments.add_argument("--server-cores", help="as taskset has it")
    arguments.add_argument("--client-cores", help="likewise")
    arguments.add_argument("--duration", default="6s")
    arguments.add_argument("--rounds", type=int, default=3, choices=range(1, 101), metavar="N")
    arguments.add_argument("--slo", default="500ms", help="from when a request was due to its end")
    args = arguments.parse_args()
    with tempfile.NamedTemporaryFile("w") as log:
        server = Server(args, log)
        try:
            measure(args, server)
        finally:
            server.end()


if __name__ == "__main__":
    main()
