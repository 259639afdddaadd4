//! What readers do: `GET /v1/stats`.
//!
//! Why: `bedplate top` and a person with curl want numbers that are made for reading; a scraper has
//! `/metrics`.
//! How: the counters of each export as they are; who wants rates asks twice.
//! Never: names a client.
//! Start at [`show`].

use std::time::Duration;

use axum::Json;
use axum::extract::State;

use super::error::ApiError;
use super::types_stats::{ImageStats, Latencies, Stats};
use super::{App, Served};
use crate::image::DecodedCache;
use crate::manager::{CopyState, ImageStatus, unix_now_s};
use crate::serve::{Times, Via};

pub(super) async fn show(State(app): State<App>) -> Result<Json<Stats>, ApiError> {
    let images = app.manager.read(crate::manager::World::images).await?;
    let of = |image: &ImageStatus| of_image(image, &(app.served)(&image.record.name));
    let cache = DecodedCache::process_wide();
    Ok(Json(Stats {
        unix_s: unix_now_s(),
        decoded_clusters: cache.decodes(),
        decoded_bytes: cache.held_bytes(),
        images: images.iter().map(of).collect(),
    }))
}

fn of_image(image: &ImageStatus, served: &Served) -> ImageStats {
    let ready = image.copies.iter().any(|copy| copy.state == CopyState::Ready);
    let arriving = image.copies.iter().filter(|copy| copy.state == CopyState::InProgress);
    let latency = |wanted: Via| {
        let times = served.times.iter().find(|(via, _)| *via == wanted);
        times.map(|(_, times)| latencies(times))
    };
    ImageStats {
        name: image.record.name.to_string(),
        ready,
        bytes_done: arriving.clone().map(|copy| copy.progress.bytes_done).max(),
        bytes_total: arriving.filter_map(|copy| copy.progress.bytes_total).max(),
        sessions: served.sessions as u64,
        requests: served.counters.requests,
        bytes: served.counters.bytes,
        errors: served.counters.errors,
        decoded: served.counters.decoded,
        demand_misses: served.waits.misses,
        demand_waited_us: micros(served.waits.waited),
        demand_stalls: served.waits.stalls,
        prefetched_bytes: served.waits.foreseen_bytes,
        nbd: latency(Via::Nbd),
        replica: latency(Via::Replica),
        attach: latency(Via::Attach),
        vm: latency(Via::Vm),
    }
}

fn latencies(times: &Times) -> Latencies {
    let at = |thousandths| times.quantile(thousandths).map_or(0, micros);
    Latencies {
        count: times.count(),
        sum_us: micros(times.sum),
        p50_us: at(500),
        p99_us: at(990),
        p999_us: at(999),
        buckets: times.buckets().map(|(_, count)| count).collect(),
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
