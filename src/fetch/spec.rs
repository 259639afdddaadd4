//! What a transfer is asked for: where the bytes are, and what is known of them.
//!
//! Why: a source is more than a URL, and every way to the transfer (a copy's worker, `pull`) has to
//! say the same things.
//! Never: holds anything of one run; the same source may be tried again.

use super::expect::Expect;
use super::source::SourceUrl;
use crate::disk::DigestSet;

/// One source, and what is known of its bytes.
#[derive(Clone, Debug)]
pub struct Source {
    /// Where the bytes are.
    pub url: SourceUrl,
    /// Digests that they must have.
    pub expect: Expect,
    /// Whether to make a digest of the bytes although none is expected.
    pub digest: bool,
}

impl Source {
    /// A source at `url` with nothing known of its bytes.
    #[must_use]
    pub fn new(url: SourceUrl) -> Self {
        Self { url, expect: Expect::default(), digest: true }
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
}
