//! What may be set on a running node: one typed set, documented and checked in one place.
//!
//! Why: a wait or a rate that only a configuration file has needs a restart to change, and one that
//! only the running daemon knows is gone after it.
//! How: [`Setting`] names each with its key, unit, range and default, and everything that shows or
//! takes one reads them from there. A value that was set is kept in the catalog and wins over the
//! daemon's configured default until it is reset.
//! Never: believes a stored value that is out of its range: the default holds then.
//! Start at [`Setting`], then [`Settings`].

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::backend::NodeSettings;
use super::command::Outcome;
use super::error::ManagerError;
use super::world::{Action, Change, Touched, World};

/// Ten years in minutes.
const MOST_MINUTES: i64 = 5_256_000;
/// Thirty days in seconds.
const MOST_SECONDS: i64 = 2_592_000;

/// One thing that may be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setting {
    /// Bytes per second at most, of all transfers from sources together.
    RateLimit,
    /// Transfers from sources at the same time.
    MaxTransfers,
    /// Bytes per second at most, of all copies between disks together.
    DiskCopyRate,
    /// Copies between disks at the same time.
    MaxDiskCopies,
    /// Copies that are made at the same time so that images have their minimum.
    MaxReplenished,
    /// How long a copy stays which nobody uses.
    CleanupWait,
    /// How long all copies of an image may be failed before one is started again, and how long one
    /// that may come back is waited for before another is made in its place.
    RecoveryWait,
    /// How often a complete copy is read and held against its digests.
    ScrubInterval,
    /// Bytes per second at most, of the scrub of each disk.
    ScrubRate,
}

impl Setting {
    /// Every setting, in the order in which they are shown.
    pub const ALL: [Self; 9] = [
        Self::RateLimit,
        Self::MaxTransfers,
        Self::DiskCopyRate,
        Self::MaxDiskCopies,
        Self::MaxReplenished,
        Self::CleanupWait,
        Self::RecoveryWait,
        Self::ScrubInterval,
        Self::ScrubRate,
    ];

    /// Its name in requests, answers, records and on the command line.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::RateLimit => "rate_limit_bytes_per_s",
            Self::MaxTransfers => "max_transfers",
            Self::DiskCopyRate => "disk_copy_rate_bytes_per_s",
            Self::MaxDiskCopies => "max_disk_copies",
            Self::MaxReplenished => "max_replenished",
            Self::CleanupWait => "cleanup_wait_minutes",
            Self::RecoveryWait => "recovery_wait_seconds",
            Self::ScrubInterval => "scrub_interval_minutes",
            Self::ScrubRate => "scrub_rate_bytes_per_s",
        }
    }

    /// The setting with this [`Self::key`].
    #[must_use]
    pub fn from_key(key: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|setting| setting.key() == key)
    }

    /// What it is, for people.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Self::RateLimit => "bytes per second at most, of all transfers together; 0: no limit",
            Self::MaxTransfers => "transfers at the same time; further ones wait",
            Self::DiskCopyRate => {
                "bytes per second at most, of all copies between disks together; 0: no limit"
            }
            Self::MaxDiskCopies => "copies between disks at the same time; further ones wait",
            Self::MaxReplenished => {
                "copies made at the same time so that images have their min_copies; 0: none is made \
                 by itself"
            }
            Self::CleanupWait => {
                "minutes that a copy stays which nobody uses; 0: none, -1: for ever"
            }
            Self::RecoveryWait => {
                "seconds for which all copies of an image have failed before one is started again, \
                 or one of several before another is made; -1: never"
            }
            Self::ScrubInterval => {
                "minutes after which a complete copy is read and checked again; 0: only when asked"
            }
            Self::ScrubRate => "bytes per second at most, of the scrub of each disk; 0: no limit",
        }
    }

    /// What it is, unless it is configured or set. Waits and copies at a time are Longhorn's.
    #[must_use]
    pub fn default_value(self) -> i64 {
        match self {
            Self::RateLimit | Self::DiskCopyRate => 0,
            Self::MaxTransfers => 8,
            Self::MaxDiskCopies | Self::MaxReplenished => 5,
            Self::CleanupWait => 60,
            Self::RecoveryWait => 300,
            Self::ScrubInterval => 7 * 24 * 60,
            Self::ScrubRate => 32 << 20,
        }
    }

    /// The values that it may have.
    #[must_use]
    pub fn allowed(self) -> RangeInclusive<i64> {
        match self {
            Self::RateLimit | Self::DiskCopyRate | Self::ScrubRate => 0..=i64::MAX,
            Self::MaxTransfers | Self::MaxDiskCopies => 1..=1000,
            Self::MaxReplenished => 0..=1000,
            Self::CleanupWait => -1..=MOST_MINUTES,
            Self::RecoveryWait => -1..=MOST_SECONDS,
            Self::ScrubInterval => 0..=MOST_MINUTES,
        }
    }

    /// True if it is a number of bytes.
    #[must_use]
    pub fn is_rate(self) -> bool {
        matches!(self, Self::RateLimit | Self::DiskCopyRate | Self::ScrubRate)
    }

    /// What may be given, in words: `give 1 to 1000`.
    #[must_use]
    pub fn rule(self) -> String {
        let allowed = self.allowed();
        match (*allowed.start(), *allowed.end()) {
            (0, i64::MAX) => "give a whole number, 0 or more".to_owned(),
            (-1, most) => format!("give 0 to {most}, or -1"),
            (least, most) => format!("give {least} to {most}"),
        }
    }

    /// Every key, for messages.
    #[must_use]
    pub fn keys() -> String {
        Self::ALL.map(Self::key).join(", ")
    }
}

