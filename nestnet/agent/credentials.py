"""Who a machine is: its key, made on it and never sent, and the certificate that the authority has signed for it.

    STATE/authority.pem   whose controllers it trusts
    STATE/own.pem         key and certificate
    STATE/joining.pem     key and request of a join that has not had its answer yet: asked again, it is the same one

A certificate is renewed, with a new key, when two thirds of its time are over. Files are replaced whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestnet.model.errors import Conflict, NestnetError, NotFound, Unauthenticated

if TYPE_CHECKING:
    from nestnet.api.client import Client, Credentials

PAUSE = 60.0  # Seconds between two attempts to renew, at most.


def boot() -> str:
    """What tells this running system from all others, also from one that has a copy of its disk."""
    kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{kernel}.{Path('/proc/self/ns/net').stat().st_ino}"


def join(url: str, token: str, machine: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Join as a machine, and keep who it is in `folder`. Returns the machine. Asked again after a lost answer, it is
    the same join. Raises Conflict if there is somebody already, NotFound or Usage of trunks that cannot be, and what
    the controller says."""
    from nestnet.api.client import Client, trusted

    if (folder / "own.pem").exists():
        raise Conflict(
            f"this machine has joined already: {folder}/own.pem says as which; move {folder} away to join anew",
            "already_joined",
        )
    if ways := machine.get("trunks"):
        from nestnet.agent import trunks

        trunks.judge(machine["address"], machine["nics"], ways)
    credentials = trusted(url, token)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    waiting = folder / "joining.pem"
    if not waiting.exists():
        _write(waiting, "".join(_new_key()))
    key, request = _split(waiting.read_text())
    with Client(url, credentials=credentials) as client:
        answer = client.enter(machine, request, key=sha256(f"{token} {request}".encode()).hexdigest())
    assert credentials.authority is not None or url.startswith("unix:")
    _write(folder / "authority.pem", credentials.authority or "")
    _write(folder / "own.pem", key + answer["certificate"])
    waiting.unlink()
    joined: dict[str, Any] = answer["machine"]
    return joined


class Own:
    """The credentials of this machine, from the folder where `join` put them. Raises NotFound if it has not."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._next = 0.0
        if not (folder / "own.pem").exists():
            raise NotFound(f"{folder / 'own.pem'}, as which machine this has joined: `nestnet join` makes it; it")
        self._read()

    def _read(self) -> None:
        from cryptography import x509

        file = self._folder / "own.pem"
        found = x509.load_pem_x509_certificate(file.read_bytes().partition(_END)[2])
        self._since, self.until = file.stat().st_mtime, found.not_valid_after_utc.timestamp()

    @property
    def credentials(self) -> Credentials:
        """What to show now. Raises Unauthenticated when the time of the certificate is over."""
        from nestnet.api.client import Credentials

        if time.time() >= self.until:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.until))
            raise Unauthenticated(
                f"this machine's certificate ran out on {when}: move {self._folder} away, and `nestnet join` anew with "
                "a join token; what it forwards it forwards on"
            )
        return Credentials(None, (self._folder / "authority.pem").read_text(), self._folder / "own.pem")

    def renew(self, client: Client, machine: str) -> None:
        """Take a new certificate if it is time. What goes wrong is said, and tried again."""
        now, life = time.time(), self.until - self._since
        if now < self._since + life * 2 / 3 or now < self._next:
            return
        self._next = now + min(PAUSE, life / 30)
        try:
            key, request = _new_key()
            _write(self._folder / "own.pem", key + client.renew(machine, request))
            self._read()
            client.become(self.credentials)
            self._say(f"a new certificate, until {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.until))}")
        except (NestnetError, OSError, ValueError) as error:
            self._say(f"renewing the certificate: {error}")


_END = b"-----END PRIVATE KEY-----\n"


def _new_key() -> tuple[str, str]:
    """A new key and a request to sign it, PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private = key.private_bytes(pem, pkcs8, serialization.NoEncryption())
    return private.decode(), request.public_bytes(pem).decode()


def _split(text: str) -> tuple[str, str]:
    key, end, request = text.partition(_END.decode())
    return key + end, request


def _write(file: Path, text: str) -> None:
    """All of it, or what was there before; readable by its owner only."""
    new = file.with_name(f"{file.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    new.rename(file)
