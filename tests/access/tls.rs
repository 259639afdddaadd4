//! Certificates, against a real nginx.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::fault_server::{FaultServer, Reply};
use crate::proxy::TinyProxy;
use crate::{Place, SECRET, content, have};

/// An nginx that wants a client's certificate on its second port; ended with the test.
struct Nginx {
    child: Child,
    open: u16,
    strict: u16,
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

fn openssl(dir: &Path, args: &str) {
    let output = Command::new("openssl").args(args.split(' ')).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An authority, and two certificates of it: the server's for `localhost`, and the client's.
fn certificates(dir: &Path) {
    let new = "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    let ca = "-x509 -days 2 -subj /CN=bedplate-test -addext basicConstraints=critical,CA:TRUE";
    openssl(dir, &format!("{new} {ca} -keyout ca.key -out ca.pem"));
    for (name, extension) in
        [("server", "subjectAltName=DNS:localhost"), ("client", "extendedKeyUsage=clientAuth")]
    {
        let sign = format!("-x509 -days 2 -CA ca.pem -CAkey ca.key -subj /CN={name}");
        let plain = "-addext basicConstraints=critical,CA:FALSE";
        openssl(
            dir,
            &format!("{new} {sign} {plain} -addext {extension} -keyout {name}.key -out {name}.pem"),
        );
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Nginx {
    fn start(dir: &Path) -> Self {
        let (open, strict, text) = (free_port(), free_port(), dir.display());
        let temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("{name}_temp_path {text}/t-{name};"))
            .join(" ");
        let tls = format!(
            "ssl_certificate {text}/server.pem; ssl_certificate_key {text}/server.key; root {text}/root;"
        );
        let conf = format!(
            "daemon off; master_process off; pid {text}/pid; error_log {text}/error.log;
             events {{ }}
             http {{ access_log off; {temp}
               server {{ listen 127.0.0.1:{open} ssl; {tls} }}
               server {{ listen 127.0.0.1:{strict} ssl; {tls}
                 ssl_client_certificate {text}/ca.pem; ssl_verify_client on; }} }}"
        );
        std::fs::write(dir.join("nginx.conf"), conf).unwrap();
        let mut command = Command::new("nginx");
        command.arg("-p").arg(dir).arg("-e").arg(dir.join("error.log"));
        command.arg("-c").arg(dir.join("nginx.conf")).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let nginx = Self { child, open, strict };
        // It listens soon, or never: then every connection of the test fails.
        for _ in 0..500 {
            if std::net::TcpStream::connect(("127.0.0.1", strict)).is_ok() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        nginx
    }
}

#[test]
fn a_private_authority_and_a_client_s_certificate_open_the_way() {
    if !have(&[("nginx", "-v"), ("openssl", "version")]) {
        return;
    }
    let (place, bytes) = (Place::empty(), content(300_000));
    let dir = place.dir();
    certificates(dir);
    std::fs::create_dir(dir.join("root")).unwrap();
    std::fs::write(dir.join("root/a.img"), &bytes).unwrap();
    let nginx = Nginx::start(dir);
    let path = |name: &str| dir.join(name).display().to_string();
    let (ca, cert, key) = (path("ca.pem"), path("client.pem"), path("client.key"));
    let ca_key = path("ca.key");
    let open = format!("https://localhost:{}/a.img", nginx.open);
    let strict = format!("https://localhost:{}/a.img", nginx.strict);

    place.pulled(&[&open, "--cacert", &ca], &[], &bytes);
    let trust = ["--cacert", &ca];
    place.pulled(
        &[&[strict.as_str(), "--cert", &cert, "--key", &key], &trust[..]].concat(),
        &[],
        &bytes,
    );
    place.refused(&[&strict, "--cacert", &ca], &[], &["400"]);
    place.refused(&[&open, "--cacert", &key], &[], &["CA bundle", "no PEM certificate"]);
    let swapped = [&[open.as_str(), "--cert", &ca, "--key", &ca], &trust[..]].concat();
    place.refused(&swapped, &[], &["client key", "no PEM private key"]);
    let foreign = [&[open.as_str(), "--cert", &cert, "--key", &ca_key], &trust[..]].concat();
    place.refused(&foreign, &[], &["client certificate", "do not belong together"]);

    // Another origin does not get to see the client's certificate.
    let target = strict.clone();
    let origin = FaultServer::start(move |_| {
        let mut reply = Reply::status("302 Found");
        reply.headers.push(format!("Location: {target}"));
        reply
    });
    let args = [&[origin.url.as_str(), "--cert", &cert, "--key", &key], &trust[..]].concat();
    place.refused(&args, &[], &["400"]);

    let proxy = TinyProxy::start();
    let args = [open.as_str(), "--cacert", &ca, "--proxy", &proxy.url()];
    place.pulled(&args, &[], &bytes);
    assert!(proxy.take()[0].starts_with("CONNECT localhost:"));
    let file = place.file("p", &format!("http://bob:{SECRET}@127.0.0.1:{}", proxy.port));
    place.pulled(&[&open, "--cacert", &ca, "--proxy-file", &file], &[], &bytes);
    assert!(proxy.take()[0].to_ascii_lowercase().contains("proxy-authorization: basic "));
    place.pulled(&[&open, "--cacert", &ca], &[("HTTPS_PROXY", &proxy.url())], &bytes);
    assert_eq!(proxy.take().len(), 1);
    // The way to such a proxy is within TLS too: the certificate is for the source alone.
    let secure = proxy.url().replace("http:", "https:");
    let shown = ["--cert", &cert, "--key", &key, "--proxy", &secure];
    let args = [&[strict.as_str()], &trust[..], &shown[..]].concat();
    place.refused(&args, &[], &["client certificate", "https"]);
    assert!(proxy.take().is_empty());
    // Trying again would not help: it is told at once.
    let unknown = place.pull(&[&open], &[]);
    let text = String::from_utf8_lossy(&unknown.stderr);
    assert!(!unknown.status.success() && !place.output().exists());
    assert!(text.contains("--cacert") && !text.contains("gave up"), "{text}");
    let number = open.replace("localhost", "127.0.0.1");
    place.refused(&[&number, "--cacert", &ca], &[], &["certificate", "127.0.0.1"]);
}
