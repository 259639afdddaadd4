//! A vendor's file of digests, as SHA256SUMS: found, read, and asked for one name.
//!
//! Why: vendors publish sums beside their images; copying 64 digits by hand is where mistakes come
//! from.
//! How: the parser knows the lines of GNU coreutils (`HEX  name`, `HEX *name`, escaped with a
//! leading backslash), those of BSD (`SHA256 (name) = HEX`), and a file of one bare digest; other
//! lines (comments, the armour of a PGP signature) are passed over. A line counts if its name is
//! the last part of the image's URL. A signature is not checked: the file is as good as its server.
//! Never: reads more than [`MAX_BYTES`], chooses between two digests, or repeats what it read.
//! Start at [`settle`]; [`parse_sums`] is the parser.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use super::error::FetchError;
use super::expect::Expect;
use super::http::Client;
use super::local::LocalFile;
use super::pace::{Best, Level};
use super::parts::whole;
use super::places::Places;
use super::progress::Progress;
use super::remote::retried;
use super::source::SourceUrl;
use super::spec::Source;
use super::threads::blocking;
use super::transfer::Engine;
use crate::disk::{DigestKind, DigestMap};

/// Longest file of digests that is read.
const MAX_BYTES: u64 = 1 << 20;
/// Most lines that are looked at.
const MAX_LINES: usize = 100_000;

/// Why a file of digests does not say what the image's is. Only places in it are named, for it may
/// be any file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each field is named in the message above it")]
pub enum SumsFault {
    #[error("it has more than {limit_bytes} bytes; is it a file of digests?")]
    TooLong { limit_bytes: u64 },
    #[error("it has more than {limit} lines; is it a file of digests?")]
    TooManyLines { limit: usize },
    #[error("it has no digest of {name:?}; check both URLs, or give the digest itself")]
    NoSuchName { name: String },
    #[error("line {line} is about {name:?}, but its digest is of no known kind or length")]
    Unusable { name: String, line: usize },
    #[error(
        "line {line} gives {name:?} another {kind} than an earlier line; give the digest itself"
    )]
    Ambiguous { name: String, kind: DigestKind, line: usize },
    #[error("its {kind} of {name:?} is not the one that was given")]
    Contradicts { name: String, kind: DigestKind },
    #[error("the image's URL ends in no file name to look for; give the digest itself")]
    NoName,
}

/// The source with the digests that its file of digests gives it; as it is, if it has no such file.
///
/// # Errors
/// [`FetchError`] of the file: it cannot be had (after as many attempts as the policy allows), or
/// [`FetchError::Sums`].
pub async fn settle<'a>(
    engine: &Engine,
    source: &'a Source,
    progress: &Arc<Progress>,
) -> Result<Cow<'a, Source>, FetchError> {
    let Some(url) = &source.checksum_url else { return Ok(Cow::Borrowed(source)) };
    let at_fault = |fault| FetchError::Sums { url: url.to_string(), source: fault };
    let name = file_name(&source.url).ok_or_else(|| at_fault(SumsFault::NoName))?;
    let text = match url.file_path() {
        Some(path) => {
            let places = engine.policy.places.clone();
            let read = blocking(move || read_local(&path, &places)).await?;
            read.ok_or_else(|| at_fault(too_long()))?
        }
        None => {
            let client = Client::new(url, &source.access_at(url), &engine.policy)?;
            let (policy, best, level) = (&engine.policy, Best::default(), Level::default());
            let attempt = || whole(&client, MAX_BYTES, policy, progress, (&best, &level));
            let fetched = retried(policy, progress, attempt).await?;
            fetched.ok_or_else(|| at_fault(too_long()))?
        }
    };
    let found = parse_sums(&text, &name, kind_of_64_digits(url)).map_err(at_fault)?;
    let mut expected = source.expect.digests().clone();
    if let Some((kind, _, _)) = expected.differs(&found) {
        let name = shown(&name);
        return Err(at_fault(SumsFault::Contradicts { name, kind }));
    }
    expected.fill_from(&found);
    let expect = Expect::from(expected);
    Ok(Cow::Owned(Source { expect, checksum_url: None, ..source.clone() }))
}

