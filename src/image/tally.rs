//! What all entries of an image's tables say together.
//!
//! Why: whoever made an image wants to see every fault, and how much of it holds data.
//! How: counts, and the first few faults with their places.
//! Never: keeps more than a few faults.
//! Start at [`Tally`].

use super::fault::Fault;
use super::{ClusterCounts, Info};

/// Faults that are kept of one image.
const MAX_FAULTS: usize = 20;

/// Entries that are read although something is odd about them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Odd {
    /// With bits set that must not be.
    pub(super) bits: u64,
    /// That name a place past the file's end where nothing is read.
    pub(super) places: u64,
}

/// What all table entries of an image say together.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub(super) counts: ClusterCounts,
    pub(super) odd: Odd,
    faults: Vec<Fault>,
    faults_total: u64,
}

impl Tally {
    /// The first damaged entries.
    #[must_use]
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }

    /// How many entries are damaged.
    #[must_use]
    pub fn faults_total(&self) -> u64 {
        self.faults_total
    }

    pub(super) fn add_fault(&mut self, fault: Fault) {
        self.faults_total += 1;
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(fault);
        }
    }

    /// Puts the counts, and what is odd, into `info`.
    pub fn describe(&self, info: &mut Info) {
        let Odd { bits, places } = self.odd;
        if bits > 0 {
            info.notes.push(format!("{bits} L2 entries have reserved bits set; ignored"));
        }
        if places > 0 {
            let what = "L2 entries name places past the file's end where nothing is read";
            info.notes.push(format!("{places} {what}"));
        }
        info.clusters = Some(self.counts);
    }
}
