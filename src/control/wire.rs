//! The manager's facts as wire types.
//!
//! Why: here, and only here, a record becomes an answer; so here credentials stay out.
//! Never: puts a whole URL into an answer.
//! Start at [`image`].

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;

use super::Sockets;
use super::settings::Settings;
use super::types::{Attach, Attachment, Copy, Digests, Event, Image, Nbd, Vm, Wait};
use super::types_disk::Disk;
use super::types_health::{Node, Scrub};
use super::types_trace::Prefetch;
use crate::image::Trace;
use crate::manager::Facts;
use crate::manager::{
    AttachmentState, AttachmentStatus, Change, CopyState, CopyStatus, DiskView, ImageStatus,
};
use crate::names::{ImageName, Tag};

/// An image for the wire.
pub(crate) fn image(status: &ImageStatus, sockets: &Sockets) -> Image {
    let record = &status.record;
    let facts = record.facts.as_ref();
    let sealed: Vec<u64> =
        status.copies.iter().filter_map(|c| c.info.as_ref()).map(|i| i.stored_bytes).collect();
    Image {
        name: record.name.to_string(),
        uuid: record.uuid.to_string(),
        source: record.source.as_ref().map(ToString::to_string),
        mirrors: record.mirrors.iter().map(ToString::to_string).collect(),
        upload_bytes: record.upload_bytes,
        clone_of: record.clone_of.as_ref().map(|of| of.image.to_string()),
        access: record.access.kinds().into_iter().map(str::to_owned).collect(),
        layout: record.layout.to_string(),
        base: record.base.as_ref().map(ToString::to_string),
        data_file: record.data_file.as_ref().map(ToString::to_string),
        snapshot: record.snapshot.clone(),
        min_copies: record.min_copies.max(1),
        disk_selector: tags(&record.selectors.disk),
        node_selector: tags(&record.selectors.node),
        paused: record.steering.paused,
        priority: record.steering.priority,
        rate_limit_bytes_per_s: record.steering.rate_bytes_per_s.unwrap_or(0),
        expected: (&record.expected.digests).into(),
        checksum_url: record.expected.checksum_url.as_ref().map(ToString::to_string),
        format: facts.map(|f| f.format).or(record.declared_format).map(|f| f.to_string()),
        virtual_size_bytes: facts.map(Facts::guest_size_bytes),
        size_bytes: facts.map(|f| f.size_bytes),
        stored_bytes: (!sealed.is_empty()).then(|| sealed.iter().sum()),
        digests: facts.map_or_else(Digests::default, |f| (&f.digests).into()),
        prefetch: record.prefetch.as_deref().map(prefetch),
        copies: status.copies.iter().map(copy).collect(),
        attachments: status.attachments as u64,
        deleting: record.deleting,
        nbd: status.exported.then(|| nbd(&record.name, &sockets.nbd)),
        created_at: rfc3339(record.created_unix_s),
    }
}

fn prefetch(trace: &Trace) -> Prefetch {
    let size_bytes = trace.size_bytes().unwrap_or(u64::MAX);
    Prefetch { ranges: trace.len() as u64, bytes: trace.bytes(size_bytes) }
}

fn copy(status: &CopyStatus) -> Copy {
    let progress = &status.progress;
    let busy = matches!(status.state, CopyState::Starting | CopyState::InProgress);
    Copy {
        disk: status.disk.to_string(),
        worker: status.worker.clone(),
        state: status.state.to_string(),
        phase: busy.then(|| progress.phase.as_str().to_owned()),
        bytes_done: progress.bytes_done,
        bytes_total: progress.bytes_total,
        rate_bytes_per_s: progress.rate_bytes_per_s,
        eta_s: progress.left_s.filter(|_| busy),
        stored_bytes: status.info.as_ref().map(|i| i.stored_bytes),
        connections: progress.connections,
        retries: progress.retries,
        overtaken: progress.overtaken,
        refused: status.refused,
        message: status.message.clone(),
        unused_since: status.unused_since_unix_s.map(rfc3339),
        scrubbing: status.scrubbing,
        scrubbed_bytes: status.scrubbed_bytes,
        scrub: status.scrub.as_ref().map(|scrub| Scrub {
            at: rfc3339(scrub.at_unix_s),
            result: scrub.result.as_str().to_owned(),
            repaired_bytes: scrub.repaired_bytes,
            bad_bytes: scrub.bad_bytes,
            message: scrub.message.clone(),
        }),
    }
}

/// An attachment for the wire.
pub(crate) fn attachment(status: &AttachmentStatus, sockets: &Sockets) -> Attachment {
    let record = &status.record;
    let ready = status.state == AttachmentState::Ready;
    Attachment {
        id: record.id.to_string(),
        image: record.image.to_string(),
        disk: record.disk.to_string(),
        reader: record.reader.clone(),
        wait: if record.stream { Wait::Stream } else { Wait::Ready },
        state: status.state.as_str().to_owned(),
        message: status.message.clone(),
        nbd: ready.then(|| nbd(&record.image, &sockets.nbd)),
        attach: ready.then(|| attach(&record.image, &sockets.replica)),
        vm: (ready && record.vm)
            .then(|| Vm { socket: sockets.vm(&record.id).display().to_string() }),
        created_at: rfc3339(record.created_unix_s),
    }
}

/// A disk for the wire.
pub(crate) fn disk(view: &DiskView) -> Disk {
    let status = &view.status;
    Disk {
        uuid: status.uuid.to_string(),
        path: status.path.display().to_string(),
        total_bytes: status.total_bytes,
        free_bytes: status.free_bytes,
        reserved_bytes: status.reserved_bytes,
        sink: status.sink.clone(),
        healthy: status.healthy,
        schedulable: view.schedulable,
        evicting: view.evicting,
        tags: view.tags.iter().map(ToString::to_string).collect(),
        copies: view.copies as u64,
        message: status.message.clone(),
    }
}

