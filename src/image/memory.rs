//! How much memory this process may have, and how much of it is to be had now.
//!
//! Why: a cache that takes what nobody needs must know what that is, in a container too.
//! How: MemTotal and MemAvailable of the machine, and the limits of this process's control groups, up
//! to the root: what may be used there, less what is used and could not be dropped at once. The
//! smallest counts. Both versions of control groups, where they are mounted by custom.
//! Never: fails for a file that is not there or does not read: it limits nothing then.
//! Start at [`Memory::of_system`].

use std::path::{Component, Path};

/// Memory in bytes, of the machine or of what a control group leaves of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// All that there is.
    pub total_bytes: u64,
    /// What could be taken now without anything being swapped out.
    pub available_bytes: u64,
}

/// The names that a version of control groups has for the same things.
struct Names {
    limits: &'static [&'static str],
    used: &'static str,
    /// Line of `memory.stat`: files' pages that have not been read again.
    droppable: &'static str,
}

/// Version 1 has a number for no limit, somewhat below 2^63; no machine has this much.
const NO_LIMIT: u64 = 1 << 62;

const V2: Names = Names {
    // Above `memory.high` a process is slowed down.
    limits: &["memory.max", "memory.high"],
    used: "memory.current",
    droppable: "inactive_file",
};
const V1: Names = Names {
    limits: &["memory.limit_in_bytes"],
    used: "memory.usage_in_bytes",
    droppable: "total_inactive_file",
};

impl Memory {
    /// As it is now; `None` without a `/proc/meminfo` that reads.
    #[must_use]
    pub fn of_system() -> Option<Self> {
        Self::of(Path::new("/proc"), Path::new("/sys/fs/cgroup"))
    }

    fn of(proc: &Path, groups: &Path) -> Option<Self> {
        let info = std::fs::read_to_string(proc.join("meminfo")).ok()?;
        let mut memory = Self {
            total_bytes: field(&info, "MemTotal:")?.checked_mul(1024)?,
            available_bytes: field(&info, "MemAvailable:")?.checked_mul(1024)?,
        };
        let own = std::fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
        for line in own.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(kinds), Some(path)) = (parts.next(), parts.next()) else { continue };
            match kinds {
                "" => {
                    memory.limit(groups, path, &V2);
                    memory.limit(&groups.join("unified"), path, &V2);
                }
                kinds if kinds.split(',').any(|kind| kind == "memory") => {
                    memory.limit(&groups.join("memory"), path, &V1);
                }
                _others => {}
            }
        }
        Some(memory)
    }

    /// Takes the limits of the group at `path` below `root` into account, and of all above it.
    fn limit(&mut self, root: &Path, path: &str, names: &Names) {
        // A path that leads out of what is mounted here, or that is not here, is one of another
        // namespace: what is left is the root, which is the container's group then.
        let path = Path::new(path.trim_start_matches('/'));
        let is_plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        let own = if is_plain { root.join(path) } else { root.to_owned() };
        for group in own.ancestors().take_while(|group| group.starts_with(root)) {
            self.limit_by(group, names);
        }
    }

    fn limit_by(&mut self, group: &Path, names: &Names) {
        let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        // "max" is no number.
        let limit = names.limits.iter().filter_map(|name| number(name)).min();
        let Some(limit) = limit.filter(|&limit| limit < NO_LIMIT) else { return };
        self.total_bytes = self.total_bytes.min(limit);
        let droppable = read("memory.stat").and_then(|stat| field(&stat, names.droppable));
        let used = number(names.used).unwrap_or(0).saturating_sub(droppable.unwrap_or(0));
        self.available_bytes = self.available_bytes.min(limit.saturating_sub(used));
    }
}

