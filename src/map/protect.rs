//! A second descriptor of a file that nobody can make writable, root included.
//!
//! Why: whoever is given an O_RDONLY descriptor can open the same file again for writing, through
//! `/proc/self/fd`, if its mode or root's privilege lets them; one bad reader would change the disk
//! of all.
//! How: the file is opened through a mount of its own that is read-only, and is in no directory
//! tree: opening it again goes through the same mount, and ends with EROFS.
//! Never: follows a name: the mount is made of the open file.
//! Start at [`read_only`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::mount::OpenTreeFlags;

const MOUNT_ATTR_RDONLY: u64 = 1;
const MOUNT_ATTR_NOSUID: u64 = 2;
const MOUNT_ATTR_NODEV: u64 = 4;
const MOUNT_ATTR_NOEXEC: u64 = 8;

/// A descriptor of the file that `file` is, for reads only, whatever its receiver may do.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN; ENOSYS before Linux 5.12; EINVAL where the file's mount cannot be
/// cloned.
pub fn read_only(file: &File) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(rustix::fs::CWD, path.as_str(), flags)?;
    let attributes = libc::mount_attr {
        attr_set: MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty string with its NUL, the attributes are complete, and their size
    // is given; the call changes only the mount just made.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            AtFlags::EMPTY_PATH.bits(),
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let path = format!("/proc/self/fd/{}", tree.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn root_cannot_open_it_again_for_writing() {
        let mut temp = tempfile::NamedTempFile::new().unwrap();
        temp.write_all(b"base").unwrap();
        let file = File::open(temp.path()).unwrap();
        let protected = match read_only(&file) {
            Ok(protected) => protected,
            Err(error) if !rustix::process::geteuid().is_root() => {
                return eprintln!("skipped: needs root: {error}");
            }
            Err(error) => panic!("{error}"),
        };
        let open = |file: &File| {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            File::options().read(true).write(true).open(path)
        };
        assert!(open(&file).is_ok(), "what the mount is there for");
        let error = open(&protected).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{error}");
        assert!(protected.set_len(0).is_err());
        let again = File::open(format!("/proc/self/fd/{}", protected.as_raw_fd())).unwrap();
        let mut text = String::new();
        (&again).read_to_string(&mut text).unwrap();
        assert_eq!(text, "base");
        let inode = |file: &File| file.metadata().unwrap().ino();
        assert_eq!(inode(&protected), inode(&file));
    }
}
