"""The real daemon as a child process."""

import os
import queue
import signal
import subprocess
import threading

FIRST_LINE = "ledgerd listening on "
# In payloads, unless a test says what is in them; with what tokens begin with, it may be in no log.
CANARY = b"canary-5e1f"


def secrets_in(log):
    """Lines that tell what is for nobody who reads logs."""
    return [line for line in log.read_bytes().splitlines() if CANARY in line or b"ldg_" in line]


class Daemon:
    """`ledgerd serve` on a port of its own choice, over a data folder that outlives it.

    A restart listens on the same port, as a restarted daemon does, so that clients find it again.
    """

    def __init__(self, binary, folder, http="off", environment=None):
        self.binary, self.folder, self.http = binary, folder, http
        self.environment = {**os.environ, "LEDGERD_LOG": "info,ledgerd=debug", **(environment or {})}
        self.address, self.process = "127.0.0.1:0", None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, fault, *_):
        if self.process.poll() is None:
            self.terminate()
            code = self.exit_code()
            assert code == 0, f"a drained daemon exits 0, not {code}\n{self.log()}"
        told = secrets_in(self.folder / "stderr")
        assert fault or not told, f"a log has what is for nobody who reads logs: {told}"

    def start(self, timeout=20):
        with open(self.folder / "stderr", "ab") as stderr:
            self.process = subprocess.Popen(
                [self.binary, "serve", "--listen", self.address, "--http-listen", self.http,
                 "--data-dir", self.folder / "data"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, env=self.environment)
        lines = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self.process.stdout, lines), daemon=True).start()
        try:
            line = lines.get(timeout=timeout)
        except queue.Empty:
            line = "nothing"
        if not line.startswith(FIRST_LINE):
            self.kill()
            raise AssertionError(f"first line of stdout was {line!r}\n{self.log()}")
        self.address = line.removeprefix(FIRST_LINE).strip()
        if self.http != "off":
            self.http = lines.get(timeout=timeout).removeprefix("http listening on ").strip()

    @staticmethod
    def _read(stdout, lines):
        """Reads to the end, so that the pipe never fills; an empty line stands for the end."""
        with stdout:
            for line in stdout:
                lines.put(line)
        lines.put("")

    def kill(self):
        """SIGKILL: no drain, no last words."""
        self.process.kill()
        self.process.wait(timeout=10)

    def terminate(self):
        """SIGTERM: drain."""
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self, timeout=30):
        """Of a daemon that was told to drain."""
        try:
            return self.process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not drained after {timeout} s\n{self.log()}") from None

    def log(self):
        return (self.folder / "stderr").read_text(errors="replace")[-4000:]
