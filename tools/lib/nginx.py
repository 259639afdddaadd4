"""A web server of our own: nginx on a free loopback port, without privileges."""

import socket
import urllib.error
import urllib.request

_CONF = """
# One process: its CPU time is one number, and it keeps the user who started it.
daemon off;
master_process off;
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
        root {root};
    }}
}}
"""


class Nginx:
    """Serves the files below `root` at `url`."""

    def __init__(self, scratch, root, prefix=()):
        conf_dir = scratch.dir("nginx")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        conf = conf_dir / "nginx.conf"
        conf.write_text(_CONF.format(dir=conf_dir, port=port, root=root))
        self.url = f"http://127.0.0.1:{port}"
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
