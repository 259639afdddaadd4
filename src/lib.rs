//! bedplate: brings VM disk images in from URLs, keeps one copy per disk, serves it read-only.

pub mod names;
pub mod units;

pub mod catalog;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod disk;
pub mod fetch;
pub mod image;
pub mod manager;
pub mod map;
pub mod ring;
pub mod serve;
