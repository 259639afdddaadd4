//! The kinds of digest, sets of them, and digests as text.
//!
//! Why: vendors publish whatever sum they always did; one more kind must cost one line, not a field
//! in every type that carries digests.
//! How: a [`DigestMap`] is kind by kind lower-case hex. As JSON it is one property a kind, so it can
//! be flattened into records that once had a field for each.
//! Never: takes a user's digest of the wrong length; a record's own is kept as it is, and then
//! matches nothing.
//! Start at [`DigestKind`].

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A kind of digest of a whole file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DigestKind {
    /// SHA-256 (FIPS 180-4).
    Sha256,
    /// SHA-512 (FIPS 180-4), Longhorn's checksum.
    Sha512,
    /// SHA-1 (FIPS 180-4): finds accidents, stops nobody who means it.
    Sha1,
    /// MD5 (RFC 1321): finds accidents, stops nobody who means it.
    Md5,
    /// BLAKE3 with 256 bits.
    Blake3,
}

impl DigestKind {
    /// Every kind, in the order in which they are shown.
    pub const ALL: [Self; 5] = [Self::Sha256, Self::Sha512, Self::Sha1, Self::Md5, Self::Blake3];

    /// Its name for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "SHA-256",
            Self::Sha512 => "SHA-512",
            Self::Sha1 => "SHA-1",
            Self::Md5 => "MD5",
            Self::Blake3 => "BLAKE3",
        }
    }

    /// Its name in options, requests, answers and records.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
            Self::Sha1 => "sha1",
            Self::Md5 => "md5",
            Self::Blake3 => "blake3",
        }
    }

    /// The kind with this [`Self::key`], in whatever case.
    #[must_use]
    pub fn from_key(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.key().eq_ignore_ascii_case(text))
    }

    /// How many hex digits it has.
    #[must_use]
    pub fn hex_digits(self) -> usize {
        match self {
            Self::Sha256 | Self::Blake3 => 64,
            Self::Sha512 => 128,
            Self::Sha1 => 40,
            Self::Md5 => 32,
        }
    }

    /// True if nobody can make other bytes with the same digest.
    #[must_use]
    pub fn proves(self) -> bool {
        match self {
            Self::Sha256 | Self::Sha512 | Self::Blake3 => true,
            Self::Sha1 | Self::Md5 => false,
        }
    }
}

impl fmt::Display for DigestKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Which digests to make.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct DigestSet(u8);

impl DigestSet {
    /// These kinds.
    #[must_use]
    pub fn of(kinds: &[DigestKind]) -> Self {
        kinds.iter().fold(Self::default(), |set, kind| set.with(*kind))
    }

    /// True if none is to be made.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// With `kind` too.
    #[must_use]
    pub fn with(self, kind: DigestKind) -> Self {
        Self(self.0 | 1 << kind as u8)
    }

    /// With all of `other` too.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The kinds, in the order of [`DigestKind::ALL`].
    pub fn kinds(self) -> impl Iterator<Item = DigestKind> {
        DigestKind::ALL.into_iter().filter(move |kind| self.0 & 1 << *kind as u8 != 0)
    }
}

impl fmt::Debug for DigestSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.kinds()).finish()
    }
}

/// Why a digest that somebody gave is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadDigest {
    /// Not hex, or of the wrong length.
    #[error("{} {found:?} is not usable: it has {} hex digits", kind.key(), kind.hex_digits())]
    Hex {
        /// What it should be.
        kind: DigestKind,
        /// The text as given, cut to 140 characters.
        found: String,
    },
    /// Of no kind that is known.
    #[error(
        "digest {found:?} is not usable: write sha256:HEX, sha512:HEX, sha1:HEX, md5:HEX or blake3:HEX"
    )]
    Kind {
        /// The text as given, cut to 140 characters.
        found: String,
    },
    /// Two of one kind that differ.
    #[error("two different digests {} are given; give one", kind.key())]
    Two {
        /// Their kind.
        kind: DigestKind,
    },
}

