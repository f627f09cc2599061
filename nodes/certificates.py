"""Certificates for the tunnel: each rank signs its own, and knows the others' by heart.

    DIR/rank0.pem, ...    secret key and certificate of a rank: its owner's alone, mode 0600
    DIR/rank0.crt, ...    its certificate

No authority is asked, and no name in a certificate is believed: the other side must show exactly the certificate that
the folder has of it. Knows files and TLS contexts; no sockets.
"""

from __future__ import annotations

import datetime
import os
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from harness.errors import ConfigError

VALID = datetime.timedelta(days=3650)


def make_certificates(folder: Path, *, num_ranks: int) -> list[Path]:
    """Writes them. Replaces none. Returns: the files. Raises: ConfigError, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"rank{rank}.{kind}" for rank in range(num_ranks) for kind in ("pem", "crt")]
    if there := [file for file in files if file.exists()]:
        raise ConfigError(f"{there[0]}: is there already; a key is not replaced: name another folder, or delete it")
    for rank in range(num_ranks):
        key, now = generate_private_key(SECP256R1()), datetime.datetime.now(datetime.UTC)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"rank{rank}")])
        builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        # A day back: the ranks' clocks may differ.
        builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + VALID)
        public = builder.sign(key, SHA256()).public_bytes(Encoding.PEM)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        for kind, content, mode in (("pem", secret + public, 0o600), ("crt", public, 0o644)):
            with open(os.open(folder / f"rank{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
    return files


def certificate_of(folder: Path, rank: int) -> bytes:
    """In DER, as a connection shows it. Raises: ConfigError."""
    file = folder / f"rank{rank}.crt"
    try:
        return ssl.PEM_cert_to_DER_cert(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}; make keys with: gradtap keys --out {folder}") from error


def context_of(folder: Path, rank: int, *, num_ranks: int, server_side: bool) -> ssl.SSLContext:
    """TLS 1.3 with a rank's own certificate; the other side must have one of the folder's. Raises: ConfigError."""
    file = folder / f"rank{rank}.pem"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate itself is compared
    context.verify_mode = ssl.CERT_REQUIRED
    if server_side:
        context.num_tickets = 0  # nobody resumes, and the client never reads
    try:
        if file.stat().st_mode & 0o077:
            raise ConfigError(f"{file}: others may read it; chmod 600 it, or make new keys")
        context.load_cert_chain(file)
        for other in range(num_ranks):
            context.load_verify_locations(folder / f"rank{other}.crt")
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"{file}: {error}; make keys with: gradtap keys --out {folder}") from error
    return context
