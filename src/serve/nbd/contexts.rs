//! The metadata contexts: what can be said of a range beside its bytes.
//!
//! Why: a copy tool asks which ranges are holes, a scheduler which of them are on this node.
//! How: a context is a name, a number in replies, and the state of each kind of run; a set of them is
//! a few bits.
//! Never: guesses: a new kind of run does not compile until each context knows it.
//! Start at [`Context::state`]. Protocol: "Metadata querying".

use super::wire::{allocation, presence};
use crate::image::{Run, RunKind, View};
use crate::units::GuestOffset;

/// What BLOCK_STATUS can report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`: which ranges are data, and which are holes.
    Allocation,
    /// `bedplate:presence`: which ranges are on this node.
    Presence,
}

impl Context {
    /// All of them, in the order of replies.
    pub const ALL: [Self; 2] = [Self::Allocation, Self::Presence];

    /// Namespace and leaf, as queries name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Allocation => "base:allocation",
            Self::Presence => "bedplate:presence",
        }
    }

    /// Its number in replies, not 0.
    #[must_use]
    pub fn id(self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Presence => 2,
        }
    }

    /// State flags of the run of `view` that begins at `at`, and for how many bytes they hold: all of
    /// the run, or the beginning of it.
    #[must_use]
    pub fn state(self, view: &View, at: GuestOffset, run: Run) -> (u32, u64) {
        match (self, run.kind) {
            (Self::Allocation, RunKind::Zero) => (allocation::HOLE_ZERO, run.len_bytes),
            (Self::Allocation, RunKind::Data(_) | RunKind::Encoded) => {
                (allocation::DATA, run.len_bytes)
            }
            (Self::Presence, RunKind::Zero | RunKind::Data(_) | RunKind::Encoded) => {
                let (is_here, len_bytes) = view.presence(at, run);
                (if is_here { presence::PRESENT } else { presence::ABSENT }, len_bytes)
            }
        }
    }

    fn bit(self) -> u8 {
        match self {
            Self::Allocation => 1,
            Self::Presence => 2,
        }
    }
}

/// A set of contexts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contexts(u8);

impl From<Context> for Contexts {
    fn from(context: Context) -> Self {
        Self(context.bit())
    }
}

impl Contexts {
    /// None of them.
    pub const NONE: Self = Self(0);
    /// All of them.
    pub const ALL: Self = Self(3);

    /// Those whose name is `query`.
    #[must_use]
    pub fn named(query: &str) -> Self {
        Self::which(|context| context.name() == query)
    }

    /// Those whose name is `query`, or whose namespace it is, colon included.
    #[must_use]
    pub fn matching(query: &str) -> Self {
        let is_namespace = query.ends_with(':') && query.matches(':').count() == 1;
        Self::which(|context| {
            context.name() == query || is_namespace && context.name().starts_with(query)
        })
    }

    /// This set and `other`.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether `context` is one of them.
    #[must_use]
    pub fn has(self, context: Context) -> bool {
        self.0 & context.bit() != 0
    }

    /// Its contexts, in the order of replies.
    pub fn iter(self) -> impl Iterator<Item = Context> {
        Context::ALL.into_iter().filter(move |context| self.has(*context))
    }

    fn which(test: impl Fn(Context) -> bool) -> Self {
        let fitting = Context::ALL.into_iter().filter(|context| test(*context));
        fitting.fold(Self::NONE, |set, context| set.with(context.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_named_with_its_colon_and_a_context_in_full() {
        for (query, listed) in [
            ("base:", Contexts::from(Context::Allocation)),
            ("bedplate:", Contexts::from(Context::Presence)),
            ("base:allocation", Contexts::from(Context::Allocation)),
            ("base", Contexts::NONE),
            (":", Contexts::NONE),
            ("", Contexts::NONE),
            ("base:alloc", Contexts::NONE),
            ("base::", Contexts::NONE),
        ] {
            assert_eq!(Contexts::matching(query), listed, "{query:?}");
        }
        assert_eq!(Contexts::named("base:"), Contexts::NONE);
        assert_eq!(Contexts::named("bedplate:presence"), Contexts::from(Context::Presence));
    }

    #[test]
    fn every_context_has_a_number_and_a_bit_of_its_own() {
        let [one, other] = Context::ALL;
        assert!(one.id() != other.id() && one.id() > 0 && other.id() > 0);
        assert_eq!(Contexts::from(one).with(other.into()), Contexts::ALL);
        assert_eq!(Contexts::ALL.iter().collect::<Vec<_>>(), Context::ALL);
    }
}
