"""fetch-weights.sh, run as the chart's init containers run it: by BusyBox, as their image has it, several at once on one
volume, against a web server on loopback that also stands in for S3 and its token service."""

import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import unittest
import urllib.parse

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "helm/sida/files/fetch-weights.sh"
LIMIT = 60


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Server:
    """Serves `files`; `requests` holds (path, headers, body) of all that was asked. A file of `slow` ends only when it is
    taken out of it."""

    def __init__(self):
        self.files, self.requests, self.slow, answers = {}, [], set(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(b"")

            def do_POST(self):
                self.answer(self.rfile.read(int(self.headers["Content-Length"])))

            def answer(self, body):
                path = self.path.lstrip("/")
                answers.requests.append((path, dict(self.headers), body.decode()))
                content = answers.files.get(path)
                if content is None:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(content[:1])
                    self.wfile.flush()
                    while path in answers.slow:
                        time.sleep(0.05)
                    self.wfile.write(content[1:])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def asked(self, path):
        return [headers for asked, headers, _ in self.requests if asked == path]

    def close(self):
        self.slow.clear()
        self.server.shutdown()
        self.server.server_close()


class Fetch(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        """A PATH with BusyBox's programs, and curl."""
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.programs = pathlib.Path(directory.name)
        for name in subprocess.run(["busybox", "--list"], check=True, capture_output=True, text=True).stdout.split():
            (cls.programs / name).symlink_to(shutil.which("busybox"))
        (cls.programs / "curl").symlink_to(shutil.which("curl"))

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.volume = pathlib.Path(directory.name) / "volume"
        self.volume.mkdir()
        self.server = Server()
        self.addCleanup(self.server.close)
        self.server.files = {"config.json": b"{}", "model.safetensors": b"weights"}
        self.processes = []

    def tearDown(self):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def start(self, pod="pod-0", pin="aaaaaaaaaaaa", files=None, **more):
        """The init container of a pod."""
        listed = self.server.files if files is None else files
        lines = "".join(f"{name} {digest}\n" for name, digest in ((n, c if isinstance(c, str) else sha256(c)) for n, c in listed.items()))
        environment = {
            "PATH": str(self.programs), "POD_NAME": pod, "FROM": "url", "ENDPOINT": self.server.url, "REPOSITORY": "", "REVISION": "",
            "REGION": "us-east-1", "BASE": str(self.volume / "model"), "PIN": pin, "FILES": lines, "LEASE": "3", **more,
        }
        process = subprocess.Popen([self.programs / "sh", SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        self.processes.append(process)
        return process

    def ended(self, process, code=0):
        output, _ = process.communicate(timeout=LIMIT)
        self.assertEqual(process.returncode, code, output)
        return output

    def fetch(self, **more):
        return self.ended(self.start(**more))

    def until(self, condition):
        limit = time.monotonic() + LIMIT
        while not condition():
            self.assertLess(time.monotonic(), limit)
            time.sleep(0.05)

    def found(self):
        return sorted(path.name for path in self.volume.iterdir())

    def test_once_and_checked(self):
        """Broken: a pod would serve a file that is not the pinned one, or every start would fetch it anew."""
        self.ended(self.start(files={"config.json": "0" * 64}), code=1)
        self.assertEqual([name for name in self.found() if "partial" not in name], [])
        self.fetch()
        self.assertEqual((self.volume / "model-aaaaaaaaaaaa/config.json").read_bytes(), b"{}")
        before = len(self.server.requests)
        self.assertIn("there already", self.fetch())
        self.assertEqual(len(self.server.requests), before)
        self.assertEqual(self.found(), ["model-aaaaaaaaaaaa"])

    def test_another_pin_is_fetched_beside(self):
        """Broken: a changed revision or SHA-256 would be ignored, nodes would lose the model that they read, or the volume
        would fill with every version there ever was."""
        for number, pin in enumerate(("aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc")):
            self.server.files["config.json"] = b"version %d" % number
            self.fetch(pin=pin)
            self.assertEqual((self.volume / f"model-{pin}/config.json").read_bytes(), b"version %d" % number)
            # Versions are not of the same second.
            os.utime(self.volume / f"model-{pin}", (number, number))
        self.assertEqual(self.found(), ["model-bbbbbbbbbbbb", "model-cccccccccccc"])

    def test_what_others_left_goes(self):
        """Broken: what pods left that died while they fetched or converted would fill the volume, or what belongs to
        another model, whose name begins alike, would go with it."""
        left = ["model-dddddddddddd.partial.abc123", ".model-dddddddddddd.0123456789abcdef.partial", "model-dddddddddddd.fetched"]
        others = ["model-b-aaaaaaaaaaaa", "model-b-aaaaaaaaaaaa.partial.abc123", "model-b-aaaaaaaaaaaa.fetched", "model-b.lock", "model-notes"]
        for name in left + others:
            (self.volume / name).mkdir()
        self.fetch(KEEP="1")
        self.assertEqual(self.found(), sorted([*others, "model-aaaaaaaaaaaa"]))

    def test_what_is_there_is_checked(self):
        """Broken: a copy that the disk has damaged would be served, where no manifest tells."""
        self.fetch(VERIFY="yes")
        self.fetch(VERIFY="yes")
        (self.volume / "model-aaaaaaaaaaaa/model.safetensors").write_bytes(b"weight5")
        self.assertIn("FAILED", self.ended(self.start(VERIFY="yes"), code=1))

    def test_one_of_seven_fetches(self):
        """Broken: every pod of a release would download the whole model."""
        self.server.slow.add("model.safetensors")
        pods = [self.start(pod=f"pod-{number}") for number in range(7)]
        self.until(lambda: self.server.asked("model.safetensors"))
        # Longer than the lease: who fetches gives signs of life.
        time.sleep(5)
        self.server.slow.clear()
        outputs = [self.ended(pod) for pod in pods]
        self.assertEqual(len(self.server.asked("model.safetensors")), 1)
        self.assertEqual(sum("is complete" in output for output in outputs), 1)
        self.assertEqual(self.found(), ["model-aaaaaaaaaaaa"])

    def test_a_pod_that_dies_is_followed(self):
        """Broken: after a pod that was killed while it fetched nobody would go on, or its half of a model would stay."""
        self.server.slow.add("model.safetensors")
        first = self.start(pod="pod-0")
        self.until(lambda: self.server.asked("model.safetensors"))
        second = self.start(pod="pod-1")
        os.killpg(first.pid, signal.SIGKILL)
        self.server.slow.clear()
        self.assertIn("without a sign of life", self.ended(second))
        self.assertEqual(self.found(), ["model-aaaaaaaaaaaa"])

    def test_a_pod_that_starts_again_goes_on(self):
        """Broken: a container that is started again would wait for the lock that it held itself."""
        self.server.slow.add("model.safetensors")
        first = self.start()
        self.until(lambda: self.server.asked("model.safetensors"))
        os.killpg(first.pid, signal.SIGKILL)
        self.server.slow.clear()
        started = time.monotonic()
        self.fetch(LEASE="600")
        self.assertLess(time.monotonic() - started, 30)
        self.assertEqual(self.found(), ["model-aaaaaaaaaaaa"])

    def test_a_paused_pod_does_no_harm(self):
        """Broken: a pod that was paused and followed would put its files beside, or take away, what its follower has
        fetched."""
        self.server.slow.add("model.safetensors")
        first = self.start(pod="pod-0")
        self.until(lambda: self.server.asked("model.safetensors"))
        os.killpg(first.pid, signal.SIGSTOP)
        self.server.slow.clear()
        self.fetch(pod="pod-1")
        os.killpg(first.pid, signal.SIGCONT)
        first.communicate(timeout=LIMIT)
        self.assertEqual(self.found(), ["model-aaaaaaaaaaaa"])
        self.assertEqual((self.volume / "model-aaaaaaaaaaaa/model.safetensors").read_bytes(), b"weights")

    def test_others_wait_for_the_conversion(self):
        """Broken: every pod would convert, or what was converted would stay twice on the volume."""
        self.fetch(CONVERT="yes")
        self.assertEqual(self.found(), ["model-aaaaaaaaaaaa.fetched", "model.lock"])
        second = self.start(pod="pod-1", CONVERT="yes")
        other = self.start(pod="pod-2", pin="bbbbbbbbbbbb")
        # Longer than the lease, which does not run while somebody converts.
        time.sleep(5)
        self.assertIsNone(second.poll())
        self.assertIsNone(other.poll())
        # As `sida convert` ends.
        (self.volume / "model-aaaaaaaaaaaa").mkdir()
        self.ended(second)
        self.ended(other)
        self.assertEqual(self.found(), ["model-aaaaaaaaaaaa", "model-bbbbbbbbbbbb"])
        self.assertEqual(len(self.server.asked("config.json")), 2)

    def test_a_volume_that_cannot_be_written_is_told(self):
        """Broken: a pod would wait for ever where it has no right to write."""
        self.volume.chmod(0o555)
        self.addCleanup(self.volume.chmod, 0o755)
        if os.geteuid() == 0:
            # Root may write everywhere: a file in the place of the directory is as good.
            self.volume.chmod(0o755)
            (self.volume / "file").write_text("")
            process = self.start(BASE=str(self.volume / "file/model"))
        else:
            process = self.start()
        self.ended(process, code=1)

    def s3(self, **more):
        self.server.files |= {"bucket/model/config.json": b"{}"}
        return self.fetch(files={"config.json": b"{}"}, FROM="s3", REPOSITORY="bucket/model", **more)

    def signed(self):
        [headers] = self.server.asked("bucket/model/config.json")
        return headers["Authorization"], headers.get("X-Amz-Security-Token") or headers.get("x-amz-security-token")

    def test_s3_with_keys(self):
        """Broken: S3 would refuse keys that are temporary, since their token is missing or not signed."""
        self.s3(AWS_ACCESS_KEY_ID="AKIA1", AWS_SECRET_ACCESS_KEY="secret", AWS_SESSION_TOKEN="session")
        authorization, token = self.signed()
        self.assertIn("Credential=AKIA1/", authorization)
        self.assertIn("x-amz-security-token", authorization)
        self.assertEqual(token, "session")

    def test_s3_of_the_public(self):
        """Broken: a public bucket could not be read without keys."""
        self.s3()
        self.assertNotIn("Authorization", self.server.asked("bucket/model/config.json")[0])

    def test_s3_with_the_identity_of_the_pod(self):
        """Broken: models in S3 would need keys that somebody has to keep and renew."""
        self.server.files["sts/"] = (
            b"<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIA2</AccessKeyId>"
            b"<SecretAccessKey>se/cr+et=</SecretAccessKey><SessionToken>tok/en+==</SessionToken></Credentials>"
            b"</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>")
        token = self.volume.parent / "token"
        token.write_text("of the service account")
        self.s3(AWS_ROLE_ARN="arn:aws:iam::0:role/models", AWS_WEB_IDENTITY_TOKEN_FILE=str(token), AWS_ENDPOINT_URL_STS=f"{self.server.url}/sts")
        authorization, session = self.signed()
        self.assertIn("Credential=ASIA2/", authorization)
        self.assertEqual(session, "tok/en+==")
        [body] = [body for path, _, body in self.server.requests if path == "sts/"]
        asked = dict(urllib.parse.parse_qsl(body))
        self.assertEqual((asked["RoleArn"], asked["WebIdentityToken"]), ("arn:aws:iam::0:role/models", "of the service account"))

    def test_s3_with_the_agent_of_the_machine(self):
        """Broken: EKS Pod Identity would not be asked."""
        self.server.files["credentials"] = json.dumps({"AccessKeyId": "ASIA3", "SecretAccessKey": "s", "Token": "t", "Expiration": "2030"}).encode()
        token = self.volume.parent / "token"
        token.write_text("of the pod")
        self.s3(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{self.server.url}/credentials", AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=str(token))
        authorization, session = self.signed()
        self.assertIn("Credential=ASIA3/", authorization)
        self.assertEqual(session, "t")
        self.assertEqual(self.server.asked("credentials")[0]["Authorization"], "of the pod")

    def test_secrets_are_not_on_command_lines(self):
        """Broken: whoever sees the processes of a machine would see tokens."""
        self.server.files = {"owner/name/resolve/commit/config.json": b"{}"}
        self.server.slow.add("owner/name/resolve/commit/config.json")
        process = self.start(files={"config.json": b"{}"}, FROM="hub", REPOSITORY="owner/name", REVISION="commit", TOKEN="hf_secret")
        self.until(lambda: self.server.requests)
        lines = [path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        self.server.slow.clear()
        self.ended(process)
        self.assertTrue(any(b"config.json" in line for line in lines))
        self.assertFalse(any(b"hf_secret" in line for line in lines))
        self.assertEqual(self.server.requests[0][1]["Authorization"], "Bearer hf_secret")


if __name__ == "__main__":
    unittest.main()