fn too_long() -> SumsFault {
    SumsFault::TooLong { limit_bytes: MAX_BYTES }
}

/// The whole file; `None` if it is too long.
fn read_local(path: &Path, places: &Places) -> Result<Option<Vec<u8>>, FetchError> {
    let file = LocalFile::open(path, places)?;
    if file.len_bytes > MAX_BYTES {
        return Ok(None);
    }
    let mut text = vec![0; usize::try_from(file.len_bytes).unwrap_or(0)];
    file.read_into(&mut text, 0)?;
    file.unchanged()?;
    Ok(Some(text))
}

/// The last part of a URL's path, percent-decoded; `None` if it is empty.
fn file_name(url: &SourceUrl) -> Option<Vec<u8>> {
    let last = url.expose().path().rsplit('/').next()?;
    let name: Vec<u8> = percent_encoding::percent_decode_str(last).collect();
    (!name.is_empty()).then_some(name)
}

/// 64 digits without a label are SHA-256's, but in a file that calls itself BLAKE3's.
fn kind_of_64_digits(url: &SourceUrl) -> DigestKind {
    let name = url.expose().path().rsplit('/').next().unwrap_or("").to_ascii_lowercase();
    let blake3 = ["b3sum", "blake3"].iter().any(|word| name.contains(word));
    if blake3 || name.ends_with(".b3") { DigestKind::Blake3 } else { DigestKind::Sha256 }
}

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().take(120).collect()
}

/// What a line says: of which name (`None` in a bare digest), which kind, which digits.
struct Entry<'a> {
    name: Option<Cow<'a, [u8]>>,
    /// `None` for a kind or a length that is not known.
    kind: Option<DigestKind>,
    hex: &'a [u8],
}

/// The digests of the file called `name` in `text`, which is foreign. An unlabelled digest of 64
/// digits is one of `of_64_digits`.
///
/// Pure; no panic for any text.
///
/// # Errors
/// [`SumsFault`].
pub fn parse_sums(
    text: &[u8],
    name: &[u8],
    of_64_digits: DigestKind,
) -> Result<DigestMap, SumsFault> {
    if text.len() as u64 > MAX_BYTES {
        return Err(too_long());
    }
    let mut found = DigestMap::default();
    let mut unusable = None;
    let (mut entries, mut bare, mut in_signature) = (0, None, false);
    let text = text.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(text);
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        if index >= MAX_LINES {
            return Err(SumsFault::TooManyLines { limit: MAX_LINES });
        }
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        // The base64 of a signature is no text of ours.
        in_signature = match line {
            b"-----BEGIN PGP SIGNATURE-----" => true,
            b"-----END PGP SIGNATURE-----" => false,
            _ => in_signature,
        };
        let entry = if in_signature { None } else { parse_line(line, of_64_digits) };
        let Some(entry) = entry else { continue };
        entries += 1;
        match &entry.name {
            Some(of) if **of == *name => {
                if !add(&mut found, &entry, name, index + 1)? {
                    unusable = unusable.or(Some(index + 1));
                }
            }
            Some(_) => (),
            None => bare = Some((entry, index + 1)),
        }
    }
    // Beside other entries, digits alone are about nobody knows what.
    if let (1, Some((entry, line))) = (entries, bare)
        && !add(&mut found, &entry, name, line)?
    {
        unusable = Some(line);
    }
    match unusable {
        _ if !found.is_empty() => Ok(found),
        Some(line) => Err(SumsFault::Unusable { name: shown(name), line }),
        None => Err(SumsFault::NoSuchName { name: shown(name) }),
    }
}

