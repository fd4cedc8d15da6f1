//! Commands that remove several things, and go on when one of them stays.

use tonic::Status;

use super::error::CliError;
use super::output;

pub(super) struct Deletions {
    what: &'static str,
    asked: usize,
    failed: usize,
}

// === impl Deletions ===

impl Deletions {
    /// Of `what`, in the plural.
    pub(super) fn of(what: &'static str) -> Self {
        Self {
            what,
            asked: 0,
            failed: 0,
        }
    }

    /// Prints what is gone, and says why something is not.
    pub(super) fn tell<T>(&mut self, id: &str, deleted: Result<T, Status>) -> Result<(), CliError> {
        self.asked += 1;
        match deleted {
            Ok(_) => output::line(id),
            Err(status) => {
                self.failed += 1;
                CliError::from(status).print();
                Ok(())
            }
        }
    }

    pub(super) fn end(self) -> Result<u8, CliError> {
        let Self {
            what,
            asked,
            failed,
        } = self;
        match failed {
            0 => Ok(0),
            failed => Err(CliError::NotDeleted {
                failed,
                asked,
                what,
            }),
        }
    }
}
