//! An agent that lies. Whatever it says, programs here end, and nothing is made that
//! was not asked for.

use std::fs;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use soulbox_proto::guest::v1::filesystem_service_server::{
    FilesystemService, FilesystemServiceServer,
};
use soulbox_proto::guest::v1::*;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::Case;
use crate::world::{World, sh};

pub const ALL: &[Case] = &[
    (
        "hostile::names_and_kinds_that_cannot_be_are_left_out",
        names_and_kinds_that_cannot_be_are_left_out,
    ),
    ("hostile::sizes_that_lie_end", sizes_that_lie_end),
    (
        "hostile::listings_without_end_end",
        listings_without_end_end,
    ),
    ("hostile::archives_stay_inside", archives_stay_inside),
    (
        "hostile::a_file_that_never_stays_the_same_is_given_up",
        a_file_that_never_stays_the_same_is_given_up,
    ),
    (
        "hostile::events_of_anything_are_taken",
        events_of_anything_are_taken,
    ),
];

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Serves lies until it is dropped.
struct Liar {
    world: World,
    _runtime: tokio::runtime::Runtime,
}

struct Service;

// === impl Liar ===

impl Liar {
    fn start() -> Self {
        let world = World::without_agent();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let _guard = runtime.enter();
        let listener = tokio::net::UnixListener::bind(world.socket()).unwrap();
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(FilesystemServiceServer::new(Service))
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        Self {
            world,
            _runtime: runtime,
        }
    }

    /// `soulbox cp` of what is at this path of it, to `target`.
    fn copy(&self, path: &str, target: &Path) -> std::process::Output {
        let place = format!("{}:/{path}", crate::world::SANDBOX);
        self.world.copy([place.as_ref(), target.as_os_str()])
    }
}

fn entry(name: &[u8], kind: FileKind, inode: u64) -> Entry {
    Entry {
        path: Bytes::copy_from_slice(name),
        kind: kind.into(),
        mode: 0o755,
        inode,
        device: 1,
        links: 1,
        ..Entry::default()
    }
}

fn regular(name: &[u8], inode: u64, size_bytes: u64) -> Entry {
    Entry {
        size_bytes,
        ..entry(name, FileKind::Regular, inode)
    }
}

fn names() -> Vec<Entry> {
    let mut entries: Vec<_> = [
        &b"../escape"[..],
        b"..",
        b".",
        b"",
        b"/",
        b"nul\0byte",
        b"twice",
        b"twice",
        &[b'x'; 256],
        b"\xff\xfe",
    ]
    .iter()
    .zip(10..)
    .map(|(name, inode)| regular(name, inode, 1))
    .collect();
    for (kind, inode) in [(0, 30), (-5, 31), (99, 32)] {
        entries.push(Entry {
            kind,
            ..regular(b"wrong-kind", inode, 1)
        });
    }
    // The root's own number, and no number.
    entries.push(entry(b"as-root", FileKind::Directory, 1));
    entries.push(regular(b"zero", 0, 1));
    let far = prost_types::Timestamp {
        seconds: i64::MIN,
        nanos: i32::MIN,
    };
    entries.push(Entry {
        modify_time: Some(far),
        access_time: Some(far),
        uid: u32::MAX,
        mode: u32::MAX,
        links: u64::MAX,
        ..regular(b"odd", 40, u64::MAX)
    });
    entries.push(Entry {
        target: Bytes::from_static(b"nul\0"),
        ..entry(b"link", FileKind::Symlink, 41)
    });
    entries
}

fn found(path: &[u8]) -> Result<Entry, Status> {
    static CHANGING: AtomicU64 = AtomicU64::new(0);
    let last = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    Ok(match last {
        b"" | b"names" | b"endless" | b"sizes" | b"hostile" => entry(path, FileKind::Directory, 7),
        b"short" => regular(path, 8, 1 << 20),
        b"long" => regular(path, 9, 10),
        b"empties" => regular(path, 10, 10),
        b"silent" => regular(path, 11, 10),
        b"another" => regular(path, 12, 10),
        b"changing" => regular(path, 1000 + CHANGING.fetch_add(1, Ordering::Relaxed), 10),
        name => match names().into_iter().find(|entry| entry.path == name) {
            Some(entry) => entry,
            None => {
                let details = tonic_types::ErrorDetails::with_error_info(
                    "FILE_NOT_FOUND",
                    "soulbox",
                    std::collections::HashMap::new(),
                );
                let code = tonic::Code::NotFound;
                return Err(Status::with_error_details(code, "", details));
            }
        },
    })
}

fn path(path: Option<FilePath>) -> Bytes {
    path.unwrap_or_default().path
}

fn replies<T: Send + 'static>(all: Vec<T>) -> Response<Replies<T>> {
    Response::new(Box::pin(tokio_stream::iter(all).map(Ok)))
}