/// Takes over what `entry` says; false if it is of no use.
fn add(
    found: &mut DigestMap,
    entry: &Entry<'_>,
    name: &[u8],
    line: usize,
) -> Result<bool, SumsFault> {
    let Some(kind) = entry.kind else { return Ok(false) };
    let hex = std::str::from_utf8(entry.hex).unwrap_or("").to_ascii_lowercase();
    match found.get(kind) {
        Some(known) if known != hex => Err(SumsFault::Ambiguous { name: shown(name), kind, line }),
        Some(_) | None => Ok(found.add(kind, &hex).is_ok()),
    }
}

/// One line; `None` if it is no entry at all.
fn parse_line(line: &[u8], of_64_digits: DigestKind) -> Option<Entry<'_>> {
    let (escaped, line) = match line.strip_prefix(b"\\") {
        Some(rest) => (true, rest),
        None => (false, line),
    };
    let plain = |name| if escaped { unescape(name) } else { Some(Cow::Borrowed(name)) };
    if let Some((label, name, hex)) = bsd_parts(line) {
        let kind = labelled(label).filter(|kind| kind.hex_digits() == hex.len());
        return Some(Entry { name: Some(without_dot(plain(name)?)), kind, hex });
    }
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (hex, rest) = line.split_at(digits);
    let kind = match digits {
        32 => Some(DigestKind::Md5),
        40 => Some(DigestKind::Sha1),
        64 => Some(of_64_digits),
        128 => Some(DigestKind::Sha512),
        // Words as "deed" begin with hex digits too: only what may be a digest is an entry.
        _ if digits < 32 => return None,
        _ => None,
    };
    let name = match rest {
        _ if rest.trim_ascii().is_empty() => return Some(Entry { name: None, kind, hex }),
        [b' ' | b'\t', b' ' | b'*' | b'\t', name @ ..] => name,
        [b' ' | b'\t', name @ ..] => name,
        [_, ..] | [] => return None,
    };
    Some(Entry { name: Some(without_dot(plain(name)?)), kind, hex })
}

/// `LABEL (name) = HEX`, and OpenSSL's `LABEL(name)= HEX`, as label, name and digits.
fn bsd_parts(line: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let open = line.iter().position(|byte| *byte == b'(')?;
    // A name may hold all of these characters, digits do not.
    let equals = line.iter().rposition(|byte| *byte == b'=')?;
    let (label, hex) = (line[..open].trim_ascii(), line[equals + 1..].trim_ascii());
    let name = line.get(open + 1..equals)?.trim_ascii_end().strip_suffix(b")")?;
    let is_label = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'/' | b'_');
    let shaped = !label.is_empty() && label.iter().all(is_label);
    let hexed = !hex.is_empty() && hex.iter().all(u8::is_ascii_hexdigit);
    (shaped && hexed).then_some((label, name, hex))
}

fn labelled(label: &[u8]) -> Option<DigestKind> {
    let label = std::str::from_utf8(label).ok()?.to_ascii_uppercase();
    match label.as_str() {
        "SHA2-256" => Some(DigestKind::Sha256),
        "SHA2-512" => Some(DigestKind::Sha512),
        other => DigestKind::ALL
            .into_iter()
            .find(|kind| kind.key().eq_ignore_ascii_case(other) || kind.name() == other),
    }
}

