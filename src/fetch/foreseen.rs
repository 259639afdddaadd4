//! What readers will want, before the rest of the file and behind what they wait for.
//!
//! Why: a trace of an earlier boot says what will be read; it is worth more than the next MiB of the
//! file, and less than a reader who waits.
//! How: connections of their own, as for what is wanted: they rest while something wanted is on its
//! way, and the fleet's own rest while one of these is.
//! Never: takes a buffer of those for what is wanted, or asks for what somebody has.
//! Start at [`Fleet::serve_foreseen`].

use std::ops::Range;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::demand::{Demand, Urgency};
use super::fleet::Fleet;

/// Connections for what is foreseen.
pub(super) const CONNECTIONS: usize = 4;

impl Fleet {
    /// Starts the connections for what is foreseen; they end when everybody does.
    pub(super) fn serve_foreseen(self: &Arc<Self>, tasks: &mut JoinSet<()>) {
        if self.demand.is_some() {
            for _ in 0..CONNECTIONS {
                tasks.spawn(Arc::clone(self).foreseen_connection());
            }
        }
    }

    async fn foreseen_connection(self: Arc<Self>) {
        let Some(demand) = &self.demand else { return };
        let mut halt = self.halted();
        loop {
            let one = async {
                let range = demand.arriving.foreseen().next().await;
                self.fetch_foreseen(demand, &range).await;
            };
            tokio::select! {
                () = one => {}
                _ = halt.wait_for(|halt| *halt) => return,
            }
        }
    }

    /// Fetches the first piece of a range that nobody has begun; the rest is left to be taken next.
    async fn fetch_foreseen(&self, demand: &Demand, range: &Range<u64>) {
        let Ok(permits) = demand.foreseen_share.reserve(2).await else { return };
        // What a lone stream is about to come to is left to it.
        let Some(claim) = self.book().take_wanted(range, permits, false) else { return };
        let foreseen = demand.arriving.foreseen();
        let (piece, rest) = (claim.range.clone(), claim.range.end..range.end);
        if !rest.is_empty() {
            foreseen.push_front(rest);
        }
        if self.bring(demand, claim, Urgency::Foreseen).await {
            foreseen.add_brought(piece.end - piece.start);
        } else {
            foreseen.push_front(piece);
        }
    }
}
