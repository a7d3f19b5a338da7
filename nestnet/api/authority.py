"""The built-in authority: it signs certificates of machines and of the controller, for nobody else.

    authority  (10 years, in the store, so in backups)
      +- controller   made at its start, for servers only; a new one before it runs out
      +- machine      made at `nestnet join` from the machine's own key; renewed by its agent before it runs out

A machine's certificate says whose it is by a URI (RFC 5280, 4.2.1.6): urn:nestnet:machine:PUBLIC_ID:TIME, where TIME
counts how often somebody has joined as it. Nothing is revoked by lists: the store is asked at every request.

Clients do not look at the controller's name. All that this authority ever signs for servers is controllers, and they
are reached by addresses, through relays and other names; machines' certificates do not count for servers.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nestnet.api.client import pin
from nestnet.model.errors import Invalid, Problem

YEARS = 10
LIFE = 30 * 24 * 3600.0  # Seconds that a certificate of a machine or controller counts.
EARLIER = 300  # Seconds that clocks may be behind ours.
URN = "urn:nestnet:machine:"


@dataclass(frozen=True, slots=True)
class Speaks:
    """Whom a certificate speaks for: a machine's public id, and which time it joined. `until`: seconds since 1970."""

    machine: str
    joins: int
    until: float


def make_authority() -> tuple[bytes, bytes]:
    """A new one: its key and certificate, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nestnet authority")])
    builder = _builder(name, name, key.public_key(), YEARS * 365 * 24 * 3600)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return _private(key), builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


class Authority:
    """Signs. `certificate` (PEM) is what everybody may see; `life` is how long what it signs counts, in seconds."""

    def __init__(self, key: bytes, certificate: bytes, life: float = LIFE) -> None:
        self.certificate = certificate
        self.life = life
        self.pin = pin(certificate.decode())
        loaded = serialization.load_pem_private_key(key, None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded
        self._own = x509.load_pem_x509_certificate(certificate)

    def sign_machine(self, request: str, machine: str, joins: int) -> str:
        """The certificate, PEM, for a machine's certificate request, PEM. Of the request only the key counts. Raises
        Invalid."""
        key = _key_of(request)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, machine)])
        builder = _builder(name, self._own.subject, key, self.life)
        uri = x509.UniformResourceIdentifier(f"{URN}{machine}:{joins}")
        builder = builder.add_extension(x509.SubjectAlternativeName([uri]), critical=True)
        return self._sign(builder, ExtendedKeyUsageOID.CLIENT_AUTH).decode()

    def sign_controller(self, names: Sequence[str]) -> tuple[bytes, bytes]:
        """A new key and certificate, PEM, for a controller that is called by these names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nestnet controller")])
        builder = _builder(name, self._own.subject, key.public_key(), self.life)
        if names:
            alternative = x509.SubjectAlternativeName([_general(one) for one in names])
            builder = builder.add_extension(alternative, critical=False)
        return _private(key), self._sign(builder, ExtendedKeyUsageOID.SERVER_AUTH)

    def _sign(self, builder: x509.CertificateBuilder, use: x509.ObjectIdentifier) -> bytes:
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def speaks_for(certificate: bytes) -> Speaks | None:
    """Whom a certificate (DER) speaks for; None: for no machine. That this authority signed it, TLS has judged."""
    parsed = x509.load_der_x509_certificate(certificate)
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        machine, _, joins = uri.removeprefix(URN).rpartition(":")
        if uri.startswith(URN) and joins.isdecimal():
            return Speaks(machine, int(joins), parsed.not_valid_after_utc.timestamp())
    return None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, life: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(seconds=EARLIER))
        .not_valid_after(now + datetime.timedelta(seconds=life))
    )


def _usage(signs: bool) -> x509.KeyUsage:
    """What a key is for: to sign certificates, or what TLS has to be signed."""
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _key_of(request: str) -> ec.EllipticCurvePublicKey:
    try:
        parsed = x509.load_pem_x509_csr(request.encode())
        key, whole = parsed.public_key(), parsed.is_signature_valid
    except Exception:
        raise _invalid("this is no certificate request in PEM") from None
    if not whole:
        raise _invalid("whoever asks does not have the key of this certificate request")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _invalid("a machine's key is one on the curve P-256")
    return key


def _invalid(message: str) -> Invalid:
    return Invalid([Problem("bad_value", "/request", message)])
