//! A complete copy as the source of another one.
//!
//! Why: what is on the node already must not come over the network again; and a copy of damaged
//! bytes must not become a second one.
//! How: as a file of the node ([`super::local`]): blocks are shared where the file system can, else
//! holes stay holes; each MiB is held against the digest that was made when the first copy came.
//! A digest that somebody expects and that was never made is made on the way.
//! What of it is durable is gone on with, as with any source.
//! Never: opens a path: the file is open already.
//! Start at [`duplicate`].

use std::sync::Arc;

use super::error::FetchError;
use super::expect::Expect;
use super::http::Access;
use super::local::LocalFile;
use super::progress::Progress;
use super::source::SourceUrl;
use super::spec::Source;
use super::transfer::{Engine, FEW_BUFFERS, Fetched, Run};
use crate::disk::{Digests, Filling, Sealed};
use crate::units::MIB;

/// Makes `filling` a copy of `sealed`, whose digests are `known`. Those of its MiBs are compared if
/// there are any, else those of the whole file that there are. The bytes must have the digests of
/// `expect` besides.
///
/// # Errors
/// [`FetchError::Digest`] if they don't have those, and are what `sealed` was.
/// [`FetchError::Duplicate`] if the bytes of `sealed` are no longer those of its digests: what has
/// arrived is worth nothing then. [`FetchError::Local`] if it cannot be read; others as
/// [`super::transfer()`].
pub async fn duplicate(
    engine: &Engine,
    sealed: &Sealed,
    known: &Digests,
    expect: &Expect,
    filling: &mut Filling,
    progress: &Arc<Progress>,
) -> Result<Fetched, FetchError> {
    let file = LocalFile::of(sealed)?;
    let path = sealed.path();
    let Some(url) = SourceUrl::from_file_path(path) else {
        let source = std::io::Error::from(std::io::ErrorKind::InvalidFilename);
        return Err(FetchError::Local { op: "name", path: path.to_owned(), source });
    };
    let wrong = |(kind, expected, found)| {
        Err(FetchError::Digest { url: path.display().to_string(), kind, expected, found })
    };
    if let Some(mismatch) = expect.differs(known) {
        return wrong(mismatch);
    }
    let has_mibs = !known.xxh3_per_mib.is_empty();
    let proof = if has_mibs { Expect::default() } else { Expect::from(known.whole.clone()) };
    let unmade = expect.without(known);
    let mut source = Source::new(url.clone()).expecting(proof.with(&unmade));
    source.digest = !has_mibs;
    let access = Access::default();
    let mut run = Run {
        engine,
        source: &source,
        url: &url,
        access: &access,
        expect: &proof,
        filling,
        progress,
        share: engine.pool.share(FEW_BUFFERS, engine.buffers),
        pipeline: None,
        unproven: false,
        mirrors: false,
        spools: false,
    };
    let damaged = |at: u64| FetchError::Duplicate { path: path.to_owned(), at };
    let copied = match run.local_file(file).await {
        Err(FetchError::Digest { .. }) => return Err(damaged(0)),
        other => other?,
    };
    let (found, wanted) = (&copied.digests.xxh3_per_mib, &known.xxh3_per_mib);
    let same = found.iter().zip(wanted).take_while(|(found, wanted)| found == wanted).count();
    if has_mibs && (same != found.len() || same != wanted.len()) {
        return Err(damaged(same as u64 * MIB));
    }
    // These are of the bytes that the copy was made of: if they differ, the expectation is wrong.
    if let Some(mismatch) = unmade.mismatch(&copied.digests) {
        return wrong(mismatch);
    }
    if !has_mibs {
        return Ok(copied);
    }
    // Each MiB is the one of which the digests of the whole file were made.
    let mut digests = known.clone();
    digests.whole.fill_from(&copied.digests.whole);
    Ok(Fetched { digests, etag: None })
}
