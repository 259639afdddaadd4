//! Is this host fit, and if not, what to do.
//!
//! Why: most trouble is known before it happens: no space, no O_DIRECT, no io_uring.
//! How: each check looks at one thing and says what it found; nothing is changed but a file of no
//! name for a moment.
//! Never: fails as a whole: a check that can't look says so.
//! Start at [`of_host`].

use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use super::{CATALOG, state_dir};
use crate::control::types::{Check, Level};
use crate::manager::DiskStatus;
use crate::ring;
use crate::units::{GIB, human_bytes};

/// Less room than this on a disk is worth a word.
const LITTLE_ROOM_BYTES: u64 = 5 * GIB;

fn check(name: impl Into<String>, level: Level, message: impl Into<String>, hint: &str) -> Check {
    Check { name: name.into(), level, message: message.into(), hint: hint.to_owned() }
}

/// The checks that need no daemon, for a daemon that would use these disks.
#[must_use]
pub fn of_host(disks: &[impl AsRef<Path>]) -> Vec<Check> {
    let mut all = vec![kernel()];
    for disk in disks {
        all.extend(disk_checks(disk.as_ref()));
    }
    if let Some(first) = disks.first() {
        all.push(catalog_file(first.as_ref()));
    }
    all
}

/// The checks as a running daemon makes them: it holds the catalog itself.
pub(super) fn of_running_daemon(first: &Path, disks: &[DiskStatus]) -> Vec<Check> {
    let mut all = vec![kernel()];
    for disk in disks {
        if disk.healthy {
            all.extend(disk_checks(&disk.path));
            continue;
        }
        let name = format!("disk {}: {}", disk.path.display(), disk.uuid);
        let hint = "its copies are not served meanwhile; `bedplate disks` shows it";
        all.push(check(name, Level::Fail, disk.message.as_str(), hint));
    }
    all.push(catalog_file(first));
    all.push(check("daemon", Level::Ok, "answers on its control socket", ""));
    all
}

fn kernel() -> Check {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut parts = release.split(['.', '-']).map(|p| p.parse::<u32>().unwrap_or(0));
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if version < (5, 6) {
        let hint = "use Linux 5.6 or later: files are opened with openat2, written with io_uring";
        return check("kernel", Level::Warn, format!("Linux {release}"), hint);
    }
    check("kernel", Level::Ok, format!("Linux {release}"), "")
}

fn disk_checks(disk: &Path) -> Vec<Check> {
    let name = |what: &str| format!("disk {}: {what}", disk.display());
    if !disk.is_dir() {
        let hint = "mount it or make it; `bedplate run` makes its own";
        return vec![check(name("directory"), Level::Fail, "is not a directory", hint)];
    }
    let mut all = vec![writable(disk, name("writable")), room(disk, name("room"))];
    all.push(direct(disk, name("O_DIRECT")));
    all.push(match ring::probe(disk, ring::Choice::Auto) {
        Ok(ring::Probe { kind: ring::SinkKind::Uring | ring::SinkKind::TokioUring, .. }) => {
            check(name("io_uring"), Level::Ok, "works", "")
        }
        Ok(ring::Probe { reason, .. }) => {
            let reason = reason.unwrap_or_else(|| "threads were asked for".to_owned());
            let hint = "nothing is wrong: files are written on threads, nearly as fast; \
                        to allow io_uring see kernel.io_uring_disabled and the seccomp profile";
            check(name("io_uring"), Level::Warn, format!("not usable: {reason}"), hint)
        }
        Err(reason) => check(name("io_uring"), Level::Warn, reason, ""),
    });
    all
}

/// A file without a name in `disk`, gone when closed.
fn unnamed(disk: &Path, extra: OFlags) -> std::io::Result<std::fs::File> {
    let flags = (OFlags::TMPFILE | extra).bits().cast_signed();
    std::fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open(disk)
}

fn writable(disk: &Path, name: String) -> Check {
    let written = unnamed(disk, OFlags::empty())
        .and_then(|mut file| std::io::Write::write_all(&mut file, &[1; 4096]));
    match written {
        Ok(()) => check(name, Level::Ok, "yes", ""),
        Err(error) => {
            let hint = "make it writable for this user; see `ls -ld` and `findmnt -T`";
            check(name, Level::Fail, format!("no: {error}"), hint)
        }
    }
}

fn direct(disk: &Path, name: String) -> Check {
    match unnamed(disk, OFlags::DIRECT) {
        Ok(_) => check(name, Level::Ok, "works", ""),
        Err(error) => {
            let hint = "nothing is wrong: writes go through the page cache";
            check(name, Level::Warn, format!("not on this file system: {error}"), hint)
        }
    }
}

fn room(disk: &Path, name: String) -> Check {
    match rustix::fs::statvfs(disk) {
        Err(error) => check(name, Level::Fail, format!("cannot tell: {error}"), ""),
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let total = stat.f_blocks.saturating_mul(stat.f_frsize);
            let text = format!("{} free of {}", human_bytes(free), human_bytes(total));
            if free < LITTLE_ROOM_BYTES {
                return check(name, Level::Warn, text, "free space, or delete an image");
            }
            check(name, Level::Ok, text, "")
        }
    }
}

fn catalog_file(first: &Path) -> Check {
    let path = state_dir(first).join(CATALOG);
    let text = path.display();
    match std::fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            check("catalog", Level::Ok, format!("{text}: not there yet"), "")
        }
        Err(error) => check("catalog", Level::Fail, format!("{text}: {error}"), ""),
        Ok(meta) if !meta.is_file() => {
            check("catalog", Level::Fail, format!("{text}: not a file"), "move it away")
        }
        Ok(meta) => check("catalog", Level::Ok, format!("{text}: {}", human_bytes(meta.len())), ""),
    }
}
