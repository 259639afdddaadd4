//! The way to a source: redirects, proxies, and who gets which credentials.
//!
//! Why: an HTTP library follows a redirect with most of the headers that it was given, and asks
//! nobody where it leads.
//! How: redirects are followed here, hop by hop, within a bound: each is judged (scheme, address),
//! and credentials, headers and the client's certificate go to the origin (scheme, host and port)
//! that the source names and to no other; once it was left, they stay away. Where a walk ended is
//! remembered, so that all ranges come from one server; if that one refuses, the walk begins again.
//! Never: connects to an address that the policy refuses, or takes credentials from a redirect.
//! Start at [`Route::send`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::Uri;
use hyper::http::uri::InvalidUri;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue, LOCATION, USER_AGENT};
use reqwest::{Proxy, StatusCode, redirect};
use rustls::ClientConfig;
use url::Url;

use super::access::{Access, Authorization, proxy_url, unusable};
use super::address::{AddressPolicy, AddressRefused, Guarded};
use super::direct::Direct;
use super::reply::Reply;
use super::s3::Object;
use super::secret::AccessError;
use super::tls::Tls;
use crate::fetch::error::{FetchError, HttpError};
use crate::fetch::policy::Policy;
use crate::fetch::source::{self, SourceUrl};

/// Every name and every address, as exceptions from a proxy.
const ALL_HOSTS: &str = "*,0.0.0.0/0,::/0";

const CERT_AND_PROXY: &str = "a proxy that is itself reached over https would be shown it; use an http \
                              proxy, or none";

/// What this program calls itself.
const AGENT: &str = concat!("bedplate/", env!("CARGO_PKG_VERSION"));

/// Where a walk begins.
enum Start {
    /// At a URL, without its userinfo.
    Url(Url),
    /// At an object, whose URL is signed for each request.
    Object(Object),
}

/// Where a walk is.
#[derive(Clone)]
struct Hop {
    url: Url,
    /// True as long as only the source's own origin was asked.
    own: bool,
}

/// The way to one source.
pub(super) struct Route {
    shown: String,
    start: Start,
    authorization: Option<Authorization>,
    headers: HeaderMap,
    tls: Tls,
    proxies: Proxies,
    addresses: Arc<AddressPolicy>,
    connect_timeout: Duration,
    max_redirects: usize,
    clients: Mutex<HashMap<Via, reqwest::Client>>,
    direct: Direct,
    /// For direct connections: without and with the client's certificate.
    configs: Mutex<[Option<Arc<ClientConfig>>; 2]>,
    landed: Mutex<Option<Hop>>,
}

/// What a client is made for: its proxy, and whether it may show the client's certificate.
type Via = (Uri, bool);

struct Proxies {
    matcher: Matcher,
    /// The image's own exceptions, on top of the environment's.
    bypass: Option<Matcher>,
    /// What a proxy's own address is held against.
    addresses: Arc<AddressPolicy>,
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Route({})", self.shown)
    }
}

impl Route {
    /// Reads the credentials, once for this route.
    pub(super) fn new(
        url: &SourceUrl,
        access: &Access,
        policy: &Policy,
    ) -> Result<Self, FetchError> {
        install_crypto();
        let shown = url.to_string();
        let made = Self::made(shown.clone(), url.expose(), access, policy);
        made.map_err(|source| FetchError::Access { url: shown, source })
    }

    fn made(
        shown: String,
        url: &Url,
        access: &Access,
        policy: &Policy,
    ) -> Result<Self, AccessError> {
        let trust = &policy.trust;
        access.check()?;
        let start = match url.scheme() {
            "s3" => Start::Object(Object::new(url, access, trust)?),
            _ => Start::Url(without_userinfo(url.clone())),
        };
        Ok(Self {
            shown,
            start,
            authorization: access.read_authorization(url, trust)?,
            headers: access.read_headers(trust)?,
            tls: Tls::new(access, trust)?,
            proxies: Proxies::new(access, policy)?,
            addresses: Arc::new(policy.addresses.clone()),
            connect_timeout: policy.connect_timeout,
            max_redirects: policy.max_redirects,
            clients: Mutex::default(),
            configs: Mutex::default(),
            direct: Direct::new(
                Guarded(Arc::new(policy.addresses.clone())),
                policy.connect_timeout,
            ),
            landed: Mutex::default(),
        })
    }