/// What was set, as the catalog keeps it. Keys of a newer daemon are kept as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsRecord {
    /// By [`Setting::key`].
    #[serde(default)]
    pub values: BTreeMap<String, i64>,
}

/// What holds on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// What the daemon is configured with, where it is.
    configured: BTreeMap<Setting, i64>,
    record: SettingsRecord,
}

impl Settings {
    /// The settings of a daemon that is configured with these defaults.
    #[must_use]
    pub fn configured(defaults: impl IntoIterator<Item = (Setting, i64)>) -> Self {
        let in_range = |(setting, value): &(Setting, i64)| setting.allowed().contains(value);
        let configured = defaults.into_iter().filter(in_range).collect();
        Self { configured, record: SettingsRecord::default() }
    }

    /// The same, with what was set.
    #[must_use]
    pub fn with(self, record: SettingsRecord) -> Self {
        Self { record, ..self }
    }

    /// What was set.
    #[must_use]
    pub fn record(&self) -> &SettingsRecord {
        &self.record
    }

    /// The value that was set, if one was.
    #[must_use]
    pub fn set_value(&self, setting: Setting) -> Option<i64> {
        let value = self.record.values.get(setting.key()).copied();
        value.filter(|value| setting.allowed().contains(value))
    }

    /// The value without what was set.
    #[must_use]
    pub fn default_of(&self, setting: Setting) -> i64 {
        self.configured.get(&setting).copied().unwrap_or_else(|| setting.default_value())
    }

    /// The value that holds.
    #[must_use]
    pub fn get(&self, setting: Setting) -> i64 {
        self.set_value(setting).unwrap_or_else(|| self.default_of(setting))
    }

    fn bytes(&self, setting: Setting) -> Option<u64> {
        u64::try_from(self.get(setting)).ok().filter(|bytes| *bytes > 0)
    }

    fn count(&self, setting: Setting) -> usize {
        usize::try_from(self.get(setting)).unwrap_or(1).max(1)
    }

    /// How many copies are made at the same time of images that have too few.
    #[must_use]
    pub fn most_replenished(&self) -> usize {
        usize::try_from(self.get(Setting::MaxReplenished)).unwrap_or_default()
    }

