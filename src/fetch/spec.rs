//! What a transfer is asked for: where the bytes are, and what is known of them.
//!
//! Why: a source is more than a URL, and every way to the transfer (a copy's worker, `pull`) has to
//! say the same things.
//! Never: holds anything of one run; the same source may be tried again.

use super::access::Access;
use super::expect::Expect;
use super::source::SourceUrl;

/// One source, and what is known of its bytes.
#[derive(Clone, Debug)]
pub struct Source {
    /// Where the bytes are.
    pub url: SourceUrl,
    /// Digests that they must have.
    pub expect: Expect,
    /// What it takes to get them.
    pub access: Access,
}

impl Source {
    /// A source at `url` with nothing known of its bytes.
    #[must_use]
    pub fn new(url: SourceUrl) -> Self {
        Self { url, expect: Expect::default(), access: Access::default() }
    }

    /// With digests that the bytes must have.
    #[must_use]
    pub fn expecting(mut self, expect: Expect) -> Self {
        self.expect = expect;
        self
    }

    /// With what it takes to reach it.
    #[must_use]
    pub fn reached_with(mut self, access: Access) -> Self {
        self.access = access;
        self
    }
}
