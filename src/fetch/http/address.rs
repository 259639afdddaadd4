//! Where a transfer may connect to: a policy for addresses.
//!
//! Why: a URL comes from whoever may ask; a node's metadata service, its loopback and its link are
//! behind no password, and a name or a redirect can lead there.
//! How: [`judge`] says what kind of address it is, with IPv4 inside IPv6 forms unwrapped. The policy
//! is held against what a name resolved to, in the resolver itself: a connection is made only to an
//! address that passed, so a second answer of the name server changes nothing. Hosts that are
//! literal addresses are judged before each hop.
//! Never: resolves a name twice, or lets an allowance open a metadata address by accident: only a
//! network that names it does.
//! Start at [`AddressPolicy::allows`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// What kind of address it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressClass {
    /// Anywhere on the Internet.
    Public,
    /// A private network: RFC 1918, RFC 6598, RFC 4193.
    Private,
    /// This host itself.
    Loopback,
    /// This link only.
    LinkLocal,
    /// A cloud's metadata service: it gives credentials to whoever asks.
    Metadata,
    /// Unspecified, multicast, broadcast or reserved: no server is there.
    Nowhere,
}

impl AddressClass {
    fn as_str(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Private => "private",
            Self::Loopback => "loopback",
            Self::LinkLocal => "link-local",
            Self::Metadata => "cloud metadata",
            Self::Nowhere => "unspecified, multicast or reserved",
        }
    }

    /// What to change so that it is allowed.
    fn hint(self) -> &'static str {
        match self {
            Self::Loopback => "set allow_loopback (serve --allow-loopback)",
            Self::Public | Self::Private | Self::LinkLocal | Self::Metadata | Self::Nowhere => {
                "name its network in allow_addresses"
            }
        }
    }
}

/// Addresses of metadata services: AWS and most others, ECS tasks, Alibaba, Azure, Oracle.
const METADATA_V4: &[Ipv4Addr] = &[
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(169, 254, 170, 2),
    Ipv4Addr::new(169, 254, 170, 23),
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(192, 0, 0, 192),
];
/// The same over IPv6: AWS, EKS, Google, Scaleway.
const METADATA_V6: &[Ipv6Addr] = &[
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23),
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42),
];
/// Names of metadata services: refused whatever they resolve to, also behind a proxy.
const METADATA_NAMES: &[&str] =
    &["metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"];

/// Says what kind of address it is. Pure and total.
///
/// IPv4 inside IPv6 (mapped, compatible, NAT64, 6to4) counts as the IPv4 address.
#[must_use]
pub fn judge(address: IpAddr) -> AddressClass {
    match unwrapped(address) {
        IpAddr::V4(v4) => judge_v4(v4),
        IpAddr::V6(v6) => judge_v6(v6),
    }
}

/// The IPv4 address that an IPv6 address leads to, or the address itself.
fn unwrapped(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    let parts = v6.segments();
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    match parts {
        // `::` and `::1` are IPv6's own.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => address,
        // Mapped, compatible, translated (RFC 4291, RFC 2765).
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] | [0, 0, 0, 0, 0xffff, 0, high, low] => {
            v4(high, low)
        }
        // NAT64, well known and local (RFC 6052, RFC 8215).
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x64, 0xff9b, 1, _, _, _, high, low] => {
            v4(high, low)
        }
        // 6to4 (RFC 3056).
        [0x2002, high, low, ..] => v4(high, low),
        _ => address,
    }
}

fn judge_v4(v4: Ipv4Addr) -> AddressClass {
    if METADATA_V4.contains(&v4) {
        return AddressClass::Metadata;
    }
    match v4.octets() {
        [127, ..] => AddressClass::Loopback,
        [169, 254, ..] => AddressClass::LinkLocal,
        [10, ..] | [192, 168, ..] | [172, 16..=31, ..] | [100, 64..=127, ..] => {
            AddressClass::Private
        }
        // "This network", protocol assignments, and everything from multicast on.
        [0, ..] | [192, 0, 0, _] | [224..=255, ..] => AddressClass::Nowhere,
        _ => AddressClass::Public,
    }
}

fn judge_v6(v6: Ipv6Addr) -> AddressClass {
    if METADATA_V6.contains(&v6) {
        return AddressClass::Metadata;
    }
    match v6.segments() {
        [0, 0, 0, 0, 0, 0, 0, 1] => AddressClass::Loopback,
        [0xfe80..=0xfebf, ..] => AddressClass::LinkLocal,
        // Unique local, and the site-local that it replaced.
        [0xfc00..=0xfdff, ..] | [0xfec0..=0xfeff, ..] => AddressClass::Private,
        // Unspecified, multicast, discard-only; Teredo, which leads to an IPv4 host of its choice.
        [0, 0, 0, 0, 0, 0, 0, 0] | [0xff00..=0xffff, ..] | [0x100, 0, 0, 0, ..] => {
            AddressClass::Nowhere
        }
        [0x2001, 0, ..] => AddressClass::Nowhere,
        _ => AddressClass::Public,
    }
}