    /// Sends a GET with these headers, for what is `beneath` the source if that is given, and gives
    /// the first answer that is no redirect.
    pub(super) async fn send(
        &self,
        beneath: Option<&str>,
        headers: &HeaderMap,
    ) -> Result<Reply, FetchError> {
        // Where a walk has landed is one object's place.
        if let Some(hop) = self.landed().filter(|_| beneath.is_none()) {
            match self.walk(hop, headers).await {
                Ok((response, _)) if !is_stale(response.status) => {
                    if response.status.is_server_error() {
                        self.forget();
                    }
                    return Ok(response);
                }
                Ok(_) | Err(FetchError::Connect { .. } | FetchError::Redirect { .. }) => {}
                Err(error) => return Err(error),
            }
            // A signed URL that has expired, or a mirror that is gone: ask the source again.
            self.forget();
        }
        let url = match &self.start {
            Start::Url(url) => source::beneath(url, beneath.unwrap_or_default()),
            Start::Object(object) => object.signed(beneath.unwrap_or_default()),
        };
        let (response, end) = self.walk(Hop { url, own: true }, headers).await?;
        if response.status.is_success() && beneath.is_none() {
            self.land(end);
        }
        Ok(response)
    }

    fn landed(&self) -> Option<Hop> {
        self.landed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The next request begins at the source again: the server that was found does not answer.
    pub(super) fn forget(&self) {
        self.land(None);
    }

    fn land(&self, hop: Option<Hop>) {
        *self.landed.lock().unwrap_or_else(PoisonError::into_inner) = hop;
    }

    /// Follows redirects from `hop`; also gives where it ended, if there were any.
    async fn walk(
        &self,
        mut hop: Hop,
        headers: &HeaderMap,
    ) -> Result<(Reply, Option<Hop>), FetchError> {
        for followed in 0..=self.max_redirects {
            let response = self.ask(&hop, headers).await?;
            if !is_redirect(response.status) {
                return Ok((response, (followed > 0).then_some(hop)));
            }
            let location = response.headers.get(LOCATION).and_then(|value| value.to_str().ok());
            hop = hop.next(location).map_err(|reason| self.bad_redirect(reason))?;
        }
        Err(self.bad_redirect(format!("more than {} redirects", self.max_redirects)))
    }

    fn bad_redirect(&self, reason: String) -> FetchError {
        FetchError::Redirect { url: self.shown.clone(), reason }
    }

    async fn ask(&self, hop: &Hop, headers: &HeaderMap) -> Result<Reply, FetchError> {
        let refused = |source| FetchError::Address { url: self.shown.clone(), source };
        self.addresses.judge_url(&hop.url).map_err(refused)?;
        let mut all = HeaderMap::new();
        if hop.own {
            all.extend(self.headers.clone());
            all.extend(self.authorization.iter().flat_map(Authorization::header));
        }
        all.extend(headers.clone());
        for (name, value) in [(USER_AGENT, AGENT), (ACCEPT, "*/*")] {
            all.entry(name).or_insert(HeaderValue::from_static(value));
        }
        let Some(proxy) = self.proxies.of(&hop.url) else {
            let uri = hop.url.as_str().parse();
            let uri = uri.map_err(|error: InvalidUri| self.failed(error.into()))?;
            let tls = self.config(hop)?;
            let answer = self.direct.get(&uri, all, tls, hop.own).await;
            return answer.map(Reply::from).map_err(|error| self.failed(error));
        };
        if let Ok(url) = Url::parse(&proxy.uri().to_string()) {
            self.proxies.addresses.judge_url(&url).map_err(refused)?;
        }
        let request = self.client(&proxy, hop.own)?.get(hop.url.clone()).headers(all);
        // The error's own text would show the whole URL.
        let answer = request.send().await;
        answer.map(Reply::from).map_err(|error| self.failed(error.without_url().into()))
    }

    /// TLS for a hop that is asked directly; `None` for http.
    fn config(&self, hop: &Hop) -> Result<Option<Arc<ClientConfig>>, FetchError> {
        if hop.url.scheme() != "https" {
            return Ok(None);
        }
        let mut configs = self.configs.lock().unwrap_or_else(PoisonError::into_inner);
        let config = &mut configs[usize::from(hop.own)];
        if config.is_none() {
            let made = self.tls.config(hop.own);
            *config = Some(Arc::new(made.map_err(|error| unusable_client(error.into()))?));
        }
        Ok(config.clone())
    }

    fn failed(&self, source: HttpError) -> FetchError {
        let url = self.shown.clone();
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&*source);
        while let Some(inner) = cause {
            if let Some(refused) = inner.downcast_ref::<AddressRefused>() {
                return FetchError::Address { url, source: refused.clone() };
            }
            // An error of the system may hold another one, which is not its source.
            let held = inner.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
            let held = held.and_then(|held| held.downcast_ref::<rustls::Error>());
            if let Some(rustls::Error::InvalidCertificate(_)) = held.or(inner.downcast_ref()) {
                return FetchError::Certificate { url, source };
            }
            cause = inner.source();
        }
        FetchError::Connect { url, source }
    }

