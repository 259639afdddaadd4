//! `/metrics`: Prometheus text.
//!
//! Why: a node's operator sees copies, disks and answers without asking one by one.
//! How: gauges are made of the world at each scrape; only answers are counted as they happen.
//! Never: a label that a stranger chooses, or one that holds a URL.
//! Start at [`scrape`].

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::extract::State;
use axum::http::{Method, StatusCode, header};
use axum::response::IntoResponse;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::App;
use super::error::ApiError;
use super::handlers::blocking;
use crate::image::DecodedCache;
use crate::manager::{DiskStatus, ImageStatus};
use crate::serve::Times;

type Labels = Vec<(&'static str, String)>;

/// Answers by method, route and status.
#[derive(Clone, Debug, Default)]
pub struct HttpCounters(Family<Labels, Counter>);

impl HttpCounters {
    pub(super) fn count(&self, method: &Method, route: Option<&str>, status: StatusCode) {
        let known =
            [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
        let method = if known.contains(method) { method.as_str() } else { "other" };
        let labels = vec![
            ("method", method.to_owned()),
            ("route", route.unwrap_or("none").to_owned()),
            ("status", status.as_u16().to_string()),
        ];
        self.0.get_or_create(&labels).inc();
    }
}

pub(super) async fn scrape(State(app): State<App>) -> Result<impl IntoResponse, ApiError> {
    let backend = app.backend.clone();
    let disks = blocking(move || backend.disks()).await?;
    let (images, attachments) =
        app.manager.read(|world| (world.images(), world.attachments())).await?;
    let mut registry = Registry::with_prefix("bedplate");
    let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "Version of the daemon", version);
    registry.register("http_requests", "Answers on the control socket", app.http.0.clone());

    let count = |len: usize| i64::try_from(len).unwrap_or(i64::MAX);
    let gauge = |registry: &mut Registry, name: &str, help: &str, value: i64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    gauge(&mut registry, "images", "Images known", count(images.len()));
    gauge(&mut registry, "attachments", "Attachments held", count(attachments.len()));
    let help = "Kernel threads (iou-wrk) that now do this process's io_uring calls for it: more \
                than a few during transfers means that direct writes are not asynchronous";
    gauge(&mut registry, "uring_kernel_workers", help, count(kernel_workers()));

    let cache = DecodedCache::process_wide();
    let decodes = Counter::<u64>::default();
    decodes.inc_by(cache.decodes());
    registry.register("decoded_clusters", "Compressed clusters decoded for readers", decodes);
    let help = "Bytes of decoded clusters that are kept for readers";
    let bytes = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    gauge(&mut registry, "decoded_bytes", help, bytes(cache.held_bytes()));
    let help = "Bytes of decoded clusters that may be kept just now";
    gauge(&mut registry, "decoded_capacity_bytes", help, bytes(cache.capacity_bytes()));
    let help =
        "Memory for decoded clusters: those that are kept or in use, and what is free for others";
    gauge(&mut registry, "decoded_memory_bytes", help, bytes(cache.memory_bytes()));

    let overtaken = Counter::<u64>::default();
    overtaken.inc_by(crate::fetch::overtaken());
    let help = "Connections to sources left, as far too little came on them and others were faster; \
                demand_stalls has those that only readers waited for";
    registry.register("overtaken_connections", help, overtaken);

    add_images(&mut registry, &app, &images);
    add_disks(&mut registry, &disks);

    let mut text = String::new();
    encode(&mut text, &registry).map_err(|_| {
        let message = "the metrics can't be written as text";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message, "")
    })?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text))
}

/// Threads of this process that the kernel made for io_uring; 0 where /proc can't be read.
fn kernel_workers() -> usize {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0 };
    let names = tasks.flatten().filter_map(|task| std::fs::read(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with(b"iou-wrk")).count()
}

