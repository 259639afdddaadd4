//! `bedplate top`: what readers of each image do now, and how long they wait.
//!
//! Why: "who is reading, and is it slow" should take one command.
//! How: asks for the counters twice and shows the difference; on a terminal, in place, until Ctrl-C.
//! Never: shows a rate that was not measured.

use std::time::{Duration, Instant};

use super::args::Global;
use super::args_top::TopArgs;
use super::exit::CliError;
use super::output::Output;
use super::signals::Signals;
use super::table::Table;
use crate::control::client::Client;
use crate::control::types_stats::{ImageStats, Latencies, Stats};
use crate::units::human_bytes;

/// Clears the terminal and goes to its first line.
const CLEAR: &[u8] = b"\x1b[H\x1b[2J";

pub(super) async fn run(args: &TopArgs, global: &Global, output: &Output) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let mut signals = Signals::new()?;
    let mut before: Stats = client.get("/v1/stats").await?;
    loop {
        let begun = Instant::now();
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(args.interval)) => {}
            () = signals.next() => return Ok(()),
        }
        let now: Stats = client.get("/v1/stats").await?;
        if output.json {
            output.object(&now)?;
        } else {
            show(&before, &now, begun.elapsed(), args.once, output)?;
        }
        if args.once {
            return Ok(());
        }
        before = now;
    }
}

fn show(
    before: &Stats,
    now: &Stats,
    elapsed: Duration,
    once: bool,
    output: &Output,
) -> Result<(), CliError> {
    let heading = [
        "IMAGE", "STATE", "SESSIONS", "REQ/S", "BYTES/S", "p50", "p99", "WAITS/S", "ASKED/S",
        "ERRORS",
    ];
    let mut table = Table::new(&heading);
    for image in &now.images {
        let then = before.images.iter().find(|then| then.name == image.name);
        table.row(row(then, image, elapsed));
    }
    let decoded = per_second(before.decoded_clusters, now.decoded_clusters, elapsed);
    let foot = format!("decoded: {} kept, {decoded}/s new", human_bytes(now.decoded_bytes));
    if !once && output.redraws_stdout() {
        output.bytes(CLEAR)?;
    }
    table.lines().iter().try_for_each(|line| output.line(line))?;
    output.line(&foot)
}

fn row(then: Option<&ImageStats>, now: &ImageStats, elapsed: Duration) -> Vec<String> {
    let rate = |field: fn(&ImageStats) -> u64| {
        per_second(then.map_or(field(now), field), field(now), elapsed)
    };
    let state = match (now.ready, now.bytes_done, now.bytes_total) {
        (true, _, _) => "ready".to_owned(),
        (false, Some(done), Some(total)) if total > 0 => format!("{}%", done * 100 / total),
        (false, Some(done), _) => human_bytes(done),
        (false, None, _) => "-".to_owned(),
    };
    let nbd = since(then.and_then(|then| then.nbd.as_ref()), now.nbd.as_ref());
    let asked = |image: &ImageStats| image.replica.as_ref().map_or(0, |times| times.count);
    vec![
        now.name.clone(),
        state,
        now.sessions.to_string(),
        rate(|image| image.requests).to_string(),
        human_bytes(rate(|image| image.bytes)),
        quantile(&nbd, 500),
        quantile(&nbd, 990),
        rate(|image| image.demand_misses).to_string(),
        per_second(then.map_or(asked(now), asked), asked(now), elapsed).to_string(),
        now.errors.to_string(),
    ]
}

fn per_second(then: u64, now: u64, elapsed: Duration) -> u64 {
    let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
    now.saturating_sub(then).saturating_mul(1000) / millis
}

/// The numbers of each bucket since `then`.
fn since(then: Option<&Latencies>, now: Option<&Latencies>) -> Vec<u64> {
    let Some(now) = now else { return Vec::new() };
    let before = |n: usize| then.and_then(|then| then.buckets.get(n)).copied().unwrap_or(0);
    now.buckets.iter().enumerate().map(|(n, count)| count.saturating_sub(before(n))).collect()
}

/// The end of the bucket with this quantile: bucket `n` has the times below `2^n` µs.
fn quantile(buckets: &[u64], thousandths: u64) -> String {
    let count: u64 = buckets.iter().sum();
    let rank = count.saturating_mul(thousandths).div_ceil(1000).max(1);
    let mut seen = 0;
    for (n, here) in buckets.iter().enumerate() {
        seen += here;
        if seen >= rank {
            let micros = 1_u64 << n.min(40);
            return match micros {
                0..1000 => format!("<{micros}µs"),
                1000..1_000_000 => format!("<{}ms", micros.div_ceil(1000)),
                _ => format!("<{}s", micros.div_ceil(1_000_000)),
            };
        }
    }
    "-".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_an_interval_are_of_that_interval() {
        let times = |buckets: &[u64]| Latencies {
            count: buckets.iter().sum(),
            sum_us: 0,
            p50_us: 0,
            p99_us: 0,
            p999_us: 0,
            buckets: buckets.to_vec(),
        };
        let (then, now) = (times(&[100, 0, 0, 0]), times(&[100, 0, 90, 10]));
        let buckets = since(Some(&then), Some(&now));
        assert_eq!(buckets, [0, 0, 90, 10]);
        assert_eq!(
            (quantile(&buckets, 500), quantile(&buckets, 990)),
            ("<4µs".into(), "<8µs".into())
        );
        assert_eq!(quantile(&[0; 4], 500), "-");
        assert_eq!(quantile(&since(None, Some(&now)), 500), "<1µs");
    }
}
