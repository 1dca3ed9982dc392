"""A second client: the wire as seen by stock grpcio and stubs generated from proto/, with nothing of our SDKs.

The stubs go to a temporary folder before the test modules are imported. The daemon is the real binary,
`target/debug/ledgerd` or what LEDGERD_BIN names.
"""

import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUBS = tempfile.mkdtemp(prefix="ledgerd-stubs-")
_names = itertools.count(1)


def pytest_configure(config):
    protos = sorted(path.relative_to(ROOT / "proto") for path in (ROOT / "proto").rglob("*.proto"))
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={STUBS}", f"--grpc_python_out={STUBS}"]
        + [str(path) for path in protos],
        cwd=ROOT / "proto", check=True)
    sys.path[:0] = [STUBS, str(ROOT / "tests/python")]


def pytest_unconfigure(config):
    shutil.rmtree(STUBS, ignore_errors=True)


@pytest.fixture(scope="session")
def binary():
    path = pathlib.Path(os.environ.get("LEDGERD_BIN", ROOT / "target/debug/ledgerd"))
    if not path.is_file():
        pytest.exit(f"{path} is missing: run `cargo build`, or set LEDGERD_BIN", returncode=2)
    return path.resolve()


@pytest.fixture(scope="session")
def shared_daemon(binary, tmp_path_factory):
    """One daemon for all tests that do not harm it; each test has agents of its own."""
    from daemon import Daemon

    with Daemon(binary, tmp_path_factory.mktemp("shared")) as daemon:
        yield daemon


@pytest.fixture
def own_daemon(binary, tmp_path):
    """A daemon that the test may kill."""
    from daemon import Daemon

    with Daemon(binary, tmp_path) as daemon:
        yield daemon


@pytest.fixture
def connect():
    """Returns `connect(daemon)`: a Ledger, closed with all its sessions when the test ends."""
    from ledger_client import Ledger

    opened = []

    def connect(daemon):
        opened.append(Ledger(daemon.address))
        return opened[-1]

    yield connect
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(shared_daemon, connect):
    return connect(shared_daemon)


@pytest.fixture
def agent(ledger):
    """A new agent of the shared daemon that retries without a noticeable delay."""
    return new_agent(ledger)


def new_agent(ledger):
    name = f"agent-{next(_names)}"
    ledger.configure_quick(name)
    return name
