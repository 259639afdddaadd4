//! Whether an image that exists is the one that is asked for.
//!
//! Why: a command that is repeated must be the same, and one that means another image refused.
//! Never: changes either.
//! Start at [`same_image`].

use std::collections::BTreeSet;

use super::command::NewImage;
use super::error::ManagerError;
use super::records::ImageRecord;
use super::selectors::list;
use crate::fetch::{Access, SourceUrl};
use crate::names::{ImageName, Tag};

/// The existing image is the one that is asked for, as far as both say.
pub(super) fn same_image(record: &ImageRecord, new: &NewImage) -> Result<(), ManagerError> {
    let cloned = record.clone_of.as_ref().map(|of| &of.image);
    let is_other = record.source != new.source || record.upload_bytes != new.upload_bytes;
    if is_other || cloned != new.clone_of.as_ref() {
        let name = record.name.clone();
        let source_text = match (&record.source, record.upload_bytes, cloned) {
            (Some(source), ..) => source.to_string(),
            (None, Some(bytes), _) => format!("an upload of {bytes} bytes"),
            (None, None, Some(cloned)) => format!("a clone of {cloned}"),
            (None, None, None) => "none (found on a disk)".to_owned(),
        };
        return Err(ManagerError::OtherSource { name, source_text });
    }
    check_way(record, new)?;
    let facts = record.facts.as_ref();
    let known = |kind| {
        let digest = record.expected.digests.get(kind).or_else(|| facts?.digests.get(kind));
        digest.map(str::to_owned)
    };
    let digests = new.expected.digests.iter();
    let digests = digests.map(|(kind, given)| (kind.key(), known(kind), Some(given.to_owned())));
    let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_owned());
    let tags = |tags: &BTreeSet<Tag>| match tags.is_empty() {
        true => Some("none".to_owned()),
        false => Some(list(tags)),
    };
    let said = |new: &BTreeSet<Tag>| tags(new).filter(|_| !new.is_empty());
    let named = |name: &Option<ImageName>| text(&name.as_ref().map(ToString::to_string));
    let shown = |url: &Option<SourceUrl>| url.as_ref().map(ToString::to_string);
    let others = [
        ("checksum_url", shown(&record.expected.checksum_url), shown(&new.expected.checksum_url)),
        // A clone has those of its image, unless another snapshot is said.
        ("base", Some(named(&record.base)), Some(named(&new.base)).filter(|_| cloned.is_none())),
        (
            "data_file",
            Some(named(&record.data_file)),
            Some(named(&new.data_file)).filter(|_| cloned.is_none()),
        ),
        (
            "snapshot",
            Some(text(&record.snapshot)),
            Some(text(&new.snapshot)).filter(|_| cloned.is_none() || new.snapshot.is_some()),
        ),
        ("disk_selector", tags(&record.selectors.disk), said(&new.selectors.disk)),
        ("node_selector", tags(&record.selectors.node), said(&new.selectors.node)),
        ("layout", Some(record.layout.to_string()), Some(new.layout.to_string())),
        (
            "format",
            record.declared_format.or(facts.map(|f| f.format)).map(|f| f.to_string()),
            new.declared_format.map(|f| f.to_string()),
        ),
    ];
    for (what, found, given) in digests.chain(others) {
        let Some(given) = given else { continue };
        let fetched_unchecked = found.is_none() && !record.disks.is_empty();
        let found = found.unwrap_or_else(|| "not known".to_owned());
        if fetched_unchecked || (found != given && found != "not known") {
            let name = record.name.clone();
            return Err(ManagerError::OtherExpectation { name, what, found, given });
        }
    }
    Ok(())
}

/// Mirrors and the file of digests are reached the same way as the source. Who changes that way, and with
/// it who sees their credentials, has to know them.
fn check_way(record: &ImageRecord, new: &NewImage) -> Result<(), ManagerError> {
    let way = |access: &Access| {
        (access.ca.clone(), access.proxy.clone(), access.no_proxy.clone(), access.direct)
    };
    let goes_on = new.access.is_empty() || way(&new.access) == way(&record.access);
    let (sums, new_sums) = (&record.expected.checksum_url, &new.expected.checksum_url);
    let is_known = record.mirrors == new.mirrors && sums == new_sums;
    let has_secrets = record.mirrors.iter().chain(sums).any(SourceUrl::may_hold_secrets);
    if goes_on || is_known || !has_secrets {
        return Ok(());
    }
    Err(ManagerError::OtherWay { name: record.name.clone() })
}