    /// The client for a proxy: with the client's certificate (`own`), and without.
    fn client(&self, proxy: &Intercept, own: bool) -> Result<reqwest::Client, FetchError> {
        if own && self.tls.has_identity() && proxy.uri().scheme_str() == Some("https") {
            // What shakes hands with the source there would shake hands with the proxy too.
            let source = unusable("client certificate", CERT_AND_PROXY);
            return Err(FetchError::Access { url: self.shown.clone(), source });
        }
        let via = (proxy.uri().clone(), own);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&via) {
            return Ok(client.clone());
        }
        let client = self.build(proxy, own).map_err(unusable_client)?;
        clients.insert(via, client.clone());
        Ok(client)
    }

    fn build(&self, proxy: &Intercept, own: bool) -> Result<reqwest::Client, HttpError> {
        let mut through =
            Proxy::all(proxy.uri().to_string()).map_err(reqwest::Error::without_url)?;
        if let Some(credentials) = proxy.basic_auth() {
            through = through.custom_http_auth(credentials.clone());
        }
        let builder = reqwest::Client::builder()
            .http1_only()
            .no_proxy()
            .connect_timeout(self.connect_timeout)
            .redirect(redirect::Policy::none())
            .referer(false)
            .dns_resolver(Arc::new(Guarded(Arc::clone(&self.proxies.addresses))))
            .proxy(through)
            .tls_backend_preconfigured(self.tls.config(own)?);
        Ok(builder.build().map_err(reqwest::Error::without_url)?)
    }
}

impl Hop {
    /// Where a redirect leads.
    fn next(&self, location: Option<&str>) -> Result<Self, String> {
        let location = location.ok_or("a redirect without a readable Location")?;
        let url = self.url.join(location).map_err(|_| "a redirect to something that is no URL")?;
        match (self.url.scheme(), url.scheme()) {
            (_, "https") | ("http", "http") => {}
            (_, "http") => return Err("a redirect from https to http is not followed".into()),
            (_, other) => return Err(format!("a redirect to a {other:?} URL is not followed")),
        }
        let own = self.own && url.origin() == self.url.origin();
        Ok(Self { url: without_userinfo(url), own })
    }
}

