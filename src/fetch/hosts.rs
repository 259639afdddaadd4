//! How many transfers ask the same server at once.
//!
//! Why: each that adds connections takes from the others what it gains. Thirty-two with sixteen each are
//! more than many a server takes, and who comes late gets nothing.
//! How: a count for each host. Who is not alone with it may have his part of the connections of one.
//! Never: counts a transfer that has ended.
//! Start at [`Hosts::visit`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::source::SourceUrl;

/// The servers that transfers of this process ask.
#[derive(Debug, Default)]
pub struct Hosts(Mutex<HashMap<String, usize>>);

impl Hosts {
    /// One more asks the server of `url`, until what is given is dropped.
    pub(super) fn visit(self: &Arc<Self>, url: &SourceUrl) -> Visit {
        let host = url.expose().host_str().unwrap_or_default().to_ascii_lowercase();
        *self.counts().entry(host.clone()).or_default() += 1;
        Visit { hosts: Arc::clone(self), host }
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A transfer that asks a server.
#[derive(Debug)]
pub(super) struct Visit {
    hosts: Arc<Hosts>,
    host: String,
}

impl Visit {
    /// This transfer's part of `most` connections to its server; at least one.
    pub(super) fn part_of(&self, most: usize) -> usize {
        let others = self.hosts.counts().get(&self.host).copied();
        (most / others.unwrap_or(1).max(1)).max(1)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut counts = self.hosts.counts();
        if let Some(count) = counts.get_mut(&self.host) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.host);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connections_to_a_server_are_shared_while_there_are_others() {
        let hosts = Arc::new(Hosts::default());
        let visit = |url: &str| hosts.visit(&SourceUrl::parse(url).unwrap());
        let first = visit("https://one.example/a");
        assert_eq!(first.part_of(16), 16);
        let (second, other) = (visit("http://ONE.example:8080/b"), visit("https://two.example/a"));
        assert_eq!((first.part_of(16), second.part_of(16), other.part_of(16)), (8, 8, 16));
        let many: Vec<_> = (0..30).map(|_| visit("https://one.example/c")).collect();
        assert_eq!((first.part_of(16), many[29].part_of(1)), (1, 1));
        drop((many, second));
        assert_eq!(first.part_of(16), 16);
        drop((first, other));
        assert!(hosts.counts().is_empty());
    }
}