fn add_images(registry: &mut Registry, app: &App, images: &[ImageStatus]) {
    let [copies, done, retries, sessions, rate, connections] =
        std::array::from_fn(|_| Family::<Labels, Gauge>::default());
    let [requests, bytes, errors, decoded, misses, stalls, ahead] =
        std::array::from_fn(|_| Family::<Labels, Counter>::default());
    let waited = Family::<Labels, Counter<f64, AtomicU64>>::default();
    let mut latencies = Vec::new();
    for image in images {
        let labels = vec![("image", image.record.name.to_string())];
        let served = (app.served)(&image.record.name);
        sessions.get_or_create(&labels).set(i64::try_from(served.sessions).unwrap_or(i64::MAX));
        requests.get_or_create(&labels).inc_by(served.counters.requests);
        bytes.get_or_create(&labels).inc_by(served.counters.bytes);
        errors.get_or_create(&labels).inc_by(served.counters.errors);
        decoded.get_or_create(&labels).inc_by(served.counters.decoded);
        misses.get_or_create(&labels).inc_by(served.waits.misses);
        stalls.get_or_create(&labels).inc_by(served.waits.stalls);
        ahead.get_or_create(&labels).inc_by(served.waits.foreseen_bytes);
        waited.get_or_create(&labels).inc_by(served.waits.waited.as_secs_f64());
        for (via, times) in served.times {
            let labels =
                vec![("image", image.record.name.to_string()), ("via", via.as_str().into())];
            latencies.push((labels, times));
        }
        for copy in &image.copies {
            copies.get_or_create(&vec![("state", copy.state.to_string())]).inc();
            let labels =
                vec![("image", image.record.name.to_string()), ("disk", copy.disk.to_string())];
            let bytes = i64::try_from(copy.progress.bytes_done).unwrap_or(i64::MAX);
            done.get_or_create(&labels).set(bytes);
            retries.get_or_create(&labels).set(i64::from(copy.progress.retries));
            let per_second = i64::try_from(copy.progress.rate_bytes_per_s).unwrap_or(i64::MAX);
            rate.get_or_create(&labels).set(per_second);
            connections.get_or_create(&labels).set(i64::from(copy.progress.connections));
        }
    }
    registry.register("copies", "Copies by state", copies);
    registry.register("copy_bytes", "Bytes of a copy that are here", done);
    registry.register("copy_retries", "Tries of a copy's source after the first", retries);
    registry.register("copy_rate_bytes_per_second", "Bytes of a copy that arrive a second", rate);
    registry.register("copy_connections", "Connections to a copy's source", connections);
    registry.register("sessions", "Sessions and attached readers of an image", sessions);
    registry.register("requests", "Requests of readers answered", requests);
    registry.register("served_bytes", "Bytes of an image sent, holes included", bytes);
    registry.register("request_errors", "Requests answered with an error", errors);
    let help = "Compressed clusters, or parts of one, sent; but for decoded_clusters, from memory";
    registry.register("decoded_reads", help, decoded);
    let help = "Reads of an arriving image that had to wait for what was still to come";
    registry.register("demand_misses", help, misses);
    registry.register("demand_waited_seconds", "How long they waited, together", waited);
    let help =
        "Pieces asked for again on another connection, as nothing came of them, or too little";
    registry.register("demand_stalls", help, stalls);
    registry.register("prefetched_bytes", "Bytes fetched ahead as a trace named them", ahead);
    registry.register_collector(Box::new(Latencies(latencies)));
}

/// Histograms of what was measured elsewhere.
#[derive(Debug)]
struct Latencies(Vec<(Labels, Times)>);

impl Collector for Latencies {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let (name, help) = ("request_seconds", "From a reader's request until it was answered");
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (labels, times) in &self.0 {
            // Each bucket's number here; the encoder adds them up.
            let seconds =
                |top: Option<Duration>| top.map_or(f64::INFINITY, |top| top.as_secs_f64());
            let buckets: Vec<_> =
                times.buckets().map(|(top, count)| (seconds(top), count)).collect();
            metric.encode_family(labels)?.encode_histogram::<Labels>(
                times.sum.as_secs_f64(),
                times.count(),
                &buckets,
                None,
            )?;
        }
        Ok(())
    }
}

fn add_disks(registry: &mut Registry, disks: &[DiskStatus]) {
    let [total, free, reserved, healthy, sink] =
        std::array::from_fn(|_| Family::<Labels, Gauge>::default());
    for disk in disks {
        let labels = vec![("disk", disk.uuid.to_string())];
        let bytes = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        total.get_or_create(&labels).set(bytes(disk.total_bytes));
        free.get_or_create(&labels).set(bytes(disk.free_bytes));
        reserved.get_or_create(&labels).set(bytes(disk.reserved_bytes));
        healthy.get_or_create(&labels).set(i64::from(disk.healthy));
        let labels = vec![("disk", disk.uuid.to_string()), ("sink", disk.sink.clone())];
        sink.get_or_create(&labels).set(1);
    }
    registry.register("disk_total_bytes", "Size of the disk's file system", total);
    registry.register("disk_free_bytes", "Bytes that may still be written", free);
    registry.register("disk_reserved_bytes", "Bytes that transfers have reserved", reserved);
    registry.register("disk_healthy", "1 if copies may be started on the disk", healthy);
    registry.register(
        "disk_sink",
        "1 for the way in which bytes are written: uring, threads, tokio-uring",
        sink,
    );
}