/// The number after `name` at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next()? == name).then(|| words.next()?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    const MIB: u64 = 1 << 20;

    /// A `/proc` and a `/sys/fs/cgroup` of these files.
    fn measured(cgroup: &str, files: &[(&str, &str)]) -> Option<Memory> {
        let dir = tempfile::tempdir().unwrap();
        let (proc, groups) = (dir.path().join("proc"), dir.path().join("groups"));
        let write = |path: PathBuf, text: &str| {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let info = "MemTotal:        4194304 kB\nMemFree:   1 kB\nMemAvailable:    2097152 kB\n";
        write(proc.join("meminfo"), info);
        write(proc.join("self/cgroup"), cgroup);
        files.iter().for_each(|(name, text)| write(groups.join(name), text));
        Memory::of(&proc, &groups)
    }

    fn memory(total_mib: u64, available_mib: u64) -> Option<Memory> {
        Some(Memory { total_bytes: total_mib * MIB, available_bytes: available_mib * MIB })
    }

    #[test]
    fn without_a_limit_it_is_the_machines() {
        assert_eq!(measured("", &[]), memory(4096, 2048));
        let none = [("a/memory.max", "max\n"), ("a/memory.current", "5\n")];
        assert_eq!(measured("0::/a\n", &none), memory(4096, 2048));
    }

    #[test]
    fn the_narrowest_group_of_the_chain_counts() {
        let stat = format!("anon 5\ninactive_file {}\nactive_file 7\n", 100 * MIB);
        let mib = |count: u64| format!("{}\n", count * MIB);
        let (a, b, used) = (mib(2000), mib(3000), mib(1500));
        let files = [
            ("a/memory.max", a.as_str()),
            ("a/memory.current", used.as_str()),
            ("a/memory.stat", stat.as_str()),
            ("a/b/memory.max", b.as_str()),
            ("a/b/memory.current", used.as_str()),
        ];
        assert_eq!(measured("0::/a/b\n", &files), memory(2000, 600));
        // A group with more room than its own parent.
        let crowded = mib(2990);
        let files = [
            ("a/memory.max", b.as_str()),
            ("a/memory.current", crowded.as_str()),
            ("a/b/memory.max", a.as_str()),
            ("a/b/memory.current", "0\n"),
        ];
        assert_eq!(measured("0::/a/b\n", &files), memory(2000, 10));
        // Another namespace's path: the root is all that is known.
        let root = [("memory.max", a.as_str()), ("memory.current", used.as_str())];
        assert_eq!(measured("0::/elsewhere\n", &root), memory(2000, 500));
        assert_eq!(measured("0::/../b\n", &root), memory(2000, 500));
        let high = [("a/memory.high", a.as_str()), ("a/memory.max", "max")];
        assert_eq!(measured("0::/a\n", &high), memory(2000, 2000));
    }

    #[test]
    fn version_1_has_other_names_for_it() {
        let stat = format!("inactive_file 3\ntotal_inactive_file {}\n", 50 * MIB);
        let (limit, used) = (format!("{}\n", 1000 * MIB), format!("{}\n", 950 * MIB));
        let files = [
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/a/memory.limit_in_bytes", limit.as_str()),
            ("memory/a/memory.usage_in_bytes", used.as_str()),
            ("memory/a/memory.stat", stat.as_str()),
        ];
        let own = "9:name=systemd:/x\n4:cpu,memory:/a\n0::/\n";
        assert_eq!(measured(own, &files), memory(1000, 100));
    }

    #[test]
    fn what_does_not_read_limits_nothing_and_no_meminfo_is_no_measure() {
        let files = [("a/memory.max", "many\n"), ("a/memory.current", "")];
        assert_eq!(measured("0::/a\nnonsense\n", &files), memory(4096, 2048));
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Memory::of(dir.path(), dir.path()), None);
    }

    #[test]
    fn this_machine_has_some() {
        let memory = Memory::of_system().unwrap();
        assert!(memory.total_bytes >= 64 * MIB && memory.available_bytes > 0, "{memory:?}");
        assert!(memory.available_bytes <= memory.total_bytes, "{memory:?}");
        let system = rustix::system::sysinfo();
        let machine = system.totalram as u64 * u64::from(system.mem_unit);
        assert!(memory.total_bytes <= machine, "{memory:?} of {machine}");
    }
}
