//! The resolver of a slot against real servers on loopback.

#![allow(clippy::unwrap_used)]

mod answers;
mod faults;
mod fuzz;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use soulbox_host::net::dns::{Limits, Opener, Others, Policy, Resolver};
use soulbox_host::net::{DomainId, DomainPattern};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio_util::task::AbortOnDropHandle;

/// Only ever waited for in full by a test that fails.
const LONG: Duration = Duration::from_secs(30);

/// What a guest has been let through to: domain, addresses, lifetime.
type Opened = (DomainId, Vec<IpAddr>, Duration);

/// The slot's set of addresses.
struct Slot {
    opened: Mutex<Vec<Opened>>,
    /// An opening takes one of these permits.
    may_open: Semaphore,
    fails: bool,
}

/// A server that answers what `reply` says, by datagram and by stream.
struct Upstream {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Message>>>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

/// A guest's resolver, and the guest.
struct Guest {
    address: SocketAddr,
    slot: Arc<Slot>,
    policy: watch::Sender<Arc<Policy>>,
    _served: AbortOnDropHandle<()>,
}

// === impl Slot ===

#[tonic::async_trait]
impl Opener for Slot {
    async fn open(
        &self,
        domain: DomainId,
        addresses: &[IpAddr],
        lifetime: Duration,
    ) -> io::Result<()> {
        self.may_open.acquire().await.unwrap().forget();
        if self.fails {
            return Err(io::Error::other("the set is full"));
        }
        let opened = (domain, addresses.to_vec(), lifetime);
        self.opened.lock().unwrap().push(opened);
        Ok(())
    }
}

impl Slot {
    fn new(fails: bool) -> Arc<Self> {
        Arc::new(Self {
            opened: Mutex::default(),
            may_open: Semaphore::new(1000),
            fails,
        })
    }
}

// === impl Upstream ===

impl Upstream {
    /// `reply` gets a question and whether it came by datagram, and gives the
    /// messages to answer it with.
    async fn start(reply: impl Fn(&Message, bool) -> Vec<Vec<u8>> + Send + Sync + 'static) -> Self {
        let (udp, tcp, address) = sockets().await;
        let asked = Arc::new(Mutex::new(Vec::new()));
        let reply = Arc::new({
            let asked = Arc::clone(&asked);
            move |question: &[u8], is_datagram: bool| {
                let question = Message::from_vec(question).unwrap();
                asked.lock().unwrap().push(question.clone());
                reply(&question, is_datagram)
            }
        });
        let over_udp = tokio::spawn({
            let reply = Arc::clone(&reply);
            async move {
                let mut buffer = [0; 4096];
                loop {
                    let (length, client) = udp.recv_from(&mut buffer).await.unwrap();
                    for answer in reply(&buffer[..length], true) {
                        let _ = udp.send_to(&answer, client).await;
                    }
                }
            }
        });
        let over_tcp = tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let mut question = vec![0; usize::from(stream.read_u16().await.unwrap())];
                stream.read_exact(&mut question).await.unwrap();
                for answer in reply(&question, false) {
                    let _ = stream.write_u16(u16::try_from(answer.len()).unwrap()).await;
                    let _ = stream.write_all(&answer).await;
                }
            }
        });
        Self {
            address,
            asked,
            _tasks: [over_udp, over_tcp].map(AbortOnDropHandle::new),
        }
    }

    /// A server that tells these records to whoever asks.
    async fn with(records: Vec<Record>) -> Self {
        Self::start(move |question, _| vec![answer(question, records.clone())]).await
    }

    /// One that hears and says nothing.
    async fn silent() -> Self {
        Self::start(|_, _| Vec::new()).await
    }

    fn times_asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

// === impl Guest ===

impl Guest {
    /// One that may resolve these domains and no others.
    async fn start(domains: &[&str], upstreams: &[&Upstream]) -> Self {
        let upstreams = upstreams.iter().map(|upstream| upstream.address);
        let policy = policy(domains, upstreams.collect());
        Self::with(policy, Limits::default(), Slot::new(false)).await
    }

    async fn with(policy: Policy, limits: Limits, slot: Arc<Slot>) -> Self {
        let (udp, tcp, address) = sockets().await;
        let (policy, watched) = watch::channel(Arc::new(policy));
        let opener: Arc<dyn Opener> = Arc::clone(&slot) as _;
        let resolver = Resolver::new(watched, opener, limits);
        let served = tokio::spawn(resolver.serve(udp, tcp));
        Self {
            address,
            slot,
            policy,
            _served: AbortOnDropHandle::new(served),
        }
    }

