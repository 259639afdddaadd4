//! A copy out of a mapped file, or into one, that a bad page ends with an error.
//!
//! Why: a system call for each read of data that is in memory costs three times the read itself;
//! but a page that cannot be read (a bad sector, a file cut short) is a SIGBUS to a load.
//! How: one routine of known addresses does all loads from maps. The handler of SIGBUS looks where
//! the fault was: inside the routine it goes on at the routine's error exit, anywhere else whatever
//! handled the signal before handles it. On other processors than x86-64 there is no such copy, and
//! the caller reads with pread.
//! Never: hides a fault of other code, or writes outside the buffer.
//! Start at [`copy`].

/// What became of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// All bytes, from memory.
    Fast,
    /// All bytes, but a part of them, or of what this thread copied shortly before, was read from a disk
    /// by a fault. Who has it so is told of each copy for a while.
    Slow,
    /// A page could not be read; the buffer holds anything. Or there is no guarded copy here.
    Not,
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86_64::{copy, copy_word};

/// No guarded copy on this processor.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn copy(_from: *const u8, _to: *mut u8, _len: usize) -> Copied {
    Copied::Not
}

/// No guarded copy on this processor.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn copy_word(_from: *const u8, _to: *mut u8, _len: usize) -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::global_asm;
    use std::cell::Cell;
    use std::ffi::{c_int, c_void};
    use std::mem::MaybeUninit;
    use std::ptr;
    use std::sync::OnceLock;

    use super::Copied;

    /// Copies of a thread between two looks at its major faults. A look is a system call, and even the
    /// processor's own clock, which cannot be read out of order, would keep one copy from beginning
    /// while another waits for memory: half as fast, where the pages are in memory.
    const COPIES_PER_LOOK: u32 = 64;
    /// After a major fault so many copies are looked at one by one: others of the file have left memory.
    const COPIES_WATCHED: u32 = 4096;

    // Copies rdx bytes from [rsi] to [rdi] and returns 0; after a fault, in a load, the handler
    // goes on at `_fault`, which returns how many bytes are left: at least 1. The same goes for a
    // store, where the target is a map too (a guest's memory). The first routine is for every x86-64;
    // the second has registers of twice the size, and ends in the first; the third stores whole lines
    // of the processor's caches, and ends with 64 bytes of which it copies some once more; the fourth
    // copies 16, 8, 4, 2 or 1 bytes (no other count, of which it copies nothing) in one load and one
    // store.
    global_asm!(
        ".pushsection .text.bedplate_guarded_copy,\"ax\",@progbits",
        ".balign 64",
        ".globl bedplate_guarded_copy",
        ".hidden bedplate_guarded_copy",
        ".type bedplate_guarded_copy,@function",
        "bedplate_guarded_copy:",
        "    cmp rdx, 64",
        "    jb 3f",
        ".balign 16",
        "2:  movups xmm0, [rsi]",
        "    movups xmm1, [rsi + 16]",
        "    movups xmm2, [rsi + 32]",
        "    movups xmm3, [rsi + 48]",
        "    movups [rdi], xmm0",
        "    movups [rdi + 16], xmm1",
        "    movups [rdi + 32], xmm2",
        "    movups [rdi + 48], xmm3",
        "    add rsi, 64",
        "    add rdi, 64",
        "    sub rdx, 64",
        "    cmp rdx, 64",
        "    jae 2b",
        "3:  test rdx, rdx",
        "    jz 5f",
        "4:  mov al, [rsi]",
        "    mov [rdi], al",
        "    inc rsi",
        "    inc rdi",
        "    dec rdx",
        "    jnz 4b",
        "5:  xor eax, eax",
        "    ret",
        ".size bedplate_guarded_copy, . - bedplate_guarded_copy",
        ".balign 64",
        ".globl bedplate_guarded_copy_avx",
        ".hidden bedplate_guarded_copy_avx",
        ".type bedplate_guarded_copy_avx,@function",
        "bedplate_guarded_copy_avx:",
        "    cmp rdx, 128",
        "    jb 3f",
        ".balign 16",
        "2:  vmovups ymm0, [rsi]",
        "    vmovups ymm1, [rsi + 32]",
        "    vmovups ymm2, [rsi + 64]",
        "    vmovups ymm3, [rsi + 96]",
        "    vmovups [rdi], ymm0",
        "    vmovups [rdi + 32], ymm1",
        "    vmovups [rdi + 64], ymm2",
        "    vmovups [rdi + 96], ymm3",
        "    sub rsi, -128",
        "    sub rdi, -128",
        "    add rdx, -128",
        "    cmp rdx, 128",
        "    jae 2b",
        "    vzeroupper",
        // What is left is less than a round.
        "3:  jmp bedplate_guarded_copy",
        ".size bedplate_guarded_copy_avx, . - bedplate_guarded_copy_avx",
        ".balign 64",
        ".globl bedplate_guarded_copy_avx512",
        ".hidden bedplate_guarded_copy_avx512",
        ".type bedplate_guarded_copy_avx512,@function",
        "bedplate_guarded_copy_avx512:",
        "    cmp rdx, 512",
        "    jb bedplate_guarded_copy_avx",
        // Up to a line's beginning at the target; a store over two lines costs two.
        "    vmovups zmm16, [rsi]",
        "    vmovups [rdi], zmm16",
        "    mov rax, rdi",
        "    or rax, -64",
        "    neg rax",
        "    add rsi, rax",
        "    add rdi, rax",
        "    sub rdx, rax",
        ".balign 16",
        "2:  vmovups zmm16, [rsi]",
        "    vmovups zmm17, [rsi + 64]",
        "    vmovups zmm18, [rsi + 128]",
        "    vmovups zmm19, [rsi + 192]",
        "    vmovaps [rdi], zmm16",
        "    vmovaps [rdi + 64], zmm17",
        "    vmovaps [rdi + 128], zmm18",
        "    vmovaps [rdi + 192], zmm19",
        "    add rsi, 256",
        "    add rdi, 256",
        "    sub rdx, 256",
        "    cmp rdx, 256",
        "    jae 2b",
        "    jmp 4f",
        "3:  vmovups zmm16, [rsi]",
        "    vmovaps [rdi], zmm16",
        "    add rsi, 64",
        "    add rdi, 64",
        "    sub rdx, 64",
        "4:  cmp rdx, 64",
        "    ja 3b",
        "    test rdx, rdx",
        "    jz 5f",
        "    vmovups zmm16, [rsi + rdx - 64]",
        "    vmovups [rdi + rdx - 64], zmm16",
        "5:  xor eax, eax",
        "    ret",
        ".size bedplate_guarded_copy_avx512, . - bedplate_guarded_copy_avx512",
        ".balign 64",
        ".globl bedplate_guarded_word",
        ".hidden bedplate_guarded_word",
        ".type bedplate_guarded_word,@function",
        "bedplate_guarded_word:",
        "    cmp rdx, 2",
        "    je 2f",
        "    cmp rdx, 16",
        "    je 6f",
        "    cmp rdx, 8",
        "    je 5f",
        "    cmp rdx, 4",
        "    je 4f",
        "    cmp rdx, 1",
        "    jne bedplate_guarded_copy_fault",
        "    mov al, [rsi]",
        "    mov [rdi], al",
        "    xor eax, eax",
        "    ret",
        "2:  mov ax, [rsi]",
        "    mov [rdi], ax",
        "    xor eax, eax",
        "    ret",
        "4:  mov eax, [rsi]",
        "    mov [rdi], eax",
        "    xor eax, eax",
        "    ret",
        "5:  mov rax, [rsi]",
        "    mov [rdi], rax",
        "    xor eax, eax",
        "    ret",
        "6:  movups xmm0, [rsi]",
        "    movups [rdi], xmm0",
        "    xor eax, eax",
        "    ret",
        ".globl bedplate_guarded_copy_fault",
        ".hidden bedplate_guarded_copy_fault",
        "bedplate_guarded_copy_fault:",
        "    mov rax, rdx",
        "    ret",
        ".size bedplate_guarded_word, . - bedplate_guarded_word",
        ".popsection",
    );

    unsafe extern "C" {
        fn bedplate_guarded_copy(to: *mut u8, from: *const u8, len: usize) -> usize;
        fn bedplate_guarded_copy_avx(to: *mut u8, from: *const u8, len: usize) -> usize;
        fn bedplate_guarded_copy_avx512(to: *mut u8, from: *const u8, len: usize) -> usize;
        fn bedplate_guarded_word(to: *mut u8, from: *const u8, len: usize) -> usize;
        fn bedplate_guarded_copy_fault();
    }

    /// The action for SIGBUS before ours; `None` if the handler could not be installed.
    static BEFORE: OnceLock<Option<libc::sigaction>> = OnceLock::new();

    type Routine = unsafe extern "C" fn(to: *mut u8, from: *const u8, len: usize) -> usize;

    /// The best routine that this processor has.
    fn routine() -> Routine {
        if std::arch::is_x86_feature_detected!("avx512f") {
            bedplate_guarded_copy_avx512
        } else if std::arch::is_x86_feature_detected!("avx") {
            bedplate_guarded_copy_avx
        } else {
            bedplate_guarded_copy
        }
    }

    /// Copies `len` bytes from `from` to `to`.
    ///
    /// # Safety
    /// `from` must be mapped readable and `to` writable, `len` bytes of each, for as long as this
    /// runs; neither may be memory that a Rust reference to anything else covers. What the ranges
    /// hold, and whether their pages can be had, does not matter.
    pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) -> Copied {
        if BEFORE.get_or_init(install).is_none() {
            return Copied::Not;
        }
        let routine = routine();
        // SAFETY: the routine writes `len` bytes at `to` at most, and reads as many at `from`; the
        // caller keeps both mapped. A SIGBUS in it ends it with a count above 0. It uses only
        // registers that a C call may change and this processor has, and no stack.
        let left = unsafe { routine(to, from, len) };
        if left > 0 {
            return Copied::Not;
        }
        WATCH.with(Watch::after_copy)
    }

    /// Copies 1, 2, 4, 8 or 16 bytes with one load and one store; false, if that was no such length
    /// or a page could not be had. Up to 8 bytes at an aligned address nobody sees a half of them.
    ///
    /// # Safety
    /// As for [`copy`].
    pub(crate) unsafe fn copy_word(from: *const u8, to: *mut u8, len: usize) -> bool {
        if BEFORE.get_or_init(install).is_none() {
            return false;
        }
        // SAFETY: as in `copy`: it touches `len` bytes of each range at most.
        unsafe { bedplate_guarded_word(to, from, len) == 0 }
    }

    /// Tells whether the copies of a thread have to wait for a disk.
    struct Watch {
        until_look: Cell<u32>,
        one_by_one: Cell<u32>,
        /// The thread's major faults at the last look.
        faults: Cell<Option<libc::c_long>>,
    }

    thread_local! {
        static WATCH: Watch = const {
            Watch { until_look: Cell::new(0), one_by_one: Cell::new(0), faults: Cell::new(None) }
        };
    }

    impl Watch {
        fn after_copy(&self) -> Copied {
            match self.until_look.get() {
                0 => self.look(),
                more => {
                    self.until_look.set(more - 1);
                    Copied::Fast
                }
            }
        }

        /// Time would not tell: a copy is slow as well that was the first to touch its pages, or that
        /// lost its processor for a while, and readers would go back to pread on a busy node.
        #[cold]
        fn look(&self) -> Copied {
            let faults = major_faults();
            let before = self.faults.replace(faults);
            let read_a_disk = before.is_some() && before != faults;
            let watched = match self.one_by_one.get() {
                _ if read_a_disk => COPIES_WATCHED,
                more => more.saturating_sub(1),
            };
            self.one_by_one.set(watched);
            self.until_look.set(if watched > 0 { 0 } else { COPIES_PER_LOOK - 1 });
            if read_a_disk { Copied::Slow } else { Copied::Fast }
        }
    }

    /// This thread's major faults since it began.
    fn major_faults() -> Option<libc::c_long> {
        let mut usage = MaybeUninit::<libc::rusage>::uninit();
        // SAFETY: RUSAGE_THREAD writes one rusage, of which `usage` has the size and alignment.
        let done = unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
        // SAFETY: where getrusage returns 0, all fields of `usage` were written.
        (done == 0).then(|| unsafe { usage.assume_init() }.ru_majflt)
    }

    fn install() -> Option<libc::sigaction> {
        // SAFETY: sigaction is plain old data, for which all zeroes is a valid value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        // On the thread's alternative stack if it has one: the fault may be that of a full stack.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        let mut before = MaybeUninit::uninit();
        // SAFETY: `action` is complete (an empty mask), the handler is async-signal-safe, and
        // `before` has room for the old action.
        let done = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, before.as_mut_ptr()) };
        // SAFETY: a call that succeeded has filled it in.
        (done == 0).then(|| unsafe { before.assume_init() })
    }

    /// Only loads and stores, so that it is safe at any instruction. All routines, and their error
    /// exit after them, are in one section.
    extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        let begin = bedplate_guarded_copy as *const () as usize;
        let fault = bedplate_guarded_copy_fault as *const () as usize;
        // SAFETY: the kernel gives a handler with SA_SIGINFO the ucontext of the interrupted code.
        let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
        let Some(rip) = usize::try_from(libc::REG_RIP).ok().and_then(|n| registers.get_mut(n))
        else {
            return;
        };
        if usize::try_from(*rip).is_ok_and(|rip| (begin..fault).contains(&rip)) {
            *rip = i64::try_from(fault).unwrap_or(*rip);
            return;
        }
        pass_on(signal, info, context);
    }

    /// To whom had the signal before; the default action is the end of the process, by the same
    /// instruction once more.
    fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        let before = BEFORE.get().and_then(Option::as_ref);
        let handler = before.map_or(libc::SIG_DFL, |action| action.sa_sigaction);
        match (handler, before.is_some_and(|action| action.sa_flags & libc::SA_SIGINFO != 0)) {
            (libc::SIG_DFL | libc::SIG_IGN, _) => {
                // SAFETY: resetting a signal's action is async-signal-safe.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
            }
            (handler, true) => {
                type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
                // SAFETY: an action with SA_SIGINFO, not one of the two constants, holds the
                // address of a function of this type.
                let handler = unsafe {
                    std::mem::transmute::<*const (), Handler>(ptr::with_exposed_provenance(handler))
                };
                handler(signal, info, context);
            }
            (handler, false) => {
                type Handler = extern "C" fn(c_int);
                // SAFETY: an action without SA_SIGINFO, not one of the two constants, holds the
                // address of a function of this other type.
                let handler = unsafe {
                    std::mem::transmute::<*const (), Handler>(ptr::with_exposed_provenance(handler))
                };
                handler(signal);
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use std::fs::File;
        use std::io::Write;

        use super::*;
        use crate::FileMap;
        use crate::units::FileOffset;

        /// Pages of a file that only its disk has.
        fn cold(pages: usize) -> (File, FileMap) {
            let mut file = tempfile::tempfile_in("/var/tmp").unwrap();
            file.write_all(&vec![7; pages * 4096]).unwrap();
            file.sync_all().unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            let map = FileMap::new(&file, pages as u64 * 4096).unwrap();
            (file, map)
        }

        #[test]
        fn copies_that_wait_for_a_disk_are_noticed_soon_and_then_each() {
            const PAGES: usize = 512;
            let (file, map) = cold(PAGES);
            if rustix::fs::fstatfs(&file).unwrap().f_type == 0x0102_1994 {
                return eprintln!("skipped: /var/tmp is in memory");
            }
            let mut buf = [0; 4096];
            let mut copy = |page: usize| {
                let before = major_faults();
                let copied = map.copy_to(&mut buf, FileOffset(page as u64 * 4096));
                (copied == Copied::Slow, major_faults() != before)
            };
            let told: Vec<(bool, bool)> = (0..PAGES).map(&mut copy).collect();
            if !told.iter().any(|&(_, faulted)| faulted) {
                return eprintln!(
                    "skipped: the file system keeps in memory what it was told to drop"
                );
            }
            let first = told.iter().position(|&(slow, _)| slow).unwrap();
            assert!(first <= COPIES_PER_LOOK as usize, "{first}");
            assert!(told[first + 1..].iter().all(|&(slow, faulted)| slow == faulted), "{told:?}");
            assert!((0..PAGES).map(copy).all(|(slow, _)| !slow), "in memory by now");
        }

        #[test]
        fn each_routine_copies_any_length_to_any_place_and_nothing_beside_it() {
            let mut routines: Vec<Routine> = vec![bedplate_guarded_copy];
            if std::arch::is_x86_feature_detected!("avx") {
                routines.push(bedplate_guarded_copy_avx);
            }
            if std::arch::is_x86_feature_detected!("avx512f") {
                routines.push(bedplate_guarded_copy_avx512);
            }
            let bytes: Vec<u8> = (0..5000_u32).map(|n| (n % 251).to_le_bytes()[0]).collect();
            for (n, routine) in routines.into_iter().enumerate() {
                for len in (0..1100).chain([4095, 4096, 4097]) {
                    let at = len * 7 % 97;
                    for before in [1, 16, 37, 64] {
                        let mut buf = vec![0xee; before + len + 64];
                        // SAFETY: `len` bytes follow `at` and `before`, in two vectors.
                        let left = unsafe {
                            routine(buf.as_mut_ptr().add(before), bytes.as_ptr().add(at), len)
                        };
                        assert_eq!(left, 0);
                        let target = &buf[before..before + len];
                        assert_eq!(target, &bytes[at..at + len], "routine {n}, {len} from {at}");
                        let (left, right) = (&buf[..before], &buf[before + len..]);
                        assert!(left.iter().chain(right).all(|&byte| byte == 0xee));
                    }
                }
            }
        }
    }
}
