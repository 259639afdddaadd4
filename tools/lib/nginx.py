"""A web server of our own: nginx on a free loopback port, as the user who starts it."""

import os
import shutil
import socket
import urllib.error
import urllib.request

from lib import procs

_CONF = """
daemon off;
{processes}
pid {dir}/nginx.pid;
error_log {dir}/error.log warn;
events {{ worker_connections 256; }}
http {{
    log_format sent '$request_method $status $body_bytes_sent $uri';
    access_log {dir}/access.log sent;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    sendfile on;
    tcp_nopush on;
    server {{
        listen 127.0.0.1:{port};
        {tls}
        root {root};
    }}
}}
"""


# Workers keep the user who started nginx; `user` is refused to anybody but root.
_WORKERS = "worker_processes auto;" + (" user root;" if os.geteuid() == 0 else "")


class Nginx:
    """Serves the files below `root` at `url`, and with `tls` (certificate, key) at `tls_url`.

    With `workers` it has one process a core, as nginx is installed; else only one. Workers outlive a
    program that is killed outright.
    """

    def __init__(self, scratch, root, prefix=(), tls=None, workers=False):
        conf_dir = scratch.dir("nginx")
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            port, tls_port = first.getsockname()[1], second.getsockname()[1]
        lines = ""
        if tls:
            lines = (f"listen 127.0.0.1:{tls_port} ssl; ssl_protocols TLSv1.3; "
                     f"ssl_certificate {tls[0]}; ssl_certificate_key {tls[1]};")
        conf = conf_dir / "nginx.conf"
        processes = _WORKERS if workers else "master_process off;"
        conf.write_text(_CONF.format(
            dir=conf_dir, port=port, root=root, tls=lines, processes=processes))
        self.url = f"http://127.0.0.1:{port}"
        self.tls_url = f"https://127.0.0.1:{tls_port}"
        self._access = conf_dir / "access.log"
        self.server = scratch.serve(
            "nginx", ["nginx", "-p", conf_dir, "-e", conf_dir / "error.log", "-c", conf], prefix)
        self.server.wait_for(self._answers, "an answer", every_s=0.01)

    def _answers(self):
        try:
            with urllib.request.urlopen(self.url + "/", timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def cpu_s(self):
        return self.server.cpu_s()

    def sent(self, path):
        """(requests, body bytes) that were answered for the file at `path` so far."""
        requests, total = 0, 0
        for line in self._access.read_text().splitlines():
            _, _, length, uri = line.split(" ", 3)
            if uri == path:
                requests, total = requests + 1, total + int(length)
        return requests, total


def certificate(directory):
    """(certificate, key, authority) for 127.0.0.1; `None` without openssl."""
    if shutil.which("openssl") is None:
        return None
    names = ("ca.pem", "ca.key", "cert.pem", "key.pem", "cert.csr", "cert.ext")
    authority, authority_key, cert, key, request, extensions = (directory / name for name in names)
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    procs.run("openssl", "req", "-x509", *new, "-days", "2", "-subj", "/CN=test authority",
              "-keyout", authority_key, "-out", authority)
    procs.run("openssl", "req", *new, "-subj", "/CN=127.0.0.1", "-keyout", key, "-out", request)
    extensions.write_text("subjectAltName=IP:127.0.0.1\n")
    procs.run("openssl", "x509", "-req", "-in", request, "-CA", authority, "-CAkey", authority_key,
              "-CAcreateserial", "-days", "2", "-extfile", extensions, "-out", cert)
    return cert, key, authority