impl Proxies {
    fn new(access: &Access, policy: &Policy) -> Result<Self, AccessError> {
        // The matcher takes a `*` for names alone.
        let all = |entry: &String| if entry == "*" { ALL_HOSTS.to_owned() } else { entry.clone() };
        let exceptions = access.no_proxy.iter().map(all).collect::<Vec<_>>().join(",");
        let mut addresses = policy.addresses.clone();
        let matcher = match &access.proxy {
            _ if access.direct => Matcher::builder().build(),
            Some(proxy) => {
                let proxy = proxy_url(&policy.trust.read("proxy", proxy)?)?;
                Matcher::builder().all(proxy.to_string()).no(exceptions.clone()).build()
            }
            None => {
                // The environment is the word of whoever runs this process.
                (addresses.loopback, addresses.link_local) = (true, true);
                Matcher::from_env()
            }
        };
        let bypass = (!exceptions.is_empty())
            .then(|| Matcher::builder().all("http://127.0.0.1").no(exceptions).build());
        Ok(Self { matcher, bypass, addresses: Arc::new(addresses) })
    }

    fn of(&self, url: &Url) -> Option<Intercept> {
        let target: Uri = url.as_str().parse().ok()?;
        if self.bypass.as_ref().is_some_and(|bypass| bypass.intercept(&target).is_none()) {
            return None;
        }
        self.matcher.intercept(&target)
    }
}

fn without_userinfo(mut url: Url) -> Url {
    // Neither can fail for a URL with a host.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_fragment(None);
    url
}

fn unusable_client(source: HttpError) -> FetchError {
    FetchError::Client { source }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// True for an answer that another server than the remembered one may not give.
fn is_stale(status: StatusCode) -> bool {
    matches!(status.as_u16(), 401 | 403 | 404 | 410)
}

/// rustls wants one crypto provider named for the process.
fn install_crypto() {
    // A second call finds the first one's provider in place, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(url: &str) -> Hop {
        Hop { url: Url::parse(url).unwrap(), own: true }
    }

    #[test]
    fn credentials_stay_at_the_origin_and_do_not_come_back() {
        let start = hop("https://h/a");
        for same in ["/b", "b?x", "https://h/c", "https://h:443/c", "//h/d"] {
            assert!(start.next(Some(same)).unwrap().own, "{same}");
        }
        for other in ["https://h:8443/", "https://i/", "https://u:p@i/", "https://h.evil/"] {
            let away = start.next(Some(other)).unwrap();
            assert!(!away.own && away.url.username().is_empty(), "{other}");
            assert!(!away.next(Some("https://h/a")).unwrap().own, "{other} and back");
        }
        assert!(!hop("http://h/").next(Some("https://h/")).unwrap().own);
    }

    #[test]
    fn a_redirect_keeps_to_its_schemes() {
        let start = hop("https://h/a");
        for bad in [Some("http://h/"), Some("ftp://h/"), Some("file:///etc/passwd"), None] {
            assert!(start.next(bad).is_err(), "{bad:?}");
        }
        assert!(hop("http://h/").next(Some("http://i/")).is_ok());
    }

    #[test]
    fn exceptions_of_an_image_are_reached_without_its_proxy() {
        let json = r#"{"proxy":"http://u:p@proxy:3128","no_proxy":["inner.example","10.0.0.0/8"]}"#;
        let access: Access = serde_json::from_str(json).unwrap();
        let proxies = Proxies::new(&access, &Policy::default()).unwrap();
        let of = |url: &str| proxies.of(&Url::parse(url).unwrap());
        let found = of("https://h/").unwrap();
        assert_eq!(found.uri().host(), Some("proxy"));
        assert!(found.basic_auth().is_some());
        assert!(of("http://a.inner.example/").is_none() && of("http://10.1.2.3/").is_none());
    }
}
