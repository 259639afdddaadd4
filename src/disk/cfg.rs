//! Longhorn's records on a disk: `longhorn-disk.cfg` and `backing.cfg`.
//!
//! Why: its files are adopted as they are, and ours by it.
//! How: the same JSON keys; the modification time is Go's `time.String()` in UTC, compared as text.
//! Never: invents a key in Longhorn's files.
//! Start at [`CopyCfg`].

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::layout::SealRecord;
use super::{DigestKind, Dir, DiskError};

/// `longhorn-disk.cfg`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct DiskCfg {
    /// The disk's UUID.
    #[serde(rename = "diskUUID")]
    pub(super) disk_uuid: String,
}

/// `backing.cfg`: what Longhorn writes beside a finished file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CopyCfg {
    /// Path of the file, as its writer saw it.
    pub name: String,
    /// The image's uuid.
    pub uuid: String,
    /// Bytes of the file.
    pub size: i64,
    /// Bytes of the disk that a guest sees.
    pub virtual_size: i64,
    /// Bytes that the file takes on its file system.
    pub real_size: i64,
    /// SHA-512 that the creator asked for, hex; empty if none.
    pub expected_checksum: String,
    /// SHA-512 of the file, hex; empty if it was not made.
    pub current_checksum: String,
    /// Modification time of the file, see [`go_time`].
    pub modification_time: String,
}

impl CopyCfg {
    /// The record of `file`, at `data_path`, as it is now.
    pub(super) fn of_file(
        data_path: &Path,
        file: &File,
        record: &SealRecord,
    ) -> Result<Self, DiskError> {
        let meta = file.metadata().map_err(|e| DiskError::io("stat", data_path, e))?;
        let current = record.digests.whole.get(DigestKind::Sha512).unwrap_or_default();
        Ok(Self {
            name: data_path.display().to_string(),
            uuid: record.uuid.clone(),
            size: clamp_i64(meta.len()),
            virtual_size: clamp_i64(record.virtual_size_bytes),
            real_size: clamp_i64(meta.blocks().saturating_mul(512)),
            expected_checksum: record.expected_sha512.clone().unwrap_or_default(),
            current_checksum: current.to_owned(),
            modification_time: go_time(&meta),
        })
    }

    /// Writes it to `name`, durably.
    pub(super) fn store(&self, dir: &Dir, name: &str) -> Result<(), DiskError> {
        let json = serde_json::to_vec(self).unwrap_or_default();
        dir.replace(name, &json)
    }
}

fn clamp_i64(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// A file's modification time as Go's `time.Time.UTC().String()` prints it:
/// `2026-11-23 01:58:45.650385927 +0000 UTC`, trailing zeroes of the fraction left out.
#[must_use]
pub fn go_time(meta: &Metadata) -> String {
    format_go_time(meta.mtime(), meta.mtime_nsec())
}

fn format_go_time(seconds: i64, nanos: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let fraction = format!(".{nanos:09}");
    let fraction = fraction.trim_end_matches('0').trim_end_matches('.');
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}{fraction} +0000 UTC")
}

/// Year, month and day of a day counted from 1970-01-01, in the proleptic Gregorian calendar:
/// years are counted from 1 March, so that the leap day is a year's last.
fn civil(days: i64) -> (i64, i64, i64) {
    const DAYS_PER_ERA: i64 = 146_097;
    let shifted = days + 719_468;
    let era = shifted.div_euclid(DAYS_PER_ERA);
    let day_of_era = shifted.rem_euclid(DAYS_PER_ERA);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_printed_as_go_prints_them() {
        assert_eq!(format_go_time(0, 0), "1970-01-01 00:00:00 +0000 UTC");
        assert_eq!(
            format_go_time(1_795_399_125, 650_385_927),
            "2026-11-23 01:58:45.650385927 +0000 UTC"
        );
        assert_eq!(format_go_time(1_709_164_800, 500_000_000), "2024-02-29 00:00:00.5 +0000 UTC");
        assert_eq!(format_go_time(951_782_399, 1_000), "2000-02-28 23:59:59.000001 +0000 UTC");
        assert_eq!(format_go_time(-1, 0), "1969-12-31 23:59:59 +0000 UTC");
    }

    #[test]
    fn longhorns_own_record_is_read() {
        let text = r#"{"name":"/data/backing-images/p-ab/backing","uuid":"ab","size":5,
            "virtualSize":5,"realSize":4096,"expectedChecksum":"","currentChecksum":"4e",
            "modificationTime":"2026-11-23 01:58:45.650385927 +0000 UTC","later":1}"#;
        let cfg: CopyCfg = serde_json::from_str(text).unwrap();
        assert_eq!((cfg.uuid.as_str(), cfg.size, cfg.real_size), ("ab", 5, 4096));
        let back = serde_json::to_value(&cfg).unwrap();
        assert_eq!(back["virtualSize"], 5);
        assert_eq!(back["modificationTime"], "2026-11-23 01:58:45.650385927 +0000 UTC");
    }
}
