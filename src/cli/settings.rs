//! `bedplate settings`: what holds on the node, and changes of it.
//!
//! Why: a wait or a rate is changed while the daemon runs, and stays so.
//! Never: judges a value: the daemon does.

use std::collections::BTreeMap;

use super::args::Global;
use super::args_health::{SettingsArgs, SettingsCommand};
use super::exit::CliError;
use super::output::Output;
use super::table::Table;
use crate::control::client::Client;
use crate::control::settings::Settings;
use crate::manager::Setting;
use crate::units::human_bytes;

/// A merge patch: `None` goes back to the default.
type Patch = BTreeMap<&'static str, Option<i64>>;

pub(super) async fn run(
    args: &SettingsArgs,
    global: &Global,
    output: &Output,
) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let patch = patch_of(args);
    let settings: Settings = match patch.is_empty() {
        true => client.get("/v1/settings").await?,
        false => client.patch("/v1/settings", &patch).await?,
    };
    if output.json {
        return output.object(&settings);
    }
    if let Some(SettingsCommand::Get(get)) = &args.command
        && let Some(setting) = get.key
    {
        return output.line(&settings.value(setting).to_string());
    }
    let mut table = Table::new(&["SETTING", "VALUE", "DEFAULT", "MEANING"]);
    for setting in Setting::ALL {
        let default = settings.defaults.get(setting.key()).copied();
        table.row(vec![
            setting.key().to_owned(),
            shown(setting, settings.value(setting)),
            default.map_or_else(|| "-".to_owned(), |value| shown(setting, value)),
            setting.meaning().to_owned(),
        ]);
    }
    table.lines().iter().try_for_each(|line| output.line(line))
}

/// What the arguments change; empty if nothing.
fn patch_of(args: &SettingsArgs) -> Patch {
    let flag = |setting: Setting, value: Option<i64>| value.map(|v| (setting.key(), Some(v)));
    let number = |value: Option<u64>| value.map(|v| i64::try_from(v).unwrap_or(i64::MAX));
    match &args.command {
        Some(SettingsCommand::Set(set)) => {
            set.pairs.iter().map(|(setting, value)| (setting.key(), Some(*value))).collect()
        }
        Some(SettingsCommand::Reset(reset)) => {
            reset.keys.iter().map(|setting| (setting.key(), None)).collect()
        }
        Some(SettingsCommand::Get(_)) => Patch::new(),
        None => [
            flag(Setting::RateLimit, number(args.rate)),
            flag(Setting::MaxTransfers, number(args.max_transfers)),
            flag(Setting::CleanupWait, args.cleanup_wait),
        ]
        .into_iter()
        .flatten()
        .collect(),
    }
}

fn shown(setting: Setting, value: i64) -> String {
    match (setting, u64::try_from(value)) {
        (_, Ok(0)) if setting.is_rate() => "no limit".to_owned(),
        (_, Ok(bytes)) if setting.is_rate() => format!("{}/s", human_bytes(bytes)),
        (Setting::CleanupWait | Setting::RecoveryWait, Err(_)) => "never".to_owned(),
        (Setting::ScrubInterval, Ok(0)) => "when asked".to_owned(),
        _ => value.to_string(),
    }
}
