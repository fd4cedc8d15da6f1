//! What the agent and a runner say to each other over their socket pair.
//!
//! To a runner, a run is 24 bytes and the code, all numbers little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0–3 | length of the code |
//! | 4–7 | flags: 1, draw new random numbers first |
//! | 8–15 | number of the run, from 1 |
//! | 16–23 | the most bytes of results |
//!
//! Bash reads no binary numbers well; it gets the code and a NUL.
//!
//! From a runner come frames: four bytes of length, and a `RunCodeResponse` as it
//! goes on to the caller, which has no copy and no second encoding of an image. An
//! empty one says that the runner is ready. Code can write to its runner's
//! descriptors, so nothing that comes from there is believed.

use std::io;

use bytes::{Buf as _, Bytes, BytesMut};
use prost::Message as _;
use soulbox_proto::guest::v1::run_code_response::Event;
use soulbox_proto::guest::v1::run_finished::Outcome;
use soulbox_proto::guest::v1::{CodeError, CodeResult, Language, RunCodeResponse};
use tokio::net::unix::OwnedReadHalf;

/// What a run may send beyond its results: an error, and the end.
pub(super) const SLACK_BYTES: usize = 256 * 1024;
/// More forms of one thing to show, or longer names of them, are a mistake.
const MAX_FORMS: usize = 64;
const MAX_MIME_BYTES: usize = 256;

const LENGTH_BYTES: usize = 4;
/// What each frame is taken for beside its bytes: very many small ones cost, too.
const FRAME_COST_BYTES: usize = 64;
/// Room is made as bytes come, not as they are announced.
const READ_BYTES: usize = 64 * 1024;
const LEAST_READ_BYTES: usize = 4 * 1024;

const RESEED: u32 = 1;

/// One piece of code for a runner.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'a> {
    pub(super) code: &'a str,
    pub(super) number: u64,
    pub(super) max_result_bytes: u64,
    /// The guest has become another since this interpreter last ran something.
    pub(super) reseed: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Frame {
    Ready,
    Result(CodeResult),
    Error(CodeError),
    Finished(Outcome),
}

/// Cuts frames out of a stream of bytes.
#[derive(Debug, Default)]
pub(super) struct Frames {
    buffer: BytesMut,
}

/// The frames that come from a runner.
pub(super) struct Reader {
    half: OwnedReadHalf,
    frames: Frames,
    is_closed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BrokenChannel {
    #[error("a message of {bytes} bytes, where {limit} are left")]
    TooLarge { bytes: usize, limit: usize },
    #[error("no message of the protocol")]
    Malformed,
}

// === impl Run ===

impl Run<'_> {
    pub(super) fn encode(self, language: Language) -> Bytes {
        if language == Language::Bash {
            return [self.code.as_bytes(), b"\0"].concat().into();
        }
        let mut message = Vec::with_capacity(24 + self.code.len());
        // A request is far below 4 GiB.
        let length = u32::try_from(self.code.len()).unwrap_or(u32::MAX);
        message.extend_from_slice(&length.to_le_bytes());
        let flags = if self.reseed { RESEED } else { 0 };
        message.extend_from_slice(&flags.to_le_bytes());
        message.extend_from_slice(&self.number.to_le_bytes());
        message.extend_from_slice(&self.max_result_bytes.to_le_bytes());
        message.extend_from_slice(self.code.as_bytes());
        message.into()
    }
}

// === impl Frames ===

impl Frames {
    /// The next whole frame with what it costs, if there is one of at most `limit`
    /// bytes.
    pub(super) fn next(&mut self, limit: usize) -> Result<Option<(Frame, usize)>, BrokenChannel> {
        let Some(header) = self.buffer.first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let bytes = usize::try_from(u32::from_le_bytes(*header)).unwrap_or(usize::MAX);
        if bytes > limit {
            return Err(BrokenChannel::TooLarge { bytes, limit });
        }
        if self.buffer.len() - LENGTH_BYTES < bytes {
            return Ok(None);
        }
        self.buffer.advance(LENGTH_BYTES);
        let frame = Frame::decode(self.buffer.split_to(bytes).freeze())?;
        Ok(Some((frame, bytes + FRAME_COST_BYTES)))
    }

    /// Where to read more into.
    fn room(&mut self) -> &mut BytesMut {
        let room = self.buffer.capacity() - self.buffer.len();
        if room < LEAST_READ_BYTES {
            // Once more what is there already, so that a large one is not copied often.
            let more = self.buffer.len().clamp(LEAST_READ_BYTES, 16 * READ_BYTES);
            self.buffer.reserve(more);
        }
        &mut self.buffer
    }
}