/// Which addresses a transfer may connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressPolicy {
    /// This host's own servers.
    pub loopback: bool,
    /// Servers on the same link.
    pub link_local: bool,
    /// Networks that are allowed whatever they are.
    pub allow: Vec<IpNet>,
}

impl AddressPolicy {
    /// For a daemon, which others ask: public and private networks.
    #[must_use]
    pub fn daemon() -> Self {
        Self { loopback: false, link_local: false, allow: Vec::new() }
    }

    /// For a person's own process: all but metadata services.
    #[must_use]
    pub fn person() -> Self {
        Self { loopback: true, link_local: true, allow: Vec::new() }
    }

    /// Whether a connection to `address` is allowed.
    #[must_use]
    pub fn allows(&self, address: IpAddr) -> bool {
        let real = unwrapped(address);
        if self.allow.iter().any(|net| net.contains(&real) || net.contains(&address)) {
            return true;
        }
        match judge(address) {
            AddressClass::Public | AddressClass::Private => true,
            AddressClass::Loopback => self.loopback,
            AddressClass::LinkLocal => self.link_local,
            AddressClass::Metadata | AddressClass::Nowhere => false,
        }
    }

    /// Judges the host of `url` as far as its text tells: a literal address, or a name that is
    /// known to be a metadata service's.
    ///
    /// # Errors
    /// [`AddressRefused`] names host, address and setting.
    pub fn judge_url(&self, url: &Url) -> Result<(), AddressRefused> {
        match url.host() {
            Some(Host::Ipv4(v4)) => self.judge_literal(IpAddr::V4(v4)),
            Some(Host::Ipv6(v6)) => self.judge_literal(IpAddr::V6(v6)),
            Some(Host::Domain(name)) => self.judge_name(name),
            None => Ok(()),
        }
    }

    fn judge_literal(&self, address: IpAddr) -> Result<(), AddressRefused> {
        if self.allows(address) {
            return Ok(());
        }
        Err(AddressRefused { host: address.to_string(), address: None, class: judge(address) })
    }

    fn judge_name(&self, name: &str) -> Result<(), AddressRefused> {
        let plain = name.trim_end_matches('.');
        if METADATA_NAMES.iter().any(|known| known.eq_ignore_ascii_case(plain)) {
            let (host, class) = (name.to_owned(), AddressClass::Metadata);
            return Err(AddressRefused { host, address: None, class });
        }
        Ok(())
    }
}

/// A host that may not be connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressRefused {
    host: String,
    address: Option<IpAddr>,
    class: AddressClass,
}

impl std::error::Error for AddressRefused {}

impl std::fmt::Display for AddressRefused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ", self.host)?;
        if let Some(address) = self.address {
            write!(f, "is at {address}, which ")?;
        }
        let (class, hint) = (self.class.as_str(), self.class.hint());
        write!(f, "is a {class} address and is refused; to allow it, {hint}")
    }
}

/// Resolves names and gives only what the policy allows.
#[derive(Clone, Debug)]
pub(in crate::fetch) struct Guarded(pub(in crate::fetch) Arc<AddressPolicy>);

impl Guarded {
    /// The addresses of `host` that are allowed, with port 0: the client puts the URL's there.
    pub(in crate::fetch) async fn lookup(
        &self,
        host: &str,
    ) -> Result<Vec<SocketAddr>, Box<dyn std::error::Error + Send + Sync>> {
        self.0.judge_name(host)?;
        let found = tokio::net::lookup_host((host, 0)).await?;
        Ok(filter(&self.0, host, found.collect())?)
    }
}

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        let guarded = self.clone();
        Box::pin(async move {
            let passed = guarded.lookup(name.as_str()).await?;
            Ok(Box::new(passed.into_iter()) as Addrs)
        })
    }
}

