//! The digests that a user gave.
//!
//! Why: a digest is the only proof that the bytes are the right ones.
//! How: any number of kinds, parsed from hex once, compared in lower case.
//! Never: takes a digest of the wrong length, or is content while one of them was not made.
//! Start at [`Expect::parse`].

use crate::disk::{BadDigest, DigestKind, DigestMap, DigestSet, Digests};

/// Digests that the bytes must have: all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expect(DigestMap);

impl From<DigestMap> for Expect {
    fn from(digests: DigestMap) -> Self {
        Self(digests)
    }
}

impl Expect {
    /// Takes hex digests of the two usual kinds as a user types them.
    ///
    /// # Errors
    /// [`BadDigest`]: not hex, or of the wrong length.
    pub fn parse(sha256: Option<&str>, sha512: Option<&str>) -> Result<Self, BadDigest> {
        let given = [(DigestKind::Sha256, sha256), (DigestKind::Sha512, sha512)];
        DigestMap::parse(given).map(Self)
    }

    /// True if there is anything to hold the bytes against.
    #[must_use]
    pub fn is_some(&self) -> bool {
        !self.0.is_empty()
    }

    /// The digests.
    #[must_use]
    pub fn digests(&self) -> &DigestMap {
        &self.0
    }

    /// Which digests have to be made: those given, and SHA-256 if none of them is a proof.
    #[must_use]
    pub fn wanted(&self) -> DigestSet {
        let given = self.0.kinds();
        let proof = given.kinds().any(DigestKind::proves);
        if proof { given } else { given.with(DigestKind::Sha256) }
    }

    /// The first that was made and differs, as [`Expect::mismatch`].
    pub(super) fn differs(&self, made: &Digests) -> Option<(&'static str, String, String)> {
        let (kind, expected, found) = self.0.differs(&made.whole)?;
        Some((kind.name(), expected.to_owned(), found.to_owned()))
    }

    /// Those that were not made.
    pub(super) fn without(&self, made: &Digests) -> Self {
        let mut left = DigestMap::default();
        for (kind, text) in self.0.iter().filter(|(kind, _)| made.whole.get(*kind).is_none()) {
            left.set(kind, text.to_owned());
        }
        Self(left)
    }

    /// These and those of `other`.
    pub(super) fn with(&self, other: &Self) -> Self {
        let mut all = self.0.clone();
        all.fill_from(&other.0);
        Self(all)
    }

    /// The first digest that differs: its name, what was expected, what was found.
    #[must_use]
    pub fn mismatch(&self, found: &Digests) -> Option<(&'static str, String, String)> {
        self.0.iter().find_map(|(kind, expected)| {
            let found = found.whole.get(kind).unwrap_or("not made");
            (expected != found).then(|| (kind.name(), expected.to_owned(), found.to_owned()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_has_the_right_number_of_hex_digits() {
        let good = "AB".repeat(32);
        assert!(Expect::parse(Some(&good), None).unwrap().is_some());
        assert!(Expect::parse(Some("abc"), None).is_err());
        assert!(Expect::parse(None, Some(&good)).is_err());
        assert!(Expect::parse(Some(&"zz".repeat(32)), None).is_err());
    }

    #[test]
    fn a_missing_digest_is_no_match() {
        let expect = Expect::parse(Some(&"ab".repeat(32)), None).unwrap();
        assert!(expect.mismatch(&Digests::default()).is_some());
        let found = Digests { whole: expect.digests().clone(), ..Digests::default() };
        assert_eq!(expect.mismatch(&found), None);
    }

    #[test]
    fn a_mismatch_names_its_kind() {
        let mut all = DigestMap::default();
        for kind in DigestKind::ALL {
            all.add(kind, &"a".repeat(kind.hex_digits())).unwrap();
        }
        for kind in DigestKind::ALL {
            let mut found = Digests { whole: all.clone(), ..Digests::default() };
            found.whole.set(kind, "b".repeat(kind.hex_digits()));
            let mismatch = Expect::from(all.clone()).mismatch(&found).unwrap();
            assert_eq!(mismatch.0, kind.name());
        }
    }

    #[test]
    fn sums_that_prove_nothing_get_company() {
        let wanted = |kinds: &[DigestKind]| {
            let hex = |kind: DigestKind| "0".repeat(kind.hex_digits());
            let texts: Vec<_> = kinds.iter().map(|kind| (*kind, hex(*kind))).collect();
            let given = texts.iter().map(|(kind, text)| (*kind, Some(text.as_str())));
            Expect::from(DigestMap::parse(given).unwrap()).wanted()
        };
        use DigestKind::{Blake3, Md5, Sha1, Sha256, Sha512};
        assert_eq!(wanted(&[]), DigestSet::of(&[Sha256]));
        assert_eq!(wanted(&[Md5]), DigestSet::of(&[Sha256, Md5]));
        assert_eq!(wanted(&[Sha1, Md5]), DigestSet::of(&[Sha256, Sha1, Md5]));
        assert_eq!(wanted(&[Sha512]), DigestSet::of(&[Sha512]));
        assert_eq!(wanted(&[Blake3, Sha1]), DigestSet::of(&[Sha1, Blake3]));
    }
}
