//! All that is to be said of a file, for a person: what it is, what is wrong, and what to do.
//!
//! Why: a copy is refused for its first fault; who made the image wants to see every one, and who
//! was sent it wants to know whether it can be used at all.
//! How: the same rules as before a copy is sealed, but every table entry is judged and faults are
//! counted; the first ones are kept with their places. Oddities that change no byte are findings
//! too.
//! Never: stops at a damaged entry, keeps more than a few findings, or decodes data.
//! Start at [`Inspection::of_file`].

use std::fmt;
use std::ops::Range;
use std::path::Path;

use super::qcow2::{Fault, Image, Snapshot, Tally, Terms};
use super::{Class, Format, ImageError, Info, Source, blocks, info};

/// What can be done with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// It is served, and nothing is wrong with it.
    Ok,
    /// It is served, its bytes are right, and something should be put right or looked at.
    Repairable,
    /// It is not served.
    Refused,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Repairable => "repairable",
            Self::Refused => "refused",
        })
    }
}

/// One thing that is odd or wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What the image would be if this were all.
    pub verdict: Verdict,
    /// What is found and what is needed, in words.
    pub text: String,
    /// The field's name in the format's specification.
    pub field: Option<&'static str>,
    /// Its first byte in the file.
    pub at: Option<u64>,
}

/// What an inspection found.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// The worst of the findings; [`Verdict::Ok`] without any.
    pub verdict: Verdict,
    /// What the file is, as far as it could be read; `None` if not even its header is usable.
    pub info: Option<Info>,
    /// The internal snapshots, the oldest first.
    pub snapshots: Vec<Snapshot>,
    /// What is odd or wrong, the worst first.
    pub findings: Vec<Finding>,
    /// Further damaged entries, which are like the ones in `findings`.
    pub more_faults: u64,
}

impl Inspection {
    /// Inspects a file whole: header, snapshot table, and every L1 and L2 entry.
    ///
    /// # Errors
    /// The host failed to read it. A bad image is no error but a finding.
    pub fn of_file(
        file: &dyn Source,
        path: &Path,
        declared: Option<Format>,
        terms: &Terms<'_>,
    ) -> Result<Self, ImageError> {
        let info = match info::identify(file, path, declared) {
            Ok(info) => info,
            Err(error) => return Self::refused(None, error),
        };
        if info.format == Format::Raw {
            return Ok(Self::of_raw(info));
        }
        match blocks::Image::open(file, path, info.format, info.file_size_bytes) {
            Ok(None) => {}
            Ok(Some(image)) => {
                let tally = image.tally(file, path)?;
                return Ok(Self::of_blocks(info, &image, &tally));
            }
            Err(error) => return Self::refused(Some(info), error),
        }
        let opened = Image::open(file, path, info.file_size_bytes, terms)
            .and_then(|image| image.snapshots(file, path).map(|list| (image, list)));
        let (image, snapshots) = match opened {
            Ok(opened) => opened,
            Err(error) => return Self::refused(Some(info), error),
        };
        let read = |range: Range<u64>, bytes: &mut [u8]| {
            let len = bytes.len();
            file.read_exact(bytes, range.start)
                .map_err(|source| ImageError::read(path, range.start, len, source))
        };
        let tally = image.tally(read)?;
        Ok(Self::of_tables(info, &image, snapshots, &tally))
    }

    /// Of a file that is the disk.
    #[must_use]
    pub fn of_raw(info: Info) -> Self {
        Self::new(info, Vec::new(), &Tally::default(), Vec::new())
    }

    /// Of a VMDK, VHD or VHDX image whose table was read.
    #[must_use]
    pub fn of_blocks(mut info: Info, image: &blocks::Image, tally: &Tally) -> Self {
        image.describe(&mut info);
        image.count(tally, &mut info);
        Self::new(info, Vec::new(), tally, Vec::new())
    }

    /// Of an image whose header, snapshots and tables were read, from wherever.
    #[must_use]
    pub fn of_tables(
        mut info: Info,
        image: &Image,
        snapshots: Vec<Snapshot>,
        tally: &Tally,
    ) -> Self {
        image.describe(&mut info);
        tally.describe(&mut info);
        let damaged = snapshots.iter().filter_map(|snapshot| {
            let fault = image.header().check_snapshot(snapshot, info.file_size_bytes).err()?;
            let text = format!("snapshot {:?} cannot be served: {}", snapshot.id, fault);
            let (field, at) = (Some(fault.field), Some(fault.at.0));
            Some(Finding { verdict: Verdict::Repairable, text, field, at })
        });
        let damaged = damaged.collect();
        Self::new(info, snapshots, tally, damaged)
    }

    /// Of a file that is not read any further, for this reason.
    ///
    /// # Errors
    /// The reason itself, if it is no fault of the bytes.
    pub fn refused(info: Option<Info>, error: ImageError) -> Result<Self, ImageError> {
        if error.class() != Class::Refuse {
            return Err(error);
        }
        let place = error.place();
        let (field, at) = (place.map(|(field, _)| field), place.map(|(_, at)| at.0));
        let text = error.reason();
        let finding = Finding { verdict: Verdict::Refused, text, field, at };
        let findings = vec![finding];
        Ok(Self {
            verdict: Verdict::Refused,
            info,
            snapshots: Vec::new(),
            findings,
            more_faults: 0,
        })
    }

    fn new(mut info: Info, snapshots: Vec<Snapshot>, tally: &Tally, damaged: Vec<Finding>) -> Self {
        let of = |faults: &[Fault], verdict| -> Vec<Finding> {
            faults.iter().map(|fault| of_fault(fault, verdict)).collect()
        };
        let mut findings = of(tally.faults(), Verdict::Refused);
        findings.extend(of(tally.oddities(), Verdict::Repairable));
        let more = tally.oddities_total() - tally.oddities().len() as u64;
        if more > 0 {
            info.notes.push(format!("{more} more fields are odd in such a way"));
        }
        findings.extend(damaged);
        findings.extend(std::mem::take(&mut info.notes).into_iter().map(|text| Finding {
            verdict: Verdict::Repairable,
            text,
            field: None,
            at: None,
        }));
        let verdict = findings.iter().map(|f| f.verdict).max().unwrap_or(Verdict::Ok);
        let more_faults = tally.faults_total() - tally.faults().len() as u64;
        Self { verdict, info: Some(info), snapshots, findings, more_faults }
    }
}

fn of_fault(fault: &Fault, verdict: Verdict) -> Finding {
    let (field, at) = (Some(fault.field), Some(fault.at.0));
    let text = match verdict {
        Verdict::Repairable => format!("{fault}; reads are right, a writer may do damage"),
        Verdict::Ok | Verdict::Refused => fault.to_string(),
    };
    Finding { verdict, text, field, at }
}
