//! Arguments of `top`.
//!
//! Why: see `args`.
//! Never: decides anything.

use clap::Args;

/// Arguments of `top`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bedplate top
  bedplate top --once --json
  bedplate top --interval 5")]
pub struct TopArgs {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval: u64,
    /// Look once, over one interval, and end
    #[arg(long)]
    pub once: bool,
}