    async fn socket(&self) -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(self.address).await.unwrap();
        socket
    }

    async fn ask(&self, name: &str, record_type: RecordType) -> Message {
        self.send(&question(name, record_type)).await
    }

    async fn send(&self, question: &Message) -> Message {
        let socket = self.socket().await;
        socket.send(&question.to_vec().unwrap()).await.unwrap();
        let answer = receive(&socket).await;
        assert_eq!(answer.metadata.id, question.metadata.id);
        assert_eq!(answer.queries, question.queries);
        assert!(answer.metadata.recursion_available);
        answer
    }

    async fn ask_over_tcp(&self, name: &str, record_type: RecordType) -> Message {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        ask_stream(&mut stream, &question(name, record_type)).await
    }

    fn opened(&self) -> Vec<Opened> {
        self.slot.opened.lock().unwrap().clone()
    }
}

/// Both on one port: the one that the kernel chooses for datagrams may be in use for
/// streams.
async fn sockets() -> (UdpSocket, TcpListener, SocketAddr) {
    loop {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = udp.local_addr().unwrap();
        if let Ok(tcp) = TcpListener::bind(address).await {
            return (udp, tcp, address);
        }
    }
}

async fn ask_stream(stream: &mut TcpStream, question: &Message) -> Message {
    let bytes = question.to_vec().unwrap();
    let exchange = async {
        stream
            .write_u16(u16::try_from(bytes.len()).unwrap())
            .await?;
        stream.write_all(&bytes).await?;
        let mut answer = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut answer).await?;
        io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(LONG, exchange).await.unwrap();
    Message::from_vec(&answer.unwrap()).unwrap()
}

async fn receive(socket: &UdpSocket) -> Message {
    let mut buffer = [0; 4096];
    let received = tokio::time::timeout(LONG, socket.recv(&mut buffer)).await;
    let length = received.expect("there is no answer").unwrap();
    Message::from_vec(&buffer[..length]).unwrap()
}

fn policy(domains: &[&str], upstreams: Vec<SocketAddr>) -> Policy {
    Policy {
        domains: domains.iter().map(|text| text.parse().unwrap()).collect(),
        others: Others::Refuse,
        upstreams,
        // As if 10.0.0.0/8 were denied.
        allowed: Arc::new(|address| !address.to_string().starts_with("10.")),
    }
}

fn name(text: &str) -> Name {
    Name::from_ascii(format!("{text}.")).unwrap()
}

fn question(of: &str, record_type: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.queries.push(Query::query(name(of), record_type));
    message
}

fn with_edns(mut message: Message, payload_bytes: u16) -> Message {
    message.set_edns(Edns::new().set_max_payload(payload_bytes).clone());
    message
}

fn reply(question: &Message) -> Message {
    let mut message = Message::response(question.metadata.id, OpCode::Query);
    message.queries.clone_from(&question.queries);
    message
}

fn answer(question: &Message, records: Vec<Record>) -> Vec<u8> {
    let mut message = reply(question);
    message.answers = records;
    message.to_vec().unwrap()
}

fn failure(question: &Message, code: ResponseCode) -> Vec<u8> {
    let mut message = reply(question);
    message.metadata.response_code = code;
    message.to_vec().unwrap()
}

fn a(of: &str, address: &str, ttl: u32) -> Record {
    Record::from_rdata(name(of), ttl, RData::A(A(address.parse().unwrap())))
}

fn aaaa(of: &str, address: &str, ttl: u32) -> Record {
    Record::from_rdata(name(of), ttl, RData::AAAA(AAAA(address.parse().unwrap())))
}

fn alias(of: &str, target: &str, ttl: u32) -> Record {
    Record::from_rdata(name(of), ttl, RData::CNAME(CNAME(name(target))))
}

fn opened(domain: &str, addresses: &[&str], ttl_seconds: u64) -> Opened {
    let domain: DomainPattern = domain.parse().unwrap();
    let addresses = addresses.iter().map(|address| address.parse().unwrap());
    // An address stays open a little longer than it is remembered.
    let lifetime = Duration::from_secs(ttl_seconds + 5);
    (domain.id(), addresses.collect(), lifetime)
}
