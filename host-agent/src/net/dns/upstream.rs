//! Asking the host's resolvers.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Mutex;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query as Question, ResponseCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

use super::Limits;
use super::message::EDNS_BYTES;
use crate::sync::lock;

/// More than we say that we take: not every server listens.
const DATAGRAM_BYTES: usize = 4096;
/// How often each server is asked, time permitting: datagrams are lost.
const ROUNDS: usize = 2;

/// What is known of the servers.
#[derive(Debug, Default)]
pub(super) struct Upstreams {
    /// Asked first, so that a dead one costs one question its time-out, not each.
    answered_last: Mutex<Option<SocketAddr>>,
}

/// No server gave an answer. The guest hears SERVFAIL.
#[derive(Debug, thiserror::Error)]
#[error("no resolver answered: see that those configured, or of /etc/resolv.conf, can be reached")]
pub(super) struct NoAnswer;

#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("the resolver cannot be reached")]
    Io(#[from] io::Error),
    #[error("the resolver's answer is not one to the question")]
    Mismatch,
    #[error("the resolver answered {0}")]
    Failed(ResponseCode),
}

enum Datagram {
    Answer(Box<Message>),
    /// The answer is longer than that.
    Truncated,
}

// === impl Upstreams ===

impl Upstreams {
    /// The first answer of `servers` that says what there is, or that there is
    /// nothing.
    pub(super) async fn ask(
        &self,
        question: &Question,
        servers: &[SocketAddr],
        limits: &Limits,
    ) -> Result<Message, NoAnswer> {
        let last = *lock(&self.answered_last);
        let first = servers.iter().filter(|server| Some(**server) == last);
        let others = servers.iter().filter(|server| Some(**server) != last);
        let order: Vec<SocketAddr> = first.chain(others).copied().collect();
        let ask = async {
            for &server in order.iter().cycle().take(ROUNDS * order.len()) {
                match tokio::time::timeout(limits.attempt, ask(server, question)).await {
                    Ok(Ok(message)) => {
                        *lock(&self.answered_last) = Some(server);
                        return Ok(message);
                    }
                    Ok(Err(error)) => tracing::debug!(%server, %error, "a resolver failed"),
                    Err(_) => tracing::debug!(%server, "a resolver did not answer in time"),
                }
            }
            Err(NoAnswer)
        };
        let answered = tokio::time::timeout(limits.total, ask).await;
        answered.unwrap_or(Err(NoAnswer))
    }
}

async fn ask(server: SocketAddr, question: &Question) -> Result<Message, AskError> {
    let mut id = [0; 2];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(io::Error::from)?;
    let id = u16::from_be_bytes(id);
    let bytes = written(id, question)?;
    let message = match over_udp(server, &bytes, id, question).await? {
        Datagram::Answer(message) => *message,
        Datagram::Truncated => over_tcp(server, &bytes, id, question).await?,
    };
    match message.metadata.response_code {
        ResponseCode::NoError | ResponseCode::NXDomain => Ok(message),
        code => Err(AskError::Failed(code)),
    }
}

fn written(id: u16, question: &Question) -> io::Result<Vec<u8>> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.queries.push(question.clone());
    let mut edns = Edns::new();
    edns.set_max_payload(EDNS_BYTES);
    message.set_edns(edns);
    message.to_vec().map_err(io::Error::other)
}

/// Waits for the answer. Whatever else arrives may be somebody's guess at it, and
/// is passed over. The port is the kernel's choice, at random, for each question.
async fn over_udp(
    server: SocketAddr,
    bytes: &[u8],
    id: u16,
    question: &Question,
) -> io::Result<Datagram> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    // From here on the kernel takes datagrams from nobody else.
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; DATAGRAM_BYTES];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let datagram = &buffer[..length];
        if is_truncated(datagram, id) {
            return Ok(Datagram::Truncated);
        }
        if let Some(message) = matching(datagram, id, question) {
            return Ok(Datagram::Answer(Box::new(message)));
        }
    }
}

async fn over_tcp(
    server: SocketAddr,
    bytes: &[u8],
    id: u16,
    question: &Question,
) -> Result<Message, AskError> {
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&framed(bytes)?).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    matching(&answer, id, question).ok_or(AskError::Mismatch)
}

/// A message as TCP carries it: RFC 1035, section 4.2.2.
pub(super) fn framed(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    Ok([&length.to_be_bytes(), message].concat())
}

/// Whether it says so; what else it says may be cut anywhere.
fn is_truncated(datagram: &[u8], id: u16) -> bool {
    const RESPONSE: u8 = 0x80;
    const TRUNCATION: u8 = 0x02;
    let both = RESPONSE | TRUNCATION;
    matches!(*datagram, [high, low, flags, ..]
        if u16::from_be_bytes([high, low]) == id && flags & both == both)
}

fn matching(bytes: &[u8], id: u16, question: &Question) -> Option<Message> {
    let message = Message::from_vec(bytes).ok()?;
    let metadata = &message.metadata;
    let matches = metadata.id == id
        && metadata.message_type == MessageType::Response
        && metadata.op_code == OpCode::Query
        && message.queries == [question.clone()];
    matches.then_some(message)
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::{Name, RecordType};
    use proptest::prelude::*;

    use super::*;

    fn question(name: &str) -> Question {
        Question::query(Name::from_ascii(name).unwrap(), RecordType::A)
    }

    #[test]
    fn only_an_answer_to_the_question_matches() {
        let asked = question("a.test.");
        let mut answer = Message::response(9, OpCode::Query);
        answer.queries.push(question("A.TEST."));
        let matches = |message: &Message| matching(&message.to_vec().unwrap(), 9, &asked).is_some();
        assert!(matches(&answer));
        let spoil: [fn(&mut Message); 5] = [
            |message| message.metadata.id = 8,
            |message| message.metadata.message_type = MessageType::Query,
            |message| message.metadata.op_code = OpCode::Notify,
            |message| message.queries[0] = question("b.test."),
            |message| message.queries.clear(),
        ];
        for spoil in spoil {
            let mut other = answer.clone();
            spoil(&mut other);
            assert!(!matches(&other), "{other:?}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_is_too_strange(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let id = u16::from_be_bytes([
                bytes.first().copied().unwrap_or_default(),
                bytes.get(1).copied().unwrap_or_default(),
            ]);
            let _ = is_truncated(&bytes, id);
            if let Some(message) = matching(&bytes, id, &question("a.test.")) {
                prop_assert_eq!(message.queries, [question("a.test.")]);
            }
        }
    }
}
