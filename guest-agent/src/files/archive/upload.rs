//! Upload: a tar stream into a directory.

use bytes::Bytes;
use rustix::fs::Mode;
use soulbox_proto::archive::{DecompressError, Decompressor, ParseError, Parser};
use soulbox_proto::guest::v1::upload_request::Message;
use soulbox_proto::guest::v1::{Compression, OpenUpload, UploadRequest, UploadResponse};

use super::unpack::Unpack;
use crate::files::change::make_directories;
use crate::files::error::FileError;
use crate::files::incoming::{Piece, Sink};
use crate::files::place::{Place, User, View};
use crate::spec::Violations;

const DOING: &str = "unpack into";

pub(crate) struct Upload {
    user: User,
    decompressor: Option<Decompressor>,
    parser: Parser,
    unpack: Unpack,
}

/// Checks all but the path.
pub(crate) fn check(open: &OpenUpload) -> Result<Compression, Violations> {
    let problem = "must be one that this agent knows, or none";
    let known = Compression::try_from(open.compression);
    known.map_err(|_| Violations::of("open.compression", problem))
}

pub(crate) fn piece(request: UploadRequest) -> Result<Piece, Violations> {
    match request.message {
        Some(Message::Data(data)) => Ok(Piece::Data(data)),
        Some(Message::Open(_)) => Err(Violations::of("open", "must be the first message only")),
        None => Err(Violations::of("message", "must hold data")),
    }
}

// === impl Upload ===

impl Upload {
    pub(crate) fn open(
        place: &Place,
        view: &View,
        compression: Compression,
        keep_owners: bool,
    ) -> Result<Self, FileError> {
        if keep_owners && !view.user.is_root() {
            let problem = "is for root only: name it in open.path.user";
            return Err(FileError::field("open.keep_owners", problem));
        }
        let (top, _) = make_directories(view, &place.path, Mode::from_raw_mode(0o755), DOING)?;
        let decompressor = match compression {
            Compression::Unspecified => None,
            Compression::Zstd => Some(Decompressor::new()?),
        };
        Ok(Self {
            user: view.user.clone(),
            decompressor,
            parser: Parser::default(),
            unpack: Unpack::new(top, keep_owners),
        })
    }
}

impl Sink for Upload {
    type Reply = UploadResponse;

    fn put(&mut self, data: Bytes) -> Result<(), FileError> {
        let user = self.user.clone();
        let _acting = user.act()?;
        let (parser, unpack) = (&mut self.parser, &mut self.unpack);
        match &mut self.decompressor {
            None => parser.feed(&data, unpack),
            Some(decompressor) => decompressor.feed(&data, |plain| parser.feed(plain, unpack)),
        }
    }

    fn finish(mut self) -> Result<UploadResponse, FileError> {
        let user = self.user.clone();
        let _acting = user.act()?;
        self.parser.finish()?;
        self.unpack.finish()?;
        Ok(UploadResponse {
            entries: self.unpack.entries,
            file_bytes: self.unpack.file_bytes,
        })
    }
}

impl From<ParseError> for FileError {
    fn from(error: ParseError) -> Self {
        Self::field("data", &error.to_string())
    }
}

impl From<DecompressError> for FileError {
    fn from(error: DecompressError) -> Self {
        Self::field("data", &error.to_string())
    }
}
