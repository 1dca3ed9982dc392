"""What a cluster would have in Secrets: certificates and callers, made with the commands of docs/security.md."""

import os
import pathlib
import socket
import ssl
import subprocess

import grpc

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ["ledgerd.ledgerd.svc", "ledgerd-workers.ledgerd.svc"]
KEY = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
# Each has its own role and no other.
CALLERS = {"producer": "producer", "worker": "worker"}


class Credentials:
    """The Secrets `ledgerd-tls` and `ledgerd-callers` as a kubelet mounts them, and what callers have to show."""

    def __init__(self, folder, group, agent, by_certificate):
        self.folder, self.group, self.by_certificate = folder, group, by_certificate
        self.kind = "certificate" if by_certificate else "token"
        self.own = folder / "own"
        self.own.mkdir()
        self.renewals = 0
        self.made([*KEY, "-days", "2", "-subj", "/CN=ledgerd-ca", "-keyout", self.own / "ca.key", "-out", self.own / "ca.pem"])
        stanzas = self.own / "callers.toml"
        for name, role in CALLERS.items():
            if by_certificate:
                san = f"spiffe://rehearsal/{name}"
                self.leaf(name, f"URI:{san}")
                with open(stanzas, "a") as file:
                    file.write(f'[[caller]]\nname = "{name}"\nroles = ["{role}"]\nagents = ["{agent}"]\nsan = "{san}"\n')
            else:
                token = self.made([ROOT / "target/debug/ledgerd", "token", "new", "--name", name, "--role", role,
                                   "--agent", agent, "--add", stanzas])
                (self.own / f"{name}.token").write_text(token)
        self.mount("callers", {"callers.toml": stanzas.read_text()})
        self.renew()

    @staticmethod
    def made(command):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def leaf(self, name, sans):
        self.made([*KEY, "-days", "1", "-subj", f"/CN={name}", "-addext", f"subjectAltName={sans}",
                   "-addext", "basicConstraints=critical,CA:FALSE", "-CA", self.own / "ca.pem", "-CAkey", self.own / "ca.key",
                   "-keyout", self.own / f"{name}.key", "-out", self.own / f"{name}.pem"])

    def renew(self):
        """Another certificate of the daemon, in the place of the last."""
        self.leaf("server", ",".join(f"DNS:{name}" for name in NAMES) + ",IP:127.0.0.1")
        self.mount("tls", {"tls.crt": self.text("server.pem"), "tls.key": self.text("server.key"), "ca.crt": self.text("ca.pem")})

    def mount(self, volume, files):
        """Writes files as a kubelet does: all of them change at once, by one link, and only the pod's group reads them."""
        self.renewals += 1
        place, version = self.folder / volume, f"..{self.renewals}"
        (place / version).mkdir(parents=True)
        for name, text in files.items():
            path = place / version / name
            path.write_text(text)
            path.chmod(0o440)
            if os.geteuid() == 0:
                os.chown(path, 0, self.group)
            if not (place / name).is_symlink():
                (place / name).symlink_to(f"..data/{name}")
        (place / "..new").symlink_to(version)
        (place / "..new").rename(place / "..data")

    def text(self, name):
        return (self.own / name).read_text()

    def channel(self, caller, address):
        """A connection of a caller, or of nobody, that knows the daemon by the name of its service."""
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200),
                   ("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", NAMES[0])]
        own = (None, None)
        if caller and self.by_certificate:
            own = (self.text(f"{caller}.key").encode(), self.text(f"{caller}.pem").encode())
        credentials = grpc.ssl_channel_credentials(self.text("ca.pem").encode(), *own)
        if caller and not self.by_certificate:
            token = grpc.access_token_call_credentials(self.text(f"{caller}.token").strip())
            credentials = grpc.composite_channel_credentials(credentials, token)
        return grpc.secure_channel(address, credentials, options)

    def environment(self, caller):
        """What the client commands of a caller take."""
        said = {"LEDGERD_TLS_CA": "ca.pem"}
        if self.by_certificate:
            said |= {"LEDGERD_CLIENT_CERT": f"{caller}.pem", "LEDGERD_CLIENT_KEY": f"{caller}.key"}
        else:
            said |= {"LEDGERD_TOKEN_FILE": f"{caller}.token"}
        return {name: str(self.own / file) for name, file in said.items()}

    def newest(self):
        return ssl.PEM_cert_to_DER_cert(self.text("server.pem"))

    def presented(self, address):
        """The certificate that a daemon shows now."""
        host, _, port = address.partition(":")
        context = ssl.create_default_context(cafile=self.own / "ca.pem")
        context.set_alpn_protocols(["h2"])
        with socket.create_connection((host, port), timeout=10) as plain:
            with context.wrap_socket(plain, server_hostname=NAMES[1]) as secure:
                return secure.getpeercert(binary_form=True)
