//! What the first good copy told of an image, against what the next ones tell.
//!
//! Why: facts are written once (rule 20); another copy adds to them, or is another image.
//! Never: lets a later copy change what an earlier one told.

use super::records::Facts;

/// The first fact in which a new copy isn't the image that the earlier one was.
pub(super) fn differs(known: &Facts, new: &Facts) -> Option<String> {
    let differ = |what: &str, a: &dyn std::fmt::Display, b: &dyn std::fmt::Display| {
        Some(format!(
            "{what} is {b}, an earlier copy had {a}: the source has changed; \
             delete the image, or create the new one under another name"
        ))
    };
    if known.size_bytes != new.size_bytes {
        return differ("size in bytes", &known.size_bytes, &new.size_bytes);
    }
    if known.virtual_size_bytes != new.virtual_size_bytes {
        return differ("virtual size in bytes", &known.virtual_size_bytes, &new.virtual_size_bytes);
    }
    if known.format != new.format {
        return differ("format", &known.format, &new.format);
    }
    let (kind, a, b) = known.digests.differs(&new.digests)?;
    differ(kind.key(), &a, &b)
}

/// Known facts stand; a digest that was not known is added.
pub(super) fn merge(known: Option<Facts>, new: Facts) -> Facts {
    let Some(mut known) = known else { return new };
    known.digests.fill_from(&new.digests);
    known.etag = known.etag.or(new.etag);
    known.snapshot_size_bytes = known.snapshot_size_bytes.or(new.snapshot_size_bytes);
    known
}
