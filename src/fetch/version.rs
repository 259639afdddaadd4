//! The version of a remote object, and when two answers speak of the same one.
//!
//! Why: a partial file that is continued with bytes of another version is a corrupt mix that no
//! status code shows. Tools that resume by length alone produce it and exit with 0.
//! How: a strong ETag decides (RFC 9110 section 8.8.3). Without one, a resume needs a digest from
//! the user, which proves the whole in the end.
//! Never: takes equal lengths for equal bytes.
//! Start at [`Remote::may_resume`].

use serde::{Deserialize, Serialize};

use super::error::FetchError;

/// Longest validator that is kept, in bytes; a longer one counts as none.
const MAX_VALIDATOR_BYTES: usize = 1024;

/// What a server said about the version of its object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Remote {
    /// The strong ETag with its quotes.
    pub(super) etag: Option<String>,
    /// `Last-Modified` as sent.
    pub(super) last_modified: Option<String>,
}

/// What may be done with bytes that are already here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resume {
    /// They belong to this version.
    Same,
    /// They may; the user's digest will tell.
    Unproven,
    /// They do not, or nothing can tell.
    No,
}

impl Remote {
    /// From header values. A weak ETag (`W/"…"`) says nothing about bytes and is dropped.
    pub(super) fn new(etag: Option<&str>, last_modified: Option<&str>) -> Self {
        let keep = |text: Option<&str>| {
            text.filter(|t| !t.is_empty() && t.len() <= MAX_VALIDATOR_BYTES).map(str::to_owned)
        };
        Self {
            etag: keep(etag.filter(|tag| tag.starts_with('"') && tag.ends_with('"'))),
            last_modified: keep(last_modified),
        }
    }

    /// The form in which the store keeps it.
    pub(super) fn to_tag(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// From the store's form. Text of another kind is a version that matches none.
    pub(super) fn from_tag(tag: &str) -> Self {
        serde_json::from_str(tag).unwrap_or_default()
    }

    /// Whether bytes of version `self` may be continued with bytes of version `now`.
    pub(super) fn may_resume(&self, now: &Self, has_digest: bool) -> Resume {
        if let (Some(then), Some(now)) = (&self.etag, &now.etag) {
            return if then == now { Resume::Same } else { Resume::No };
        }
        let moved = match (&self.last_modified, &now.last_modified) {
            (Some(then), Some(now)) => then != now,
            (None, None) => false,
            (Some(_), None) | (None, Some(_)) => true,
        };
        if has_digest && !moved { Resume::Unproven } else { Resume::No }
    }
}

/// What the first answer of a run has settled, for all further ones.
#[derive(Clone, Debug)]
pub(super) struct Agreed {
    /// The version that the bytes belong to.
    pub(super) remote: Remote,
    /// True if the run can go on after a break.
    pub(super) can_resume: bool,
    /// True if the user has given a digest, which proves the whole in the end.
    pub(super) has_digest: bool,
}

impl Agreed {
    /// True if each answer to a part of the source proves by itself that it is of this version.
    pub(super) fn proves_parts(&self) -> bool {
        self.can_resume && self.remote.etag.is_some()
    }

    /// Holds a further answer, with its version, its range and its total, against the first.
    ///
    /// # Errors
    /// [`Misfit`]: it is of no use.
    pub(super) fn judge(
        &self,
        now: &Remote,
        ranged: bool,
        total: Option<u64>,
        expected_total: Option<u64>,
    ) -> Result<Resume, Misfit> {
        match self.remote.may_resume(now, self.has_digest) {
            Resume::No => Err(Misfit::Version("another ETag or time")),
            Resume::Same | Resume::Unproven if total.is_some() && total != expected_total => {
                Err(Misfit::Version("another length"))
            }
            Resume::Same | Resume::Unproven if !ranged => Err(Misfit::Whole),
            same @ (Resume::Same | Resume::Unproven) => Ok(same),
        }
    }
}

/// Why an answer is of no use beside those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Misfit {
    /// It is of another version: in what it differs.
    Version(&'static str),
    /// It is of the same version, and all of it where a part was asked for. One of several servers behind
    /// a name may do that, or a proxy once.
    Whole,
}

impl Misfit {
    /// The error of who asked for it at `url`.
    pub(super) fn at(self, url: String) -> FetchError {
        match self {
            Self::Version(what) => FetchError::Changed { url, what: what.to_owned() },
            Self::Whole => FetchError::WholeAnswer { url },
        }
    }
}

/// What it is called where a server sends all of it again and again.
pub(super) fn no_ranges(url: String) -> FetchError {
    FetchError::Changed { url, what: "it has no ranges now".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_strong_etag_or_a_digest_allows_a_resume() {
        let strong = Remote::new(Some("\"a\""), Some("Mon"));
        let other = Remote::new(Some("\"b\""), Some("Mon"));
        let weak = Remote::new(Some("W/\"a\""), Some("Mon"));
        let none = Remote::new(None, None);
        assert_eq!(strong.may_resume(&strong, false), Resume::Same);
        assert_eq!(strong.may_resume(&other, true), Resume::No);
        assert_eq!(weak.may_resume(&weak, false), Resume::No);
        assert_eq!(weak.may_resume(&weak, true), Resume::Unproven);
        assert_eq!(weak.may_resume(&none, true), Resume::No);
        assert_eq!(none.may_resume(&none, true), Resume::Unproven);
        assert_eq!(none.may_resume(&none, false), Resume::No);
    }

    #[test]
    fn the_stored_form_comes_back() {
        let version = Remote::new(Some("\"a\""), Some("Mon"));
        assert_eq!(Remote::from_tag(&version.to_tag()), version);
        assert_eq!(Remote::from_tag("junk"), Remote::default());
    }
}
