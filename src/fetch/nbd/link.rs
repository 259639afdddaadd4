//! A connection to a server: whole records in, whole records out, and an end to every wait.
//!
//! Why: a server that stops in the middle of a record must not hold a transfer for ever.
//! How: each read and each write may take as long as the policy says without a byte, no longer.
//! Never: reads more than it is asked for into memory of the caller's.

use std::io;
use std::time::Duration;

use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf,
};

use super::fault::NbdFault;

/// Bytes that are read ahead: heads and extents come many at a time.
const READ_AHEAD: usize = 64 * 1024;

/// A connection.
#[derive(Debug)]
pub(super) struct Link<S> {
    reader: BufReader<ReadHalf<S>>,
    writer: WriteHalf<S>,
    patience: Duration,
    /// Up to where the export has been asked for, for messages.
    pub(super) at: u64,
}

impl<S: AsyncRead + AsyncWrite> Link<S> {
    pub(super) fn new(stream: S, patience: Duration) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self { reader: BufReader::with_capacity(READ_AHEAD, reader), writer, patience, at: 0 }
    }

    /// Waits for `io`, but not for ever.
    async fn patiently<T>(
        patience: Duration,
        at: u64,
        io: impl Future<Output = io::Result<T>>,
    ) -> Result<T, NbdFault> {
        match tokio::time::timeout(patience, io).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(source)) => Err(NbdFault::Broken { at, source }),
            Err(_) => Err(NbdFault::Stalled { at, seconds: patience.as_secs() }),
        }
    }

    /// Fills `bytes`.
    pub(super) async fn read(&mut self, bytes: &mut [u8]) -> Result<(), NbdFault> {
        let mut done = 0;
        while done < bytes.len() {
            let read = self.reader.read(&mut bytes[done..]);
            match Self::patiently(self.patience, self.at, read).await? {
                0 => return Err(NbdFault::HungUp { at: self.at }),
                count => done += count,
            }
        }
        Ok(())
    }

    /// The next `N` bytes.
    pub(super) async fn array<const N: usize>(&mut self) -> Result<[u8; N], NbdFault> {
        let mut bytes = [0; N];
        self.read(&mut bytes).await?;
        Ok(bytes)
    }

    /// The next `len` bytes, of which the caller has judged the number.
    pub(super) async fn bytes(&mut self, len: usize) -> Result<Vec<u8>, NbdFault> {
        let mut bytes = vec![0; len];
        self.read(&mut bytes).await?;
        Ok(bytes)
    }

    /// Sends all of `bytes`.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), NbdFault> {
        let mut left = bytes;
        while !left.is_empty() {
            match Self::patiently(self.patience, self.at, self.writer.write(left)).await? {
                0 => return Err(NbdFault::HungUp { at: self.at }),
                count => left = &left[count..],
            }
        }
        Ok(())
    }
}