fn cut(text: &str) -> String {
    text.chars().take(140).collect()
}

/// Digests of one file: for each kind at most one, in lower-case hex.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct DigestMap(BTreeMap<DigestKind, String>);

impl DigestMap {
    /// Takes hex digests as a user gives them.
    ///
    /// # Errors
    /// [`BadDigest`]: one is not hex, of the wrong length, or contradicts another.
    pub fn parse<'a>(
        given: impl IntoIterator<Item = (DigestKind, Option<&'a str>)>,
    ) -> Result<Self, BadDigest> {
        let mut map = Self::default();
        for (kind, text) in given {
            text.map_or(Ok(()), |text| map.add(kind, text))?;
        }
        Ok(map)
    }

    /// Adds a digest that a user gave.
    ///
    /// # Errors
    /// [`BadDigest`]: it is not hex, of the wrong length, or contradicts one that is there.
    pub fn add(&mut self, kind: DigestKind, text: &str) -> Result<(), BadDigest> {
        let text = text.trim();
        if text.len() != kind.hex_digits() || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(BadDigest::Hex { kind, found: cut(text) });
        }
        let text = text.to_ascii_lowercase();
        match self.0.get(&kind) {
            Some(known) if *known != text => Err(BadDigest::Two { kind }),
            Some(_) | None => {
                self.set(kind, text);
                Ok(())
            }
        }
    }

    /// Adds all that `other` has.
    ///
    /// # Errors
    /// [`BadDigest::Two`]: both have one of a kind, and they differ.
    pub fn add_all(&mut self, other: &Self) -> Result<(), BadDigest> {
        let differs = other.iter().find(|(kind, text)| self.get(*kind).is_some_and(|t| t != *text));
        if let Some((kind, _)) = differs {
            return Err(BadDigest::Two { kind });
        }
        self.fill_from(other);
        Ok(())
    }

    /// Takes from `other` the kinds that are not here yet.
    pub fn fill_from(&mut self, other: &Self) {
        for (kind, text) in other.iter() {
            self.0.entry(kind).or_insert_with(|| text.to_owned());
        }
    }

    /// Notes a digest, whatever its text.
    pub(crate) fn set(&mut self, kind: DigestKind, text: String) {
        self.0.insert(kind, text);
    }

    /// The digest of this kind.
    #[must_use]
    pub fn get(&self, kind: DigestKind) -> Option<&str> {
        self.0.get(&kind).map(String::as_str)
    }

    /// The digests, in the order of [`DigestKind::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (DigestKind, &str)> {
        self.0.iter().map(|(kind, text)| (*kind, text.as_str()))
    }

    /// True if there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Which kinds there are.
    #[must_use]
    pub fn kinds(&self) -> DigestSet {
        self.0.keys().fold(DigestSet::default(), |set, kind| set.with(*kind))
    }

    /// The first digest in which both have an opinion and they differ: its kind, ours, theirs.
    #[must_use]
    pub fn differs<'a>(&'a self, other: &'a Self) -> Option<(DigestKind, &'a str, &'a str)> {
        self.iter().find_map(|(kind, ours)| {
            let theirs = other.get(kind)?;
            (ours != theirs).then_some((kind, ours, theirs))
        })
    }
}

/// `sha256:HEX`, as on a command line. The kind's case does not matter.
impl FromStr for DigestMap {
    type Err = BadDigest;

    fn from_str(text: &str) -> Result<Self, BadDigest> {
        let unknown = || BadDigest::Kind { found: cut(text) };
        let (kind, hex) = text.trim().split_once(':').ok_or_else(unknown)?;
        let kind = DigestKind::from_key(kind).ok_or_else(unknown)?;
        Self::parse([(kind, Some(hex))])
    }
}

/// `sha256:HEX sha1:HEX`.
impl fmt::Display for DigestMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (kind, text)) in self.iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{}:{text}", kind.key())?;
        }
        Ok(())
    }
}

