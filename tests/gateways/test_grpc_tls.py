"""The gRPC port of a server with a certificate: encrypted as well, with no second way in."""

import grpc
from certificates import make_certificate
from grpc_client import OK, Client
from grpc_parts import FIELDS, Robot, refused
from numpy_policy import write_checkpoint
from serving_parts import serving


def test_grpc_over_tls(folder, messages):
    """`--tls.cert` and `--tls.key` of serve_policy cover `--grpc.port`: a client that trusts the certificate is served, one
    that does not, and one that speaks plainly, are not; the key is asked for inside."""
    cert, key = make_certificate(folder)
    checkpoint = write_checkpoint(folder / "quick", **FIELDS)
    flags = ("--policy.path", checkpoint, "--grpc.port", 0, "--tls.cert", cert, "--tls.key", key)
    with serving(*flags, "--api-key", "sesame") as (server, _):
        assert "Waiting for client connections at wss://" in server.output
        port = int(server.wait_for(r"gRPC robots at 127.0.0.1:(\d+)")[1])
        trusted = grpc.ssl_channel_credentials(cert.read_bytes())
        with Client(port, messages, key="Api-Key sesame", credentials=trusted) as client:
            answer = client.predict(Robot(messages, 0).observation())
            assert answer.status == OK, answer.error_message
        for credentials, code in (
            (trusted, grpc.StatusCode.UNAUTHENTICATED),
            (grpc.ssl_channel_credentials(), grpc.StatusCode.UNAVAILABLE),
            (None, grpc.StatusCode.UNAVAILABLE),
        ):
            with Client(port, messages, credentials=credentials) as stranger:
                refused(code, stranger.status)
        assert "Traceback" not in server.output
