//! How work goes on, on stderr: a bar on a terminal, a plain line every few seconds elsewhere.
//!
//! Why: a bar in a log file is garbage, and silence in one is worse.
//! How: the numbers come from the worker; this only draws.
//! Never: draws off a terminal, or passes on a control character.
//! Start at [`Meter`].

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::{Output, printable};
use crate::units::human_bytes;

/// Off a terminal, a line at most this often, unless the phase changes.
const LINE_EVERY: Duration = Duration::from_secs(3);

/// What is drawn.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Moment {
    pub(super) phase: String,
    pub(super) bytes_done: u64,
    pub(super) bytes_total: Option<u64>,
    pub(super) rate_bytes_per_s: u64,
    pub(super) eta_s: Option<u64>,
    pub(super) connections: u32,
    /// Retries, reasons; may be empty.
    pub(super) message: String,
}

impl Moment {
    /// `fetching  61%  1.2 GiB of 2.0 GiB  512.0 MiB/s  2 s left`.
    fn text(&self) -> String {
        let mut parts = vec![format!("{:<10}", self.phase)];
        parts.extend(self.share().map(|percent| format!("{percent:>3}%")));
        parts.push(match self.bytes_total {
            Some(total) => format!("{} of {}", human_bytes(self.bytes_done), human_bytes(total)),
            None => human_bytes(self.bytes_done),
        });
        if self.rate_bytes_per_s > 0 {
            parts.push(format!("{}/s", human_bytes(self.rate_bytes_per_s)));
        }
        // One goes without saying.
        if self.connections > 1 {
            parts.push(format!("{} connections", self.connections));
        }
        parts.extend(self.eta_s.map(|s| format!("{} left", human_time(s))));
        if !self.message.is_empty() {
            parts.push(self.message.clone());
        }
        printable(&parts.join("  ")).replace('\n', " ")
    }

    /// Percent; 100 only when all is there.
    pub(super) fn share(&self) -> Option<u64> {
        let total = self.bytes_total.filter(|t| *t > 0)?;
        let percent = u128::from(self.bytes_done.min(total)) * 100 / u128::from(total);
        u64::try_from(percent).ok()
    }
}

/// `2 s`, `3 min 5 s`, `1 h 2 min`.
pub(super) fn human_time(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// Draws moments.
pub(super) struct Meter<'a> {
    output: &'a Output,
    name: String,
    bar: Option<ProgressBar>,
    last_line: Option<(Instant, String)>,
}

impl<'a> Meter<'a> {
    pub(super) fn new(output: &'a Output, name: &str) -> Self {
        let bar = (output.shows_progress() && output.is_interactive()).then(|| {
            let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr_with_hz(8));
            let style = ProgressStyle::with_template("{prefix:.24} [{wide_bar}] {msg}");
            bar.set_style(
                style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "),
            );
            bar.set_prefix(name.to_owned());
            bar
        });
        Self { output, name: name.to_owned(), bar, last_line: None }
    }

    pub(super) fn show(&mut self, moment: &Moment) {
        if let Some(bar) = &self.bar {
            bar.set_length(moment.bytes_total.unwrap_or(1).max(1));
            bar.set_position(moment.bytes_total.map_or(0, |total| moment.bytes_done.min(total)));
            bar.set_message(moment.text());
            return;
        }
        let now = Instant::now();
        let due = self.last_line.as_ref().is_none_or(|(at, phase)| {
            *phase != moment.phase || now.duration_since(*at) >= LINE_EVERY
        });
        if due {
            self.output.note(&format!("{}  {}", self.name, moment.text()));
            self.last_line = Some((now, moment.phase.clone()));
        }
    }

    /// Takes the bar away, so that what follows stands alone.
    pub(super) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Meter<'_> {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_one_line_for_people() {
        let moment = Moment {
            phase: "fetching".into(),
            bytes_done: 3 << 29,
            bytes_total: Some(2 << 30),
            rate_bytes_per_s: 512 << 20,
            eta_s: Some(61),
            connections: 4,
            message: "try 2\nof 6".into(),
        };
        assert_eq!(
            moment.text(),
            "fetching     75%  1.5 GiB of 2.0 GiB  512.0 MiB/s  4 connections  1 min 1 s left  try 2 of 6"
        );
        let almost = Moment { bytes_done: 999, bytes_total: Some(1000), ..Moment::default() };
        assert_eq!(almost.share(), Some(99));
    }
}