    /// How long a copy that nobody uses stays; `None` for ever.
    #[must_use]
    pub fn cleanup_wait(&self) -> Option<Duration> {
        let minutes = u64::try_from(self.get(Setting::CleanupWait)).ok()?;
        Some(Duration::from_secs(minutes.saturating_mul(60)))
    }

    /// How long all copies of an image may be failed; `None` for ever.
    #[must_use]
    pub fn recovery_wait(&self) -> Option<Duration> {
        u64::try_from(self.get(Setting::RecoveryWait)).ok().map(Duration::from_secs)
    }

    /// How often a complete copy is checked; `None`: only when somebody asks.
    #[must_use]
    pub fn scrub_interval(&self) -> Option<Duration> {
        let minutes = u64::try_from(self.get(Setting::ScrubInterval)).ok()?;
        (minutes > 0).then(|| Duration::from_secs(minutes.saturating_mul(60)))
    }

    /// What holds for the workers of the node.
    #[must_use]
    pub fn node(&self) -> NodeSettings {
        NodeSettings {
            rate_bytes_per_s: self.bytes(Setting::RateLimit),
            max_transfers: self.count(Setting::MaxTransfers),
            disk_copy_rate_bytes_per_s: self.bytes(Setting::DiskCopyRate),
            max_disk_copies: self.count(Setting::MaxDiskCopies),
            scrub_rate_bytes_per_s: self.bytes(Setting::ScrubRate),
        }
    }
}

/// What is to change: a value, or `None` to go back to the default.
pub type SettingsChange = BTreeMap<Setting, Option<i64>>;

impl World {
    /// What holds on this node.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// All of them change, or none.
    pub(super) fn change_settings(
        &mut self,
        change: &SettingsChange,
        touched: &mut Touched,
    ) -> Result<Outcome, ManagerError> {
        let bad = |(setting, value): (&Setting, &Option<i64>)| {
            let value = value.filter(|value| !setting.allowed().contains(value))?;
            Some(ManagerError::BadSetting { key: setting.key(), value, rule: setting.rule() })
        };
        if let Some(error) = change.iter().find_map(bad) {
            return Err(error);
        }
        let before = self.settings.clone();
        for (setting, value) in change {
            let values = &mut self.settings.record.values;
            match value {
                Some(value) => drop(values.insert(setting.key().to_owned(), *value)),
                None => drop(values.remove(setting.key())),
            }
        }
        if self.settings != before {
            touched.actions.push(Action::SaveSettings(self.settings.record.clone()));
            touched.actions.push(Action::ApplySettings(self.settings.node()));
            touched.actions.push(Action::Announce(Change::SettingsUpdated));
        }
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_has_a_key_of_its_own_and_a_default_that_is_allowed() {
        for setting in Setting::ALL {
            assert_eq!(Setting::from_key(setting.key()), Some(setting));
            assert!(setting.allowed().contains(&setting.default_value()), "{setting:?}");
        }
        assert_eq!(Setting::from_key("cleanup"), None);
    }

    #[test]
    fn what_is_set_wins_over_what_is_configured_unless_it_is_out_of_range() {
        let configured = Settings::configured([
            (Setting::CleanupWait, 90),
            (Setting::MaxTransfers, 0),
            (Setting::RateLimit, 7),
        ]);
        assert_eq!(configured.get(Setting::CleanupWait), 90);
        assert_eq!(configured.get(Setting::MaxTransfers), 8, "0 is not allowed");
        let json = r#"{"values":{"cleanup_wait_minutes":-1,"max_transfers":5000,"later":3}}"#;
        let record: SettingsRecord = serde_json::from_str(json).unwrap();
        let settings = configured.with(record.clone());
        assert_eq!(settings.cleanup_wait(), None);
        assert_eq!(settings.get(Setting::MaxTransfers), 8);
        assert_eq!(settings.node().rate_bytes_per_s, Some(7));
        assert_eq!(settings.record(), &record, "what a newer daemon set is kept");
    }
}
