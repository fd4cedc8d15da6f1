//! Upload: a tar stream into a directory.

use bytes::Bytes;
use rustix::fs::Mode;
use soulbox_proto::guest::v1::upload_request::Message;
use soulbox_proto::guest::v1::{Compression, OpenUpload, UploadRequest, UploadResponse};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation as _, OutBuffer};

use super::parse::Parser;
use super::unpack::Unpack;
use crate::files::change::make_directories;
use crate::files::error::FileError;
use crate::files::incoming::{Piece, Sink};
use crate::files::place::{Place, User, View};
use crate::spec::Violations;

/// How far back a compressed stream may refer, as a power of two: what is kept of it.
/// zstd's own levels up to 19 need no more.
const WINDOW_LOG: u32 = 23;
const PLAIN_BYTES: usize = 128 * 1024;

const DOING: &str = "unpack into";

pub(crate) struct Upload {
    user: User,
    decompress: Option<Decompress>,
    parser: Parser,
    unpack: Unpack,
}

struct Decompress {
    decoder: Decoder<'static>,
    plain: Vec<u8>,
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
        let decompress = match compression {
            Compression::Unspecified => None,
            Compression::Zstd => Some(Decompress::new().map_err(damaged)?),
        };
        Ok(Self {
            user: view.user.clone(),
            decompress,
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
        match &mut self.decompress {
            None => self.parser.feed(&data, &mut self.unpack),
            Some(decompress) => {
                let (parser, unpack) = (&mut self.parser, &mut self.unpack);
                decompress.run(&data, |plain| parser.feed(plain, unpack))
            }
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

// === impl Decompress ===

impl Decompress {
    fn new() -> std::io::Result<Self> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG))?;
        Ok(Self {
            decoder,
            plain: vec![0; PLAIN_BYTES],
        })
    }

    fn run(
        &mut self,
        data: &[u8],
        mut take: impl FnMut(&[u8]) -> Result<(), FileError>,
    ) -> Result<(), FileError> {
        let mut input = InBuffer::around(data);
        loop {
            let mut output = OutBuffer::around(&mut self.plain[..]);
            self.decoder.run(&mut input, &mut output).map_err(damaged)?;
            let plain = output.as_slice();
            let full = plain.len() == PLAIN_BYTES;
            take(plain)?;
            // More may be waiting inside where there was no room for it.
            if input.pos() == data.len() && !full {
                return Ok(());
            }
        }
    }
}

fn damaged(error: std::io::Error) -> FileError {
    FileError::field("data", &format!("is no sound zstd stream ({error})"))
}
