//! Where sockets are, when nobody says.
//!
//! Why: a daemon and its CLI must find each other without being told, and a Unix socket's path has
//! room for 107 bytes only.
//! How: in the first disk's `bedplate` directory; if that is too long, in a private directory
//! named after the disk's path, which both sides compute alike.
//! Never: uses a directory that others can write to.
//! Start at [`default_socket`].

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::DaemonError;

/// Longest path of a Unix socket in bytes: `sun_path` without its NUL.
pub const SUN_PATH_MAX: usize = 107;

/// The daemon's own directory on its first disk.
#[must_use]
pub fn state_dir(disk: &Path) -> PathBuf {
    disk.join("bedplate")
}

/// Where a daemon whose first disk is `disk` has its socket `name`.
#[must_use]
pub fn default_socket(disk: &Path, name: &str) -> PathBuf {
    let path = state_dir(disk).join(name);
    if path.as_os_str().len() <= SUN_PATH_MAX {
        return path;
    }
    private_socket_dir(disk).join(name)
}

/// The short, private directory for the sockets of a disk with a long path.
#[must_use]
pub fn private_socket_dir(disk: &Path) -> PathBuf {
    let hash = xxhash_rust::xxh3::xxh3_64(disk.as_os_str().as_bytes());
    let uid = rustix::process::geteuid().as_raw();
    let base = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let base = base.filter(|b| b.is_absolute() && b.as_os_str().len() <= 60 && b.is_dir());
    let base = base.unwrap_or_else(|| PathBuf::from(if uid == 0 { "/run" } else { "/tmp" }));
    base.join(format!("bedplate-{uid}-{hash:016x}"))
}

/// Makes `path` with mode 0700, or makes sure that it is such a directory of ours.
pub(super) fn make_private_dir(path: &Path) -> Result<(), DaemonError> {
    let wrap = |source| DaemonError::Directory { path: path.to_owned(), source };
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(wrap(error)),
    }
    let meta = std::fs::symlink_metadata(path).map_err(wrap)?;
    let refuse = |fault| Err(DaemonError::SocketDirectory { path: path.to_owned(), fault });
    if !meta.is_dir() {
        return refuse("is no directory");
    }
    if meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o077 != 0 {
        return refuse("is not ours alone");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_disk_path_still_gives_a_socket_that_fits() {
        let disk = PathBuf::from(format!("/{}", "d".repeat(100)));
        let path = default_socket(&disk, "control.sock");
        assert!(path.as_os_str().len() <= SUN_PATH_MAX, "{}", path.display());
        assert_eq!(path, default_socket(&disk, "control.sock"));
        assert_ne!(path.parent(), default_socket(&disk.join("e"), "control.sock").parent());
    }

    #[test]
    fn a_socket_directory_that_others_can_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        make_private_dir(&path).unwrap();
        make_private_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o770)).unwrap();
        assert!(matches!(make_private_dir(&path), Err(DaemonError::SocketDirectory { .. })));
        let link = dir.path().join("l");
        std::os::unix::fs::symlink("/tmp", &link).unwrap();
        assert!(matches!(make_private_dir(&link), Err(DaemonError::SocketDirectory { .. })));
    }
}
