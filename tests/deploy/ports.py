"""Ports for daemons that start later, or once more where they were."""

import socket

_held = []


def held_ports(count):
    """Ports that are nobody else's until this process ends.

    Each stays bound, and does not listen: who asks the system for any port, or connects, is given another, while a server with
    SO_REUSEADDR, as ledgerd, Prometheus and the collector are, may listen on it, end, and listen again.
    """
    sockets = []
    for _ in range(count):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", 0))
        sockets.append(one)
    _held.extend(sockets)
    return [one.getsockname()[1] for one in sockets]