// === impl Frame ===

impl Frame {
    fn decode(bytes: Bytes) -> Result<Self, BrokenChannel> {
        if bytes.is_empty() {
            return Ok(Self::Ready);
        }
        let response = RunCodeResponse::decode(bytes).map_err(|_| BrokenChannel::Malformed)?;
        match response.event {
            Some(Event::Result(result)) => {
                let mut names = result.data.keys().chain(&result.omitted);
                let count = result.data.len() + result.omitted.len();
                if count > MAX_FORMS || names.any(|name| name.len() > MAX_MIME_BYTES) {
                    return Err(BrokenChannel::Malformed);
                }
                Ok(Self::Result(result))
            }
            Some(Event::Error(error)) => Ok(Self::Error(error)),
            Some(Event::Finished(finished)) => match finished.outcome() {
                outcome @ (Outcome::Ok | Outcome::Failed | Outcome::Interrupted) => {
                    Ok(Self::Finished(outcome))
                }
                Outcome::Unspecified | Outcome::TimedOut | Outcome::InterpreterEnded => {
                    Err(BrokenChannel::Malformed)
                }
            },
            Some(Event::Started(_) | Event::Stdout(_) | Event::Stderr(_)) | None => {
                Err(BrokenChannel::Malformed)
            }
        }
    }
}

// === impl Reader ===

impl Reader {
    pub(super) fn new(half: OwnedReadHalf) -> Self {
        Self {
            half,
            frames: Frames::default(),
            is_closed: false,
        }
    }

    /// Waits for a frame. None, once: the runner has closed its end; after that,
    /// waits for ever.
    pub(super) async fn next(
        &mut self,
        limit: usize,
    ) -> Result<Option<(Frame, usize)>, BrokenChannel> {
        loop {
            if let Some(frame) = self.frames.next(limit)? {
                return Ok(Some(frame));
            }
            if self.is_closed {
                return std::future::pending().await;
            }
            if self.frames.buffer.is_empty() {
                // Nothing is kept while there is nothing to read.
                self.frames.buffer = BytesMut::new();
            }
            let readable = self.half.readable().await;
            if readable.and_then(|()| self.read()).is_err() {
                self.is_closed = true;
                return Ok(None);
            }
        }
    }

    /// A frame that has come, if there is one.
    pub(super) fn try_next(
        &mut self,
        limit: usize,
    ) -> Result<Option<(Frame, usize)>, BrokenChannel> {
        loop {
            if let Some(frame) = self.frames.next(limit)? {
                return Ok(Some(frame));
            }
            if self.is_closed {
                return Ok(None);
            }
            match self.read() {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(_) => self.is_closed = true,
            }
        }
    }

