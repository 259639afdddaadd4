//! The digests that a user gave.
//!
//! Why: a digest is the only proof that the bytes are the right ones.
//! How: parsed from hex once, compared in lower case.
//! Never: takes a digest of the wrong length.
//! Start at [`Expect::parse`].

use crate::disk::{DigestSet, Digests};

/// Digests that the bytes must have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expect {
    sha256: Option<String>,
    sha512: Option<String>,
}

/// Why a digest is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {found:?} is not usable: it has {need} hex digits")]
pub struct ExpectError {
    /// "SHA-256" or "SHA-512".
    pub kind: &'static str,
    /// The text as given, cut to 140 characters.
    pub found: String,
    /// How many hex digits it should have.
    pub need: usize,
}

fn parse_hex(
    kind: &'static str,
    text: Option<&str>,
    need: usize,
) -> Result<Option<String>, ExpectError> {
    let Some(text) = text.map(str::trim) else { return Ok(None) };
    if text.len() != need || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(ExpectError { kind, found: text.chars().take(140).collect(), need });
    }
    Ok(Some(text.to_ascii_lowercase()))
}

impl Expect {
    /// Takes hex digests as a user types them.
    ///
    /// # Errors
    /// [`ExpectError`]: not hex, or of the wrong length.
    pub fn parse(sha256: Option<&str>, sha512: Option<&str>) -> Result<Self, ExpectError> {
        Ok(Self {
            sha256: parse_hex("SHA-256", sha256, 64)?,
            sha512: parse_hex("SHA-512", sha512, 128)?,
        })
    }

    /// True if there is anything to hold the bytes against.
    #[must_use]
    pub fn is_some(&self) -> bool {
        self.sha256.is_some() || self.sha512.is_some()
    }

    /// The SHA-512 in lower-case hex, if given: Longhorn's checksum.
    #[must_use]
    pub fn sha512(&self) -> Option<&str> {
        self.sha512.as_deref()
    }

    /// Which digests have to be made: those given, or SHA-256, which costs least.
    #[must_use]
    pub fn wanted(&self) -> DigestSet {
        DigestSet {
            sha256: self.sha256.is_some() || self.sha512.is_none(),
            sha512: self.sha512.is_some(),
        }
    }

    /// The first digest that differs: its name, what was expected, what was found.
    #[must_use]
    pub fn mismatch(&self, found: &Digests) -> Option<(&'static str, String, String)> {
        let pairs =
            [("SHA-256", &self.sha256, &found.sha256), ("SHA-512", &self.sha512, &found.sha512)];
        pairs.into_iter().find_map(|(kind, expected, found)| {
            let expected = expected.as_ref()?;
            let found = found.clone().unwrap_or_else(|| "not made".into());
            (*expected != found).then(|| (kind, expected.clone(), found))
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
        let found = Digests { sha256: Some("ab".repeat(32)), ..Digests::default() };
        assert_eq!(expect.mismatch(&found), None);
    }
}
