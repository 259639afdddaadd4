//! The settings of the node on the wire: `GET` and `PATCH /v1/settings`.
//!
//! Why: what may be set, and to what, is said once, by [`Setting`]; here it becomes JSON.
//! How: an answer has every setting, and which of them were set. A request is a merge patch: a
//! value sets, `null` goes back to the default, what is absent stays.
//! Never: takes a key that it doesn't know, or half of a request.
//! Start at [`Settings`].

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::App;
use super::body::Body;
use super::error::ApiError;
use super::handlers::Answer;
use crate::manager::{self, Setting, SettingsChange};

/// Answer of `/v1/settings`: what holds on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Bytes per second at most, of all transfers together; 0 is no limit.
    pub rate_limit_bytes_per_s: i64,
    /// Transfers at the same time; further ones wait.
    pub max_transfers: i64,
    /// Bytes per second at most, of all copies between disks together; 0 is no limit.
    pub disk_copy_rate_bytes_per_s: i64,
    /// Copies between disks at the same time; further ones wait.
    pub max_disk_copies: i64,
    /// Copies made at the same time so that images have their `min_copies`; 0: none is made by itself.
    pub max_replenished: i64,
    /// Minutes that a copy stays which nobody uses; 0: none, -1: for ever.
    pub cleanup_wait_minutes: i64,
    /// Seconds for which all copies of an image have failed before one is started again, or one of
    /// several before another is made; -1: never.
    pub recovery_wait_seconds: i64,
    /// Minutes after which a complete copy is read and checked again; 0: only when asked.
    pub scrub_interval_minutes: i64,
    /// Bytes per second at most, of the scrub of each disk; 0 is no limit.
    pub scrub_rate_bytes_per_s: i64,
    /// The keys that were set; the others have their defaults.
    pub set: Vec<String>,
    /// The defaults of all of them, as the daemon is configured.
    pub defaults: BTreeMap<String, i64>,
}

impl Settings {
    /// The value of a setting.
    #[must_use]
    pub fn value(&self, setting: Setting) -> i64 {
        match setting {
            Setting::RateLimit => self.rate_limit_bytes_per_s,
            Setting::MaxTransfers => self.max_transfers,
            Setting::DiskCopyRate => self.disk_copy_rate_bytes_per_s,
            Setting::MaxDiskCopies => self.max_disk_copies,
            Setting::MaxReplenished => self.max_replenished,
            Setting::CleanupWait => self.cleanup_wait_minutes,
            Setting::RecoveryWait => self.recovery_wait_seconds,
            Setting::ScrubInterval => self.scrub_interval_minutes,
            Setting::ScrubRate => self.scrub_rate_bytes_per_s,
        }
    }
}

impl From<&manager::Settings> for Settings {
    fn from(settings: &manager::Settings) -> Self {
        let is_set = |setting: &Setting| settings.set_value(*setting).is_some();
        let set = Setting::ALL.into_iter().filter(is_set).map(|s| s.key().to_owned()).collect();
        let default_of = |s: Setting| (s.key().to_owned(), settings.default_of(s));
        Self {
            rate_limit_bytes_per_s: settings.get(Setting::RateLimit),
            max_transfers: settings.get(Setting::MaxTransfers),
            disk_copy_rate_bytes_per_s: settings.get(Setting::DiskCopyRate),
            max_disk_copies: settings.get(Setting::MaxDiskCopies),
            max_replenished: settings.get(Setting::MaxReplenished),
            cleanup_wait_minutes: settings.get(Setting::CleanupWait),
            recovery_wait_seconds: settings.get(Setting::RecoveryWait),
            scrub_interval_minutes: settings.get(Setting::ScrubInterval),
            scrub_rate_bytes_per_s: settings.get(Setting::ScrubRate),
            set,
            defaults: Setting::ALL.map(default_of).into(),
        }
    }
}

pub(super) async fn get(State(app): State<App>) -> Answer<Json<Settings>> {
    let settings = app.manager.read(|world| world.settings().clone()).await?;
    Ok(Json(Settings::from(&settings)))
}

pub(super) async fn change(
    State(app): State<App>,
    Body(body): Body<BTreeMap<String, Value>>,
) -> Answer<Json<Settings>> {
    let settings = app.manager.change_settings(parse(&body)?).await?;
    Ok(Json(Settings::from(&settings)))
}

/// Of a wrong value nothing is repeated; of a wrong key a bounded part.
fn parse(body: &BTreeMap<String, Value>) -> Answer<SettingsChange> {
    let one = |(key, value): (&String, &Value)| {
        let setting = Setting::from_key(key).ok_or_else(|| {
            let key: String = key.chars().filter(|c| !c.is_control()).take(80).collect();
            ApiError::bad_request(format!("{key}: no such setting; there are {}", Setting::keys()))
        })?;
        match (value, value.as_i64()) {
            (Value::Null, _) => Ok((setting, None)),
            (_, Some(number)) => Ok((setting, Some(number))),
            (_, None) => {
                let rule = setting.rule();
                Err(ApiError::bad_request(format!("{key}: not usable; {rule}, or null")))
            }
        }
    };
    body.iter().map(one).collect()
}