#[tonic::async_trait]
impl FilesystemService for Service {
    async fn stat(&self, request: Request<StatRequest>) -> Result<Response<StatResponse>, Status> {
        let entry = found(&path(request.into_inner().path))?;
        Ok(Response::new(StatResponse { entry: Some(entry) }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let request = request.into_inner();
        let path = path(request.path);
        let reply = if path.ends_with(b"endless") {
            let page = request.page_token.len() as u64;
            let names = (0..1000).map(|number| {
                let name = format!("/endless/{page}-{number}");
                regular(name.as_bytes(), page * 1000 + number + 100, 0)
            });
            ListResponse {
                entries: names.collect(),
                next_page_token: Bytes::from(vec![b'x'; request.page_token.len() + 1]),
            }
        } else {
            ListResponse {
                entries: names(),
                next_page_token: Bytes::new(),
            }
        };
        Ok(Response::new(reply))
    }

    type ReadStream = Replies<ReadResponse>;

    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let path = path(request.into_inner().path);
        let message = |message| ReadResponse {
            message: Some(message),
        };
        let data = |size| message(read_response::Message::Data(vec![b'x'; size].into()));
        let mut entry = found(&path)?;
        let rest = if path.ends_with(b"short") {
            vec![data(5)]
        } else if path.ends_with(b"long") {
            vec![data(1 << 20); 20]
        } else if path.ends_with(b"empties") {
            vec![data(0); 1000]
        } else if path.ends_with(b"silent") {
            return Ok(replies(vec![data(10)]));
        } else if path.ends_with(b"another") {
            entry.inode += 1;
            vec![data(10)]
        } else {
            vec![data(10)]
        };
        let first = message(read_response::Message::Entry(entry));
        Ok(replies([vec![first], rest].concat()))
    }

    type WatchStream = Replies<WatchResponse>;

    /// Ready, then events of everything, then nothing.
    async fn watch(
        &self,
        _request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let message = |message| WatchResponse {
            message: Some(message),
        };
        let mut all = vec![message(watch_response::Message::Ready(
            WatchReady::default(),
        ))];
        for number in 0..2000_i32 {
            let deep = "a/".repeat(usize::try_from(number).unwrap());
            let path = ["../..", "/", "a//b", "", "nul\0", "names", &deep]
                [usize::try_from(number % 7).unwrap()];
            all.push(message(watch_response::Message::Event(WatchEvent {
                kind: number % 8 - 1,
                path: Bytes::copy_from_slice(path.as_bytes()),
                from: Bytes::copy_from_slice(deep.as_bytes()),
                directory: number % 2 == 0,
            })));
        }
        all.push(WatchResponse { message: None });
        all.push(message(watch_response::Message::Overflow(WatchOverflow {})));
        let events = tokio_stream::iter(all).map(Ok);
        Ok(Response::new(Box::pin(
            events.chain(tokio_stream::pending()),
        )))
    }

    type DownloadStream = Replies<DownloadResponse>;

    async fn download(
        &self,
        _request: Request<DownloadRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        let mut archive = Vec::new();
        let mut add = |kind, name: &str, target: &str, data: &[u8]| {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(kind);
            header.set_mode(0o6777);
            header.set_size(data.len() as u64);
            let ustar = header.as_ustar_mut().unwrap();
            ustar.name[..name.len()].copy_from_slice(name.as_bytes());
            ustar.linkname[..target.len()].copy_from_slice(target.as_bytes());
            header.set_cksum();
            archive.extend_from_slice(header.as_bytes());
            archive.extend_from_slice(data);
            archive.resize(archive.len().next_multiple_of(512), 0);
        };
        use tar::EntryType::{Char, Regular, Symlink};
        add(Regular, "harmless", "", b"harmless");
        add(Char, "device", "", b"");
        add(Symlink, "up", "..", b"");
        add(Regular, "up/escaped", "", b"evil");
        let message = |message| DownloadResponse {
            message: Some(message),
        };
        let begin = DownloadBegin::default();
        Ok(replies(vec![
            message(download_response::Message::Begin(begin)),
            message(download_response::Message::Data(archive.into())),
        ]))
    }

    type SearchStream = Replies<SearchResponse>;

    async fn search(
        &self,
        _: Request<SearchRequest>,
    ) -> Result<Response<Self::SearchStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn write(
        &self,
        _: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn make_directory(
        &self,
        _: Request<MakeDirectoryRequest>,
    ) -> Result<Response<MakeDirectoryResponse>, Status> {
        Ok(Response::new(MakeDirectoryResponse::default()))
    }

    async fn r#move(&self, _: Request<MoveRequest>) -> Result<Response<MoveResponse>, Status> {
        Ok(Response::new(MoveResponse::default()))
    }

    async fn remove(&self, _: Request<RemoveRequest>) -> Result<Response<RemoveResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn make_symlink(
        &self,
        _: Request<MakeSymlinkRequest>,
    ) -> Result<Response<MakeSymlinkResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn set_attributes(
        &self,
        _: Request<SetAttributesRequest>,
    ) -> Result<Response<SetAttributesResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_xattrs(
        &self,
        _: Request<GetXattrsRequest>,
    ) -> Result<Response<GetXattrsResponse>, Status> {
        let xattr = |name: &'static [u8]| Xattr {
            name: Bytes::from_static(name),
            value: Bytes::from(vec![b'x'; 1 << 20]),
        };
        let xattrs = vec![
            xattr(b""),
            xattr(b"user.nul\0"),
            xattr(b"security.capability"),
            xattr(b"user.large"),
        ];
        Ok(Response::new(GetXattrsResponse { xattrs }))
    }

