//! What a user says of an image's digests, on the command line.
//!
//! Why: every vendor publishes another sum; each should be usable as it is printed.
//! How: `--sha256` and `--sha512` for the usual two, `--checksum KIND:HEX` for any, as often as
//! there are kinds, `--checksum-url` for a vendor's file of them.
//! Never: takes two different digests of a kind.
//! Start at [`DigestArgs`].

use clap::Args;

use super::exit::{CliError, Exit};
use super::source;
use crate::control::types::{CreateImage, Digests};
use crate::fetch::{BadDigest, DigestKind, DigestMap, SourceUrl};

/// Digests that the file must have: all that are given.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Digests")]
pub struct DigestArgs {
    /// SHA-256 that the file must have
    #[arg(long, value_name = "HEX", value_parser = sha256)]
    pub sha256: Option<DigestMap>,
    /// SHA-512 that the file must have
    #[arg(long, value_name = "HEX", value_parser = sha512)]
    pub sha512: Option<DigestMap>,
    /// Digest that the file must have: sha256, sha512, sha1, md5 or blake3, a colon, hex digits;
    /// may be given once for each
    #[arg(long, value_name = "KIND:HEX")]
    pub checksum: Vec<DigestMap>,
    /// File of digests that has the file's under the last part of its URL, as a vendor's
    /// SHA256SUMS: a URL or a path. Its signature is not checked
    #[arg(long, value_name = "URL")]
    pub checksum_url: Option<String>,
}

fn sha256(text: &str) -> Result<DigestMap, BadDigest> {
    of_kind(DigestKind::Sha256, text)
}

fn sha512(text: &str) -> Result<DigestMap, BadDigest> {
    of_kind(DigestKind::Sha512, text)
}

/// The digits, also as this program prints them: `sha256:HEX`.
fn of_kind(kind: DigestKind, text: &str) -> Result<DigestMap, BadDigest> {
    let hex = match text.split_once(':') {
        Some((label, hex)) if label.eq_ignore_ascii_case(kind.key()) => hex,
        Some(_) | None => text,
    };
    DigestMap::parse([(kind, Some(hex))])
}

impl DigestArgs {
    /// Puts what is expected into a request.
    pub(super) fn put_into(&self, request: &mut CreateImage) -> Result<(), CliError> {
        let digests = Digests::from(&self.digests()?);
        (request.sha256, request.sha512) = (digests.sha256, digests.sha512);
        (request.sha1, request.md5) = (digests.sha1, digests.md5);
        request.blake3 = digests.blake3;
        request.checksum_url = self.checksum_url()?.map(|url| url.expose().to_string());
        Ok(())
    }

    /// All digests that are given.
    pub(super) fn digests(&self) -> Result<DigestMap, CliError> {
        let mut all = DigestMap::default();
        for given in self.sha256.iter().chain(&self.sha512).chain(&self.checksum) {
            all.add_all(given).map_err(|e| CliError::new(Exit::Usage, e.to_string(), ""))?;
        }
        Ok(all)
    }

    /// Where the file of digests is.
    pub(super) fn checksum_url(&self) -> Result<Option<SourceUrl>, CliError> {
        let Some(text) = self.checksum_url.as_deref() else { return Ok(None) };
        let url = source::parse(text)?;
        url.check_sums().map_err(|e| CliError::new(Exit::Usage, e.to_string(), ""))?;
        Ok(Some(url))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_digests_count_and_none_may_contradict_another() {
        let (a, b) = ("a".repeat(64), "b".repeat(64));
        let args = DigestArgs {
            sha256: Some(sha256(&a).unwrap()),
            checksum: vec![
                format!("blake3:{b}").parse().unwrap(),
                format!("SHA256:{a}").parse().unwrap(),
            ],
            ..DigestArgs::default()
        };
        assert_eq!(args.digests().unwrap().to_string(), format!("sha256:{a} blake3:{b}"));
        assert_eq!(sha256(&format!("sha256:{a}")), sha256(&a));
        assert!(
            sha256(&format!("blake3:{a}")).is_err() && sha256(&format!("sha256:{a}a")).is_err()
        );
        let two = DigestArgs { checksum: vec![sha256(&b).unwrap()], ..args };
        assert_eq!(two.digests().unwrap_err().exit, Exit::Usage);
    }
}
