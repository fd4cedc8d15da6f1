//! What the host lets this process have.

use anyhow::{Context, Result};
use rustix::process::{Resource, getrlimit, setrlimit};

/// As many open files as may be.
pub(crate) fn allow_descriptors() -> Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).context("raising the limit of open files")
}
