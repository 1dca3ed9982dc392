#!/usr/bin/env python3
"""Has a real Prometheus scrape a daemon with the rules of deploy/, and asks it for what it then knows.

Without Prometheus it says that nothing was checked; with LEDGERD_CHECK_ALL, as in CI, that is a fault.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

from ports import held_ports

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = os.environ.get("LEDGERD_BIN", ROOT / "target/debug/ledgerd")
PATIENCE = 60
CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs: [{{job_name: ledgerd, static_configs: [{{targets: ["{target}"]}}]}}]
"""


def asked(base, path):
    with urllib.request.urlopen(f"{base}/api/v1/{path}", timeout=10) as answer:
        return json.load(answer)["data"]


def eventually(what, look):
    """Looks until there is something to see."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            seen = look()
        except OSError:
            seen = None
        if seen:
            return seen
        time.sleep(0.1)
    raise SystemExit(f"{pathlib.Path(sys.argv[0]).stem}: not within {PATIENCE} s: {what}")


def main():
    if not shutil.which("prometheus"):
        print("scrape: NOT CHECKED: no prometheus (Debian: apt-get install prometheus)", file=sys.stderr)
        return 1 if os.environ.get("LEDGERD_CHECK_ALL") else 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        target, own, grpc = (f"127.0.0.1:{port}" for port in held_ports(3))
        config = CONFIG.format(rules=ROOT / "deploy/prometheus/rules.yaml", target=target)
        (folder / "prometheus.yaml").write_text(config)
        with open(folder / "log", "w") as log:
            daemon = subprocess.Popen(
                [BINARY, "serve", "--listen", grpc, "--http-listen", target, "--data-dir", folder / "data"],
                stdout=log, stderr=log)
            prometheus = subprocess.Popen(
                ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'tsdb'}",
                 f"--web.listen-address={own}"], stdout=log, stderr=log)
        try:
            base = f"http://{own}"
            query = lambda text: asked(base, "query?" + urllib.parse.urlencode({"query": text}))["result"]  # noqa: E731
            eventually("the daemon is up", lambda: [one for one in query("up") if one["value"][1] == "1"])
            command = [BINARY, "--address", grpc, "task", "enqueue", "a", "t", "--payload", "{}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            eventually("a task is counted", lambda: [
                one for one in query('ledgerd_agent_depth{agent="a",state="QUEUED"}') if one["value"][1] == "1"])
            eventually("a call is counted", lambda: query(
                'rpc_server_call_duration_seconds_count{rpc_method="ledger.v1.TaskService/EnqueueTask"}'))
            known = {one["metric"]: one for one in asked(base, "targets/metadata")}
            faults = []
            rules = eventually("every rule was evaluated", lambda: evaluated(asked(base, "rules")["groups"]))
            faults += [f"rule {rule['name']}: {rule.get('lastError')}" for rule in rules if rule["health"] != "ok"]
            for fault in faults:
                print(f"scrape: {fault}", file=sys.stderr)
            print(f"scrape: a real Prometheus knows {len(known)} metrics and evaluates {len(rules)} rules, {len(faults)} faults")
            return 1 if faults else 0
        except BaseException:
            print((folder / "log").read_text(), file=sys.stderr)
            raise
        finally:
            for process in (prometheus, daemon):
                process.terminate()
                process.wait(timeout=60)


def evaluated(groups):
    """All rules, once none of them waits for its first evaluation."""
    rules = [rule for group in groups for rule in group["rules"]]
    return rules if rules and all(rule["health"] != "unknown" for rule in rules) else None


if __name__ == "__main__":
    sys.exit(main())