/// Those of `found` that are allowed; an error if there were some and none is.
fn filter(
    policy: &AddressPolicy,
    host: &str,
    found: Vec<SocketAddr>,
) -> Result<Vec<SocketAddr>, AddressRefused> {
    let (passed, refused): (Vec<_>, Vec<_>) =
        found.into_iter().partition(|address| policy.allows(address.ip()));
    match refused.first() {
        Some(first) if passed.is_empty() => {
            let address = first.ip();
            Err(AddressRefused {
                host: host.to_owned(),
                address: Some(address),
                class: judge(address),
            })
        }
        Some(_) | None => Ok(passed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(text: &str) -> AddressClass {
        judge(text.parse().unwrap())
    }

    #[test]
    fn every_form_of_an_address_has_its_class() {
        use AddressClass::{LinkLocal, Loopback, Metadata, Nowhere, Private, Public};
        let cases = [
            ("1.1.1.1", Public),
            ("172.15.0.1", Public),
            ("172.32.0.1", Public),
            ("100.63.0.1", Public),
            ("2606:4700::1111", Public),
            ("10.1.2.3", Private),
            ("172.31.255.255", Private),
            ("192.168.0.1", Private),
            ("100.64.0.1", Private),
            ("fd12::1", Private),
            ("127.0.0.1", Loopback),
            ("127.255.0.9", Loopback),
            ("::1", Loopback),
            ("169.254.1.1", LinkLocal),
            ("fe80::1", LinkLocal),
            ("febf::1", LinkLocal),
            ("169.254.169.254", Metadata),
            ("169.254.170.2", Metadata),
            ("100.100.100.200", Metadata),
            ("168.63.129.16", Metadata),
            ("fd00:ec2::254", Metadata),
            ("0.0.0.0", Nowhere),
            ("0.1.2.3", Nowhere),
            ("224.0.0.1", Nowhere),
            ("255.255.255.255", Nowhere),
            ("::", Nowhere),
            ("ff02::1", Nowhere),
            // IPv4 in each of its IPv6 clothes.
            ("::ffff:127.0.0.1", Loopback),
            ("::127.0.0.1", Loopback),
            ("::ffff:169.254.169.254", Metadata),
            ("64:ff9b::169.254.169.254", Metadata),
            ("64:ff9b:1::a9fe:a9fe", Metadata),
            ("2002:7f00:1::", Loopback),
            ("2002:a9fe:a9fe::1", Metadata),
            ("::ffff:10.0.0.1", Private),
            ("::ffff:8.8.8.8", Public),
            ("::ffff:0:127.0.0.1", Loopback),
        ];
        for (text, expected) in cases {
            assert_eq!(class(text), expected, "{text}");
        }
    }

    fn judged(policy: &AddressPolicy, url: &str) -> bool {
        policy.judge_url(&Url::parse(url).unwrap()).is_ok()
    }

    #[test]
    fn a_daemon_goes_to_public_and_private_addresses_only() {
        let daemon = AddressPolicy::daemon();
        for good in ["http://1.1.1.1/", "http://10.0.0.1/", "http://[fd12::1]/", "http://h/"] {
            assert!(judged(&daemon, good), "{good}");
        }
        for bad in [
            "http://127.0.0.1/",
            "http://127.1/",
            "http://0x7f.1/",
            "http://2130706433/",
            "http://0177.0.0.1/",
            "http://[::1]/",
            "http://[::ffff:7f00:1]/",
            "http://169.254.0.9/",
            "http://169.254.169.254/latest/meta-data",
            "http://0.0.0.0/",
            "http://metadata.google.internal/",
            "http://METADATA.google.internal./",
        ] {
            assert!(!judged(&daemon, bad), "{bad}");
        }
    }

    #[test]
    fn a_person_is_kept_from_metadata_only() {
        let person = AddressPolicy::person();
        for good in ["http://127.0.0.1/", "http://169.254.0.9/", "http://[fe80::1]/"] {
            assert!(judged(&person, good), "{good}");
        }
        for bad in ["http://169.254.169.254/", "http://[fd00:ec2::254]/", "http://0.0.0.0/"] {
            assert!(!judged(&person, bad), "{bad}");
        }
    }

    #[test]
    fn a_network_that_is_named_is_allowed() {
        let allow = vec!["127.0.0.2/32".parse().unwrap(), "169.254.169.254/32".parse().unwrap()];
        let policy = AddressPolicy { allow, ..AddressPolicy::daemon() };
        assert!(judged(&policy, "http://127.0.0.2/") && !judged(&policy, "http://127.0.0.1/"));
        assert!(judged(&policy, "http://[::ffff:169.254.169.254]/"));
    }

    #[test]
    fn one_refused_address_among_several_is_left_out() {
        let at = |text: &str| SocketAddr::new(text.parse().unwrap(), 0);
        let daemon = AddressPolicy::daemon();
        let some = filter(&daemon, "h", vec![at("127.0.0.1"), at("10.0.0.1")]).unwrap();
        assert_eq!(some, vec![at("10.0.0.1")]);
        let none = filter(&daemon, "h.example", vec![at("127.0.0.1")]).unwrap_err().to_string();
        for word in ["h.example", "127.0.0.1", "loopback", "allow_loopback"] {
            assert!(none.contains(word), "{none}");
        }
        assert!(filter(&daemon, "h", Vec::new()).unwrap().is_empty());
    }
}