    async fn set_xattr(
        &self,
        _: Request<SetXattrRequest>,
    ) -> Result<Response<SetXattrResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn upload(
        &self,
        _: Request<Streaming<UploadRequest>>,
    ) -> Result<Response<UploadResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

fn mount(liar: &Liar) -> crate::world::Mounted {
    // "names" of `World::place` is not there; its root is.
    liar.world.mount()
}

fn names_and_kinds_that_cannot_be_are_left_out() {
    let liar = Liar::start();
    let mounted = mount(&liar);
    let entries = fs::read_dir(mounted.join("names")).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_encoded_bytes())
        .collect();
    names.sort();
    // What comes twice is told twice; programs know that from filesystems that change.
    let possible: [&[u8]; 8] = [
        b"as-root",
        b"escape",
        b"link",
        b"odd",
        b"twice",
        b"twice",
        b"zero",
        b"\xff\xfe",
    ];
    assert_eq!(names, possible);
    // Every one can be looked at, and walked past.
    sh(
        mounted.path(),
        "ls -la names >/dev/null 2>&1 || true; find names/odd names/zero names/twice names/link -ls",
    );
    assert!(fs::read_link(mounted.join("names/link")).is_err());
    // What is said to be made, without saying what.
    assert!(fs::create_dir(mounted.join("made")).is_err());
    // A large attribute is told to be too large, never cut.
    let mut value = [0; 100];
    let told = rustix::fs::getxattr(mounted.join("names/zero"), "user.large", &mut value[..]);
    assert_eq!(told, Err(rustix::io::Errno::RANGE));
    let mut names = vec![0; 1000];
    let length = rustix::fs::listxattr(mounted.join("names/zero"), &mut names[..]).unwrap();
    assert_eq!(&names[..length], b"user.large\0");
}

fn sizes_that_lie_end() {
    let liar = Liar::start();
    let mounted = mount(&liar);
    let read = |name: &str| fs::read(mounted.join("sizes").join(name));
    // Fewer: the rest is not there, or zeros, but it ends.
    assert!(read("short").is_ok_and(|text| text.starts_with(b"xxxxx")));
    assert_eq!(read("long").unwrap(), b"xxxxxxxxxx");
    assert!(read("empties").is_err());
    assert!(read("silent").is_err());
    let other = read("another").unwrap_err();
    assert_eq!(other.raw_os_error(), Some(libc::ESTALE));
    for name in ["short", "long", "empties", "silent", "another"] {
        let target = liar.world.host().join(name);
        let output = liar.copy(&format!("sizes/{name}"), &target);
        assert_eq!(output.status.code(), Some(1), "{name}: {output:?}");
        assert!(!target.exists(), "{name}");
    }
    assert_eq!(fs::read_dir(liar.world.host()).unwrap().count(), 0);
}

fn listings_without_end_end() {
    let liar = Liar::start();
    let mounted = mount(&liar);
    let mut entries = fs::read_dir(mounted.join("endless")).unwrap();
    // It is told page by page, and refused in the end.
    let told = entries.by_ref().take_while(Result::is_ok).count();
    assert!(told > 10_000, "{told}");
    assert!(told <= 1_000_000, "{told}");
    assert!(mounted.join("names").is_dir());
}

fn archives_stay_inside() {
    let liar = Liar::start();
    let target = liar.world.host().join("target");
    let output = liar.copy("hostile", &target);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!liar.world.host().join("escaped").exists());
    assert_eq!(fs::read(target.join("harmless")).unwrap(), b"harmless");
    assert!(!target.join("device").exists());
}

fn a_file_that_never_stays_the_same_is_given_up() {
    let liar = Liar::start();
    let output = liar.copy("changing", &liar.world.host().join("file"));
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("changed while it was copied"), "{said}");
    assert_eq!(fs::read_dir(liar.world.host()).unwrap().count(), 0);
}

fn events_of_anything_are_taken() {
    let liar = Liar::start();
    let mounted = mount(&liar);
    for _ in 0..20 {
        assert!(fs::read_dir(mounted.join("names")).unwrap().count() > 5);
        assert!(mounted.join("names/zero").exists());
    }
}