fn without_dot(name: Cow<'_, [u8]>) -> Cow<'_, [u8]> {
    match name {
        Cow::Borrowed(name) => Cow::Borrowed(name.strip_prefix(b"./").unwrap_or(name)),
        Cow::Owned(name) => Cow::Owned(name.strip_prefix(b"./").unwrap_or(&name).to_vec()),
    }
}

/// A name as coreutils escapes it; `None` for an escape that it does not write.
fn unescape(name: &[u8]) -> Option<Cow<'_, [u8]>> {
    let mut plain = Vec::with_capacity(name.len());
    let mut bytes = name.iter();
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'\\' => match bytes.next()? {
                b'\\' => b'\\',
                b'n' => b'\n',
                b'r' => b'\r',
                _ => return None,
            },
            other => *other,
        });
    }
    Some(Cow::Owned(plain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn parse(text: &str) -> Result<String, SumsFault> {
        parse_bytes(text.as_bytes())
    }

    fn parse_bytes(text: &[u8]) -> Result<String, SumsFault> {
        parse_sums(text, b"d.img", DigestKind::Sha256).map(|found| found.to_string())
    }

    #[test]
    fn lines_of_every_tool_are_read() {
        let b = "f".repeat(64);
        for line in [
            format!("{A}  d.img"),
            format!("{A} *d.img"),
            format!("{A} d.img"),
            format!("{A}\td.img"),
            format!("{}  ./d.img", A.to_uppercase()),
            format!("SHA256 (d.img) = {A}"),
            format!("SHA256 (./d.img) = {A}"),
            format!("SHA2-256(d.img)= {A}"),
            format!("SHA-256 (d.img) = {A}"),
        ] {
            for text in [
                line.clone(),
                format!("{line}\n"),
                format!("{line}\r\n"),
                format!("\u{feff}{line}\n"),
                format!("# d.img: 12 bytes\n\n{b}  d.img.sig\n{b} *x/d.img\n{line}\n{b}  e\n"),
                format!("{line}\n{line}\n"),
            ] {
                assert_eq!(parse(&text), Ok(format!("sha256:{A}")), "{text:?}");
            }
        }
    }

    #[test]
    fn the_kind_is_told_by_label_or_length() {
        for (kind, label) in [
            (DigestKind::Sha256, "SHA256"),
            (DigestKind::Sha512, "SHA512"),
            (DigestKind::Sha1, "SHA1"),
            (DigestKind::Md5, "MD5"),
            (DigestKind::Blake3, "BLAKE3"),
        ] {
            let hex = &A.repeat(2)[..kind.hex_digits()];
            let wanted = format!("{}:{hex}", kind.key());
            assert_eq!(parse(&format!("{label} (d.img) = {hex}")), Ok(wanted.clone()));
            let plain = parse_sums(format!("{hex}  d.img").as_bytes(), b"d.img", kind);
            assert_eq!(plain.map(|found| found.to_string()), Ok(wanted.clone()));
            let bare = parse_sums(format!("{hex}\n").as_bytes(), b"d.img", kind);
            assert_eq!(bare.map(|found| found.to_string()), Ok(wanted));
        }
        let two = format!("{A}  d.img\n{}  d.img\n", &A[..40]);
        assert_eq!(parse(&two), Ok(format!("sha256:{A} sha1:{}", &A[..40])));
    }

    #[test]
    fn a_signed_text_is_read_and_its_signature_is_not() {
        let text = format!(
            "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n{A} *d.img\n\
             -----BEGIN PGP SIGNATURE-----\n\n{}\n{}  d.img\n-----END PGP SIGNATURE-----\n",
            "e".repeat(64),
            "f".repeat(64)
        );
        assert_eq!(parse(&text), Ok(format!("sha256:{A}")));
    }

    #[test]
    fn names_are_compared_after_their_escapes() {
        let of =
            |name: &[u8], line: &str| parse_sums(line.as_bytes(), name, DigestKind::Sha256).is_ok();
        assert!(of(b"a\nb\\", &format!("\\{A}  a\\nb\\\\")));
        assert!(of(b"a\n", &format!("\\SHA256 (a\\n) = {A}")));
        assert!(of(b"a\\n", &format!("{A}  a\\n")));
        assert!(!of(b"a\\", &format!("\\{A}  a\\")));
        assert!(!of(b"a\\x", &format!("\\{A}  a\\x")));
        assert!(of(b"a) = (b", &format!("SHA256 (a) = (b) = {A}")));
        let mut text = format!("{A}  ").into_bytes();
        text.extend(b"\xFF\xFE\n");
        assert!(parse_sums(&text, b"\xFF\xFE", DigestKind::Sha256).is_ok());
    }

    #[test]
    fn what_is_not_there_or_not_clear_is_refused() {
        let name = || "d.img".to_owned();
        let missing = SumsFault::NoSuchName { name: name() };
        let other = "f".repeat(64);
        for text in [
            String::new(),
            "<html>Not Found</html>".into(),
            format!("{A}  d.img.sig"),
            format!("{A}  D.img"),
            format!("{A}  x/d.img"),
            format!("{A}d.img"),
            format!("{A}\n{A}  e.img"),
            format!("{A}\n{A}"),
            format!("SHA256 d.img = {A}"),
            "deed d.img".into(),
            " (d.img) = 00".into(),
            "= ( ".into(),
        ] {
            assert_eq!(parse(&text), Err(missing.clone()), "{text:?}");
        }
        for text in [
            format!("SHA256 (d.img) = {}", &A[1..]),
            format!("SHA384 (d.img) = {}", &A.repeat(2)[..96]),
            format!("{}  d.img", &A.repeat(2)[..96]),
            format!("{}\n", &A[1..]),
        ] {
            assert_eq!(parse(&text), Err(SumsFault::Unusable { name: name(), line: 1 }), "{text}");
        }
        let two = SumsFault::Ambiguous { name: name(), kind: DigestKind::Sha256, line: 2 };
        assert_eq!(parse(&format!("{A}  d.img\nSHA256 (d.img) = {other}\n")), Err(two));
    }

    #[test]
    fn a_file_that_cannot_be_one_of_sums_is_bounded() {
        let long = vec![b'a'; (1 << 20) + 1];
        assert_eq!(parse_bytes(&long), Err(too_long()));
        let lines = vec![b'\n'; MAX_LINES];
        assert_eq!(parse_bytes(&lines), Err(SumsFault::TooManyLines { limit: MAX_LINES }));
        let mut last = vec![b'\n'; MAX_LINES - 1];
        last.extend(format!("{A}  d.img").bytes());
        assert!(parse_bytes(&last).is_ok());
        assert!(parse_bytes(&vec![b'('; 1 << 20]).is_err());
    }

    #[test]
    fn the_name_is_the_last_part_of_the_url() {
        let name = |text: &str| file_name(&SourceUrl::parse(text).unwrap());
        assert_eq!(name("https://h/a/d.img?x=/e"), Some(b"d.img".to_vec()));
        assert_eq!(name("https://h/a%20b%2Bc"), Some(b"a b+c".to_vec()));
        assert_eq!(name("file:///x/%FF"), Some(vec![0xFF]));
        assert_eq!(name("s3://bucket/k/d.img"), Some(b"d.img".to_vec()));
        assert_eq!(name("https://h/a/"), None);
        assert_eq!(name("https://h"), None);
    }

    #[test]
    fn a_file_that_calls_itself_blake3_is() {
        let kind = |text: &str| kind_of_64_digits(&SourceUrl::parse(text).unwrap());
        for name in ["B3SUMS", "d.img.b3", "blake3.txt"] {
            assert_eq!(kind(&format!("https://h/{name}")), DigestKind::Blake3);
        }
        assert_eq!(kind("https://h/blake3/SHA256SUMS"), DigestKind::Sha256);
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_is_found_is_whole(
            text in proptest::collection::vec(any::<u8>(), 0..300),
            line in "[\\\\]?[0-9a-f]{0,130}[ *]{0,3}[\\\\./dimg()=n]{0,9}\n?",
        ) {
            for text in [text, line.into_bytes()] {
                if let Ok(found) = parse_sums(&text, b"d.img", DigestKind::Blake3) {
                    for (kind, hex) in found.iter() {
                        prop_assert_eq!(hex.len(), kind.hex_digits());
                    }
                }
            }
        }
    }
}