fn tags(tags: &BTreeSet<Tag>) -> Vec<String> {
    tags.iter().map(ToString::to_string).collect()
}

/// A change for the wire.
pub(crate) fn event(told: &crate::manager::Told, sockets: &Sockets) -> Event {
    use crate::manager::Object;
    let kind = match told.change {
        Change::ImageCreated(_) => "image.created",
        Change::ImageUpdated(_) => "image.updated",
        Change::ImageProgress(_) => "image.progress",
        Change::ImageDeleted(_) => "image.deleted",
        Change::AttachmentCreated(_) => "attachment.created",
        Change::AttachmentUpdated(_) => "attachment.updated",
        Change::AttachmentDeleted(..) => "attachment.deleted",
        Change::VolumeCreated(_) => "volume.created",
        Change::VolumeUpdated(_) => "volume.updated",
        Change::VolumeDeleted(..) => "volume.deleted",
        Change::Warning(..) => "image.warning",
        Change::NodeUpdated => "node.updated",
        Change::DiskUpdated(_) => "disk.updated",
        Change::DiskRemoved(_) => "disk.removed",
        Change::SettingsUpdated => "settings.updated",
    };
    let object = match &told.object {
        Object::Image(status) => serde_json::json!(image(status, sockets)),
        Object::ImageGone(name) => serde_json::json!({ "name": name }),
        Object::Attachment(status) => serde_json::json!(attachment(status, sockets)),
        Object::AttachmentGone(id, name) => serde_json::json!({ "id": id, "image": name }),
        Object::Volume(status) => serde_json::json!(super::wire_volume::volume(status, sockets)),
        Object::VolumeGone(name, image) => serde_json::json!({ "name": name, "image": image }),
        Object::Warning(name, message) => serde_json::json!({ "name": name, "message": message }),
        Object::Disk(view) => serde_json::json!(disk(view)),
        Object::DiskGone(uuid) => serde_json::json!({ "uuid": uuid }),
        Object::Node(failed) => serde_json::json!(Node::new(*failed)),
        Object::Settings(settings) => serde_json::json!(Settings::from(&**settings)),
    };
    Event { id: told.id, kind: kind.to_owned(), at: Some(rfc3339(told.at_unix_s)), object }
}

pub(super) fn attach(image: &ImageName, socket: &Path) -> Attach {
    Attach { socket: socket.display().to_string(), image: image.to_string() }
}

pub(super) fn nbd(name: &ImageName, socket: &Path) -> Nbd {
    Nbd {
        socket: socket.display().to_string(),
        export: name.to_string(),
        uri: nbd_uri(name.as_str(), socket),
    }
}

/// The URI of an export on a Unix socket: `nbd+unix:///NAME?socket=PATH`, escaped (NBD URI spec).
#[must_use]
pub fn nbd_uri(export: &str, socket: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let (export, socket) = (escape(export.as_bytes()), escape(socket.as_os_str().as_bytes()));
    format!("nbd+unix:///{export}?socket={socket}")
}

/// The URI of an export at an address of a network: `nbds://ADDRESS:PORT/NAME`, or `nbd://` without
/// TLS. Where a server listens at all addresses of its host, the URI has the host's name.
#[must_use]
pub fn nbd_tcp_uri(export: &str, address: SocketAddr, encrypted: bool) -> String {
    let scheme = if encrypted { "nbds" } else { "nbd" };
    let host = if address.ip().is_unspecified() {
        rustix::system::uname().nodename().to_string_lossy().into_owned()
    } else {
        // With brackets around IPv6.
        let without_port = address.to_string();
        without_port.rsplit_once(':').map(|(host, _)| host.to_owned()).unwrap_or_default()
    };
    let port = address.port();
    format!("{scheme}://{host}:{port}/{}", escape(export.as_bytes()))
}

/// RFC 3986: everything but unreserved characters and `/` as `%XX`.
pub(crate) fn escape(bytes: &[u8]) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    let escaped = |&byte: &u8| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    bytes.iter().map(escaped).collect()
}

/// Seconds since 1970 as RFC 3339 in UTC: `2026-01-31T23:59:59Z`.
#[must_use]
pub fn rfc3339(unix_s: u64) -> String {
    let (days, rest) = (unix_s / 86_400, unix_s % 86_400);
    // Civil date from days since 1970-03-01 shifted to 0000-03-01 (Howard Hinnant's algorithm).
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339() {
        // From `date -u -d @N +%FT%TZ`.
        for (unix_s, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_409_925, "2026-11-23T04:58:45Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(unix_s), text);
        }
    }

    #[test]
    fn an_nbd_uri_of_a_network_has_a_host_and_a_port() {
        let uri = |at: &str, encrypted| nbd_tcp_uri("a b", at.parse().unwrap(), encrypted);
        assert_eq!(uri("10.0.0.1:10809", true), "nbds://10.0.0.1:10809/a%20b");
        assert_eq!(uri("[2001:db8::1]:7", false), "nbd://[2001:db8::1]:7/a%20b");
        let any = uri("[::]:10809", true);
        assert!(any.starts_with("nbds://") && !any.contains("::]"), "{any}");
    }

    #[test]
    fn an_nbd_uri_is_escaped() {
        assert_eq!(
            nbd_uri("debian-12", Path::new("/run/a b&c/n.sock")),
            "nbd+unix:///debian-12?socket=/run/a%20b%26c/n.sock"
        );
    }
}
