//! The functions of `bedplate_replica.h`.
//!
//! Why: replica engines are written in Go, C and C++.
//! How: each function checks its pointers, does what the Rust function of that name does, and turns
//! an error into a negative errno, with its text where there is room for one. No panic crosses it.
//! Never: keeps a pointer that it was given, or frees one that it didn't make.
//! Start at [`bedplate_replica_attach`].

use std::ffi::{CStr, OsStr, c_char, c_int};
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use rustix::io::Errno;

use crate::{ExtentKind, Mode, Options, Replica, ReplicaError};

/// `struct bedplate_extent` of the header.
#[derive(Debug)]
#[repr(C)]
pub struct CExtent {
    at: u64,
    len_bytes: u64,
    kind: u32,
    later: u32,
}

/// Copies `text` and a NUL into `room`, as far as they fit.
///
/// # Safety
/// `to` is null, or has room for `room` bytes.
unsafe fn put_text(text: &str, to: *mut c_char, room: usize) {
    if to.is_null() || room == 0 {
        return;
    }
    let len = text.len().min(room - 1);
    // SAFETY: `len` bytes and the NUL fit into what the caller says is there.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, len);
        to.add(len).write(0);
    }
}

fn text_of(error: &ReplicaError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// The result, or the negative errno of an error or a panic.
fn guarded(work: impl FnOnce() -> Result<(), c_int>) -> c_int {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => 0,
        Ok(Err(errno)) => -errno,
        Err(_panic) => -Errno::NOTRECOVERABLE.raw_os_error(),
    }
}

const INVALID: c_int = Errno::INVAL.raw_os_error();

/// See the header.
///
/// # Safety
/// `socket` and `image` are null or C strings; `out` is null or may be written; `message` is null or
/// has room for `message_bytes`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bedplate_replica_attach(
    socket: *const c_char,
    image: *const c_char,
    flags: u32,
    patience_ms: u32,
    out: *mut *mut Replica,
    message: *mut c_char,
    message_bytes: usize,
) -> c_int {
    guarded(|| {
        if socket.is_null() || image.is_null() || out.is_null() || flags > 1 {
            return Err(INVALID);
        }
        // SAFETY: both are C strings, as the caller says.
        let (socket, image) = unsafe { (CStr::from_ptr(socket), CStr::from_ptr(image)) };
        let image = image.to_str().map_err(|_| INVALID)?;
        let mut options = Options::default();
        if flags & 1 != 0 {
            options.mode = Mode::Mapped;
        }
        if patience_ms > 0 {
            options.patience = Duration::from_millis(patience_ms.into());
        }
        match Replica::attach(OsStr::from_bytes(socket.to_bytes()), image, options) {
            Ok(replica) => {
                // SAFETY: the caller's place for one pointer.
                unsafe { out.write(Box::into_raw(Box::new(replica))) };
                Ok(())
            }
            Err(error) => {
                // SAFETY: the caller's room for a text.
                unsafe { put_text(&text_of(&error), message, message_bytes) };
                Err(error.errno())
            }
        }
    })
}

/// See the header.
///
/// # Safety
/// `replica` is null or from [`bedplate_replica_attach`], and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bedplate_replica_size(replica: *const Replica) -> u64 {
    // SAFETY: null, or what attach has made.
    unsafe { replica.as_ref() }.map_or(0, Replica::size_bytes)
}

/// See the header.
///
/// # Safety
/// As [`bedplate_replica_size`]; `text` is null or has room for `text_bytes`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bedplate_replica_identity(
    replica: *const Replica,
    text: *mut c_char,
    text_bytes: usize,
) -> c_int {
    guarded(|| {
        // SAFETY: null, or one that attach has made.
        let replica = unsafe { replica.as_ref() }.ok_or(INVALID)?;
        // SAFETY: room for `text_bytes`, the caller says.
        unsafe { put_text(&replica.identity(), text, text_bytes) };
        Ok(())
    })
}

/// See the header.
///
/// # Safety
/// As [`bedplate_replica_size`]; `buf` has room for `len` bytes that nobody else touches meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bedplate_replica_read_at(
    replica: *const Replica,
    buf: *mut u8,
    len: usize,
    at: u64,
) -> c_int {
    guarded(|| {
        if buf.is_null() || isize::try_from(len).is_err() {
            return if len == 0 { Ok(()) } else { Err(INVALID) };
        }
        // SAFETY: null, or a replica that attach has made and nobody has freed.
        let replica = unsafe { replica.as_ref() }.ok_or(INVALID)?;
        // SAFETY: the caller lends `len` bytes. They may not be initialised; they are only written.
        let buf = unsafe { std::slice::from_raw_parts_mut(buf, len) };
        replica.read_at(buf, at).map_err(|error| error.errno())
    })
}

/// See the header.
///
/// # Safety
/// As [`bedplate_replica_size`]; `out` is null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bedplate_replica_extent_at(
    replica: *const Replica,
    at: u64,
    limit_bytes: u64,
    out: *mut CExtent,
) -> c_int {
    guarded(|| {
        // SAFETY: null, or a replica from attach, not freed.
        let replica = unsafe { replica.as_ref() }.filter(|_| !out.is_null()).ok_or(INVALID)?;
        let limit_bytes = limit_bytes.min(replica.size_bytes().saturating_sub(at));
        let extents = replica.extents(at, limit_bytes).map_err(|error| error.errno())?;
        let extent = extents.into_iter().next().ok_or(INVALID)?.map_err(|error| error.errno())?;
        let kind = match extent.kind {
            ExtentKind::Data => 1,
            ExtentKind::Zero => 2,
            ExtentKind::Encoded => 3,
            ExtentKind::Absent => 4,
        };
        // SAFETY: the caller's place for one extent.
        unsafe { out.write(CExtent { at, len_bytes: extent.len_bytes, kind, later: 0 }) };
        Ok(())
    })
}

/// See the header.
///
/// # Safety
/// As [`bedplate_replica_size`]; nobody uses it any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bedplate_replica_free(replica: *mut Replica) {
    if !replica.is_null() {
        // SAFETY: from `Box::into_raw`, and given back once.
        drop(unsafe { Box::from_raw(replica) });
    }
}
