//! Download and Upload: trees as tar streams, made and unpacked a piece at a time, so
//! that no thread waits for a caller.

mod download;
mod unpack;
mod upload;

pub(super) use self::download::Download;
pub(super) use self::upload::{Upload, check, piece};
