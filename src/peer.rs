//! Who may use a socket of the daemon: the kernel's word on the peer's uid and gid.
//!
//! Why: file modes alone fail with a wrong umask or a directory that was opened up.
//! How: root, the daemon's own uid, and what the configuration names. For a group, the peer's own
//! group or one of those that `/proc` lists for it.
//! Never: trusts anything that the peer says.
//! Start at [`Allowed::admits`].

/// A process at the other end of a Unix socket, as it was when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
    /// Its number, if it can be told here.
    pub pid: Option<i32>,
}

impl Peer {
    /// True for root and the daemon's own user.
    #[must_use]
    pub fn is_owner(self) -> bool {
        self.uid == 0 || self.uid == rustix::process::geteuid().as_raw()
    }
}

/// Who is let in besides root and the daemon's own user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// These users.
    pub uids: Vec<u32>,
    /// Members of these groups.
    pub gids: Vec<u32>,
}

impl Allowed {
    /// Whether this peer may come in.
    #[must_use]
    pub fn admits(&self, peer: Peer) -> bool {
        let Peer { uid, gid, pid } = peer;
        if peer.is_owner() || self.uids.contains(&uid) || self.gids.contains(&gid) {
            return true;
        }
        !self.gids.is_empty()
            && pid.is_some_and(|pid| groups_of(pid).iter().any(|g| self.gids.contains(g)))
    }
}

/// The supplementary groups of a process; none if it is gone.
fn groups_of(pid: i32) -> Vec<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    line.unwrap_or_default().split_whitespace().filter_map(|g| g.parse().ok()).collect()
}