impl fmt::Debug for DigestMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}

impl Serialize for DigestMap {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.collect_map(self.iter().map(|(kind, text)| (kind.key(), text)))
    }
}

/// Reads the properties that are kinds and not null, and passes over all others.
impl<'de> Deserialize<'de> for DigestMap {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Properties;
        impl<'de> Visitor<'de> for Properties {
            type Value = DigestMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of digests")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DigestMap, A::Error> {
                let mut digests = DigestMap::default();
                while let Some(key) = map.next_key::<String>()? {
                    match DigestKind::ALL.into_iter().find(|kind| kind.key() == key) {
                        None => drop(map.next_value::<IgnoredAny>()?),
                        Some(kind) => {
                            let text = map.next_value::<Option<String>>()?;
                            text.into_iter().for_each(|text| digests.set(kind, text));
                        }
                    }
                }
                Ok(digests)
            }
        }
        from.deserialize_map(Properties)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefixed_digest_is_of_its_kind() {
        for kind in DigestKind::ALL {
            let hex = "aB".repeat(kind.hex_digits() / 2);
            let map: DigestMap = format!("{}:{hex}", kind.key().to_uppercase()).parse().unwrap();
            assert_eq!(map.get(kind), Some(hex.to_lowercase().as_str()));
            assert_eq!(map.to_string().parse(), Ok(map));
            for bad in [&hex[1..], &format!("{hex}0"), &hex.replace('a', "g"), "", "é"] {
                let refused = format!("{}:{bad}", kind.key()).parse::<DigestMap>();
                assert!(matches!(refused, Err(BadDigest::Hex { .. })), "{bad}");
            }
        }
        for bad in ["", ":", "sha256", "sha224:00", "SHA-256:00", " :00"] {
            assert!(matches!(bad.parse::<DigestMap>(), Err(BadDigest::Kind { .. })), "{bad}");
        }
    }

    #[test]
    fn one_kind_has_one_digest() {
        let (a, b) = ("a".repeat(32), "b".repeat(32));
        let mut map = DigestMap::parse([(DigestKind::Md5, Some(a.as_str()))]).unwrap();
        map.add(DigestKind::Md5, &a.to_uppercase()).unwrap();
        let two = BadDigest::Two { kind: DigestKind::Md5 };
        assert_eq!(map.add(DigestKind::Md5, &b), Err(two.clone()));
        let other = DigestMap::parse([(DigestKind::Md5, Some(b.as_str()))]).unwrap();
        assert_eq!(map.add_all(&other), Err(two));
        assert_eq!(map.differs(&other), Some((DigestKind::Md5, a.as_str(), b.as_str())));
        map.fill_from(&other);
        assert_eq!(map.get(DigestKind::Md5), Some(a.as_str()));
    }

    #[test]
    fn a_record_with_a_field_for_each_kind_is_read() {
        #[derive(Serialize, Deserialize)]
        struct Record {
            size: u64,
            #[serde(flatten)]
            digests: DigestMap,
        }
        let json = r#"{"size":1,"sha256":"ab","sha512":null,"later":{"x":[1]},"other":2}"#;
        let record: Record = serde_json::from_str(json).unwrap();
        assert_eq!(record.digests.to_string(), "sha256:ab");
        assert_eq!(serde_json::to_string(&record).unwrap(), r#"{"size":1,"sha256":"ab"}"#);
        assert!(serde_json::from_str::<Record>(r#"{"size":1,"sha256":7}"#).is_err());
    }

    #[test]
    fn a_set_knows_its_kinds() {
        let set = DigestSet::of(&[DigestKind::Blake3]).and(DigestSet::of(&[DigestKind::Sha1]));
        assert_eq!(set.kinds().collect::<Vec<_>>(), [DigestKind::Sha1, DigestKind::Blake3]);
        assert_eq!(DigestSet::default().kinds().count(), 0);
    }
}
