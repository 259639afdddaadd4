"""AWS's S3 client (the CRT) brings one URL into a file, unsigned; then fdatasync.

  peer_crt.py URL FILE [--direct] [--cacert FILE]
"""

import os
import sys
from urllib.parse import urlsplit

from awscrt import auth, http, io, s3


def main(url, path, *options):
    parts = urlsplit(url)
    bootstrap = io.ClientBootstrap(
        io.EventLoopGroup(), io.DefaultHostResolver(io.EventLoopGroup()))
    secure = parts.scheme == "https"
    tls = None
    if secure and "--cacert" in options:
        context = io.TlsContextOptions()
        context.override_default_trust_store_from_path(
            None, options[options.index("--cacert") + 1])
        tls = io.ClientTlsContext(context).new_connection_options()
        tls.set_server_name(parts.hostname)
    client = s3.S3Client(
        bootstrap=bootstrap, region="us-east-1",
        tls_mode=s3.S3RequestTlsMode.ENABLED if secure else s3.S3RequestTlsMode.DISABLED,
        tls_connection_options=tls, throughput_target_gbps=10.0,
        credential_provider=auth.AwsCredentialsProvider.new_anonymous(bootstrap)
        if hasattr(auth.AwsCredentialsProvider, "new_anonymous") else None,
        fio_options=s3.S3FileIoOptions(direct_io=True) if "--direct" in options else None)
    headers = http.HttpHeaders([("host", parts.netloc)])
    client.make_request(
        type=s3.S3RequestType.GET_OBJECT, recv_filepath=path,
        request=http.HttpRequest("GET", parts.path, headers)).finished_future.result()
    with open(path, "rb+") as out:
        os.fdatasync(out.fileno())


if __name__ == "__main__":
    main(*sys.argv[1:])
