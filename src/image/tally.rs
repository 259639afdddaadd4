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
    /// True if not all that writers use was held against the disk.
    pub(super) is_partial: bool,
}

/// What all table entries of an image say together.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub(super) counts: ClusterCounts,
    pub(super) odd: Odd,
    faults: Vec<Fault>,
    faults_total: u64,
    oddities: Vec<Fault>,
    oddities_total: u64,
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

    /// The first fields that are wrong and change no byte of the disk.
    #[must_use]
    pub fn oddities(&self) -> &[Fault] {
        &self.oddities
    }

    /// How many fields are so.
    #[must_use]
    pub fn oddities_total(&self) -> u64 {
        self.oddities_total
    }

    pub(super) fn add_oddity(&mut self, fault: Fault) {
        if self.oddities.len() == MAX_FAULTS {
            self.oddities_total += 1;
            return;
        }
        // A field that names several clusters is said once.
        if self.oddities.iter().any(|known| (known.field, known.at) == (fault.field, fault.at)) {
            return;
        }
        self.oddities_total += 1;
        self.oddities.push(fault);
    }

    /// Adds the oddities of another tally.
    pub(super) fn add_odd(&mut self, other: &Self) {
        let room = MAX_FAULTS - self.oddities.len();
        self.oddities.extend(other.oddities.iter().take(room));
        self.oddities_total += other.oddities_total;
    }

    pub(super) fn add_fault(&mut self, fault: Fault) {
        self.faults_total += 1;
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(fault);
        }
    }

    /// Puts the counts, and what is odd, into `info`.
    pub fn describe(&self, info: &mut Info) {
        let Odd { bits, places, is_partial } = self.odd;
        if bits > 0 {
            info.notes.push(format!("{bits} L2 entries have reserved bits set; ignored"));
        }
        if places > 0 {
            let what = "L2 entries name places past the file's end where nothing is read";
            info.notes.push(format!("{places} {what}"));
        }
        if is_partial {
            let what = "refcounts and bitmaps use more clusters than are held against each other";
            info.notes.push(what.to_owned());
        }
        info.clusters = Some(self.counts);
    }
}
