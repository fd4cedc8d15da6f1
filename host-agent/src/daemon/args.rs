//! The daemon's command line.

use std::path::PathBuf;

/// Runs sandboxes on this host and serves them to schedulers over gRPC.
#[derive(Debug, clap::Parser)]
#[command(name = "soulboxd", version)]
pub(super) struct Args {
    /// The configuration file [default: /etc/soulbox/soulboxd.toml, where it exists].
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,

    /// Check the configuration and exit.
    #[arg(long)]
    pub(super) check_config: bool,

    /// Print a configuration with every default and exit.
    #[arg(long, conflicts_with = "check_config")]
    pub(super) print_default_config: bool,
}
