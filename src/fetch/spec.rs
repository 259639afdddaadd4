//! What a transfer is asked for: where the bytes are, and what is known of them.
//!
//! Why: a source is more than a URL, and every way to the transfer (a copy's worker, `pull`) has to
//! say the same things.
//! Never: holds anything of one run; the same source may be tried again.

use super::expect::Expect;
use super::http::Access;
use super::source::SourceUrl;
use crate::disk::DigestSet;

/// One source, and what is known of its bytes.
#[derive(Clone, Debug)]
pub struct Source {
    /// Where the bytes are.
    pub url: SourceUrl,
    /// Where the same bytes are too; used only if a digest proves them.
    pub mirrors: Vec<SourceUrl>,
    /// Digests that they must have.
    pub expect: Expect,
    /// Where a file of digests is that has the source's, as a vendor's SHA256SUMS.
    pub checksum_url: Option<SourceUrl>,
    /// Whether a compressed source (gz, xz, zst, bz2) is decoded on the way. Digests that are
    /// expected are those of the source's own bytes.
    pub unpack: bool,
    /// Whether to make a digest of the bytes although none is expected.
    pub digest: bool,
    /// What it takes to get them.
    pub access: Access,
}

impl Source {
    /// A source at `url` with nothing known of its bytes.
    #[must_use]
    pub fn new(url: SourceUrl) -> Self {
        Self {
            url,
            mirrors: Vec::new(),
            expect: Expect::default(),
            checksum_url: None,
            unpack: false,
            digest: true,
            access: Access::default(),
        }
    }

    /// The digests to be made on the way.
    #[must_use]
    pub fn wanted(&self) -> DigestSet {
        if self.digest || self.expect.is_some() {
            self.expect.wanted()
        } else {
            DigestSet::default()
        }
    }

    /// With digests that the bytes must have.
    #[must_use]
    pub fn expecting(mut self, expect: Expect) -> Self {
        self.expect = expect;
        self
    }

    /// With a file of digests, which has to have the source's.
    #[must_use]
    pub fn listed_in(mut self, sums: Option<SourceUrl>) -> Self {
        self.checksum_url = sums;
        self
    }

    /// With what it takes to reach it.
    #[must_use]
    pub fn reached_with(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// What it takes to reach something that belongs to the source, as a file of its digests: all
    /// of it at the source's own origin; elsewhere authorities and proxy, and no credential.
    #[must_use]
    pub fn access_at(&self, other: &SourceUrl) -> Access {
        let (here, there) = (self.url.expose(), other.expose());
        let same = match here.scheme() {
            // Of a bucket's own kind of URL the origin is the bucket.
            "s3" => there.scheme() == "s3" && here.host() == there.host(),
            _ => here.origin() == there.origin(),
        };
        if same {
            return self.access.clone();
        }
        let Access { ca, proxy, no_proxy, direct, .. } = self.access.clone();
        Access { ca, proxy, no_proxy, direct, ..Access::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_for_the_source_s_own_origin() {
        let url = |text: &str| SourceUrl::parse(text).unwrap();
        let json = r#"{"bearer":"t","headers":{"X":"t"},"ca":"c","s3":{"region":"r"}}"#;
        let access: Access = serde_json::from_str(json).unwrap();
        let kinds = |of: &str, at: &str| {
            Source::new(url(of)).reached_with(access.clone()).access_at(&url(at)).kinds().len()
        };
        for (of, at) in [("https://h/a", "https://h:443/b"), ("s3://b/a", "s3://b/b")] {
            assert_eq!(kinds(of, at), 4, "{of} {at}");
        }
        for (of, at) in [
            ("https://h/a", "http://h/a"),
            ("https://h/a", "https://i/a"),
            ("s3://b/a", "s3://c/a"),
            ("s3://b/a", "https://b/a"),
            ("https://h/a", "s3://h/a"),
        ] {
            assert_eq!(kinds(of, at), 1, "{of} {at}");
        }
    }
}