    /// Reads what is there; whether that was anything.
    fn read(&mut self) -> io::Result<bool> {
        match self.half.try_read_buf(self.frames.room()) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use soulbox_proto::guest::v1::{RunFinished, RunStarted};

    use super::*;

    const LIMIT: usize = 4096;

    fn framed(message: &[u8]) -> Vec<u8> {
        let length = u32::try_from(message.len()).unwrap();
        [&length.to_le_bytes(), message].concat()
    }

    fn message(event: Event) -> Vec<u8> {
        RunCodeResponse { event: Some(event) }.encode_to_vec()
    }

    fn finished(outcome: Outcome) -> Event {
        Event::Finished(RunFinished {
            outcome: outcome.into(),
            ..RunFinished::default()
        })
    }

    fn all(bytes: &[u8]) -> Result<Vec<Frame>, BrokenChannel> {
        let mut frames = Frames::default();
        frames.buffer.extend_from_slice(bytes);
        let mut found = Vec::new();
        while let Some((frame, _)) = frames.next(LIMIT)? {
            found.push(frame);
        }
        Ok(found)
    }

    #[test]
    fn a_run_is_its_header_and_its_code() {
        let run = Run {
            code: "1+1",
            number: 7,
            max_result_bytes: 300,
            reseed: true,
        };
        let expected = b"\x03\0\0\0\x01\0\0\0\x07\0\0\0\0\0\0\0\x2c\x01\0\0\0\0\0\x001+1";
        assert_eq!(run.encode(Language::Python), &expected[..]);
        assert_eq!(run.encode(Language::Bash), &b"1+1\0"[..]);
    }

    #[test]
    fn only_a_runners_messages_are_taken() {
        for event in [
            Event::Started(RunStarted::default()),
            Event::Stdout(Bytes::from_static(b"x")),
            finished(Outcome::TimedOut),
            finished(Outcome::InterpreterEnded),
            finished(Outcome::Unspecified),
        ] {
            assert_eq!(all(&framed(&message(event))), Err(BrokenChannel::Malformed));
        }
        let ok = framed(&message(finished(Outcome::Ok)));
        assert_eq!(all(&ok), Ok(vec![Frame::Finished(Outcome::Ok)]));
        assert_eq!(all(&[0; 4]), Ok(vec![Frame::Ready]));
        assert_eq!(all(b"\x01\0\0\0\xff"), Err(BrokenChannel::Malformed));
    }

    #[test]
    fn names_and_numbers_of_forms_are_bounded() {
        let result = |data: HashMap<String, Bytes>| {
            Event::Result(CodeResult {
                data,
                ..CodeResult::default()
            })
        };
        let long = HashMap::from([("x".repeat(MAX_MIME_BYTES + 1), Bytes::new())]);
        assert!(all(&framed(&message(result(long)))).is_err());
        let many = (0..=MAX_FORMS).map(|index| (index.to_string(), Bytes::new()));
        assert!(all(&framed(&message(result(many.collect())))).is_err());
        let some = (0..MAX_FORMS).map(|index| (index.to_string(), Bytes::new()));
        assert!(all(&framed(&message(result(some.collect())))).is_ok());
    }

    #[test]
    fn a_length_is_not_believed() {
        let huge = u32::MAX.to_le_bytes();
        assert!(matches!(all(&huge), Err(BrokenChannel::TooLarge { .. })));
        let mut frames = Frames::default();
        frames.buffer.extend_from_slice(&4096_u32.to_le_bytes());
        assert_eq!(frames.next(LIMIT), Ok(None));
        assert!(frames.room().capacity() <= 2 * LEAST_READ_BYTES);
    }

    fn any_frame() -> impl Strategy<Value = (Frame, Vec<u8>)> {
        let text = ".{0,20}";
        prop_oneof![
            Just((Frame::Ready, Vec::new())),
            (text, text).prop_map(|(name, value)| {
                let error = CodeError {
                    name,
                    value,
                    traceback: vec!["x".to_owned()],
                };
                (Frame::Error(error.clone()), message(Event::Error(error)))
            }),
            (
                "[a-z]{1,5}/[a-z]{1,5}",
                prop::collection::vec(any::<u8>(), 0..99)
            )
                .prop_map(|(mime, bytes)| {
                    let data = HashMap::from([(mime, Bytes::from(bytes))]);
                    let result = CodeResult {
                        main: true,
                        data,
                        ..CodeResult::default()
                    };
                    (
                        Frame::Result(result.clone()),
                        message(Event::Result(result)),
                    )
                }),
            Just((
                Frame::Finished(Outcome::Failed),
                message(finished(Outcome::Failed))
            )),
        ]
    }

    proptest! {
        /// However the stream is cut up.
        #[test]
        fn frames_come_out_as_they_went_in(
            sent in prop::collection::vec(any_frame(), 0..8),
            cut in 1_usize..50,
        ) {
            let stream: Vec<u8> = sent.iter().flat_map(|(_, bytes)| framed(bytes)).collect();
            let mut frames = Frames::default();
            let mut got = Vec::new();
            for piece in stream.chunks(cut) {
                frames.room().extend_from_slice(piece);
                while let Some((frame, _)) = frames.next(LIMIT).unwrap() {
                    got.push(frame);
                }
            }
            prop_assert!(frames.buffer.is_empty());
            prop_assert_eq!(got, sent.into_iter().map(|(frame, _)| frame).collect::<Vec<_>>());
        }

        /// Whatever it is, it is taken or refused, and never grows beyond the limit.
        #[test]
        fn garbage_is_harmless(bytes in prop::collection::vec(any::<u8>(), 0..600), limit in 0_usize..500) {
            let mut frames = Frames::default();
            frames.buffer.extend_from_slice(&bytes);
            let before = frames.buffer.len();
            while let Ok(Some((_, cost))) = frames.next(limit) {
                prop_assert!(cost <= limit + FRAME_COST_BYTES);
                prop_assert!(frames.buffer.len() < before);
            }
        }
    }
}
