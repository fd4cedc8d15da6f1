//! Verbs for FilesystemService: `stat`, `read`, `write` …

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use bytes::Bytes;
use soulbox_proto::guest::v1::open_write::How;
use soulbox_proto::guest::v1::*;
use tonic::Status;

use super::Guest;

/// A path as root sees it: the machine's own `user` may not reach what tests make.
pub fn at(path: impl AsRef<Path>) -> FilePath {
    as_user(path, "root")
}

pub fn as_user(path: impl AsRef<Path>, user: &str) -> FilePath {
    FilePath {
        path: Bytes::copy_from_slice(path.as_ref().as_os_str().as_bytes()),
        user: user.to_owned(),
        root: Bytes::new(),
    }
}

pub fn below(root: impl AsRef<Path>, path: impl AsRef<Path>) -> FilePath {
    FilePath {
        root: Bytes::copy_from_slice(root.as_ref().as_os_str().as_bytes()),
        ..at(path)
    }
}

pub fn open(path: FilePath, how: How) -> OpenWrite {
    OpenWrite {
        path: Some(path),
        how: how.into(),
        ..OpenWrite::default()
    }
}

pub fn opening(open: OpenWrite) -> WriteRequest {
    WriteRequest {
        message: Some(write_request::Message::Open(open)),
    }
}

pub fn data(bytes: impl Into<Bytes>) -> WriteRequest {
    WriteRequest {
        message: Some(write_request::Message::Data(bytes.into())),
    }
}

pub fn commit() -> WriteRequest {
    WriteRequest {
        message: Some(write_request::Message::Commit(CommitWrite {})),
    }
}

impl Guest {
    pub async fn stat(&self, path: FilePath) -> Result<Entry, Status> {
        let request = StatRequest {
            path: Some(path),
            follow: false,
        };
        let response = self.files().stat(request).await?.into_inner();
        Ok(response.entry.unwrap())
    }

    pub async fn read(&self, path: FilePath) -> Result<Vec<u8>, Status> {
        self.read_part(path, 0, 0).await
    }

    pub async fn read_part(
        &self,
        path: FilePath,
        offset: u64,
        length: u64,
    ) -> Result<Vec<u8>, Status> {
        let request = ReadRequest {
            path: Some(path),
            offset,
            length,
        };
        let mut responses = self.files().read(request).await?.into_inner();
        let first = responses.message().await?.unwrap();
        assert!(matches!(
            first.message,
            Some(read_response::Message::Entry(_))
        ));
        let mut bytes = Vec::new();
        while let Some(response) = responses.message().await? {
            match response.message.unwrap() {
                read_response::Message::Data(data) => bytes.extend_from_slice(&data),
                read_response::Message::Entry(_) => panic!("a second entry"),
            }
        }
        Ok(bytes)
    }

    pub async fn write(&self, requests: Vec<WriteRequest>) -> Result<WriteResponse, Status> {
        let response = self.files().write(tokio_stream::iter(requests)).await?;
        Ok(response.into_inner())
    }

    /// Writes these bytes as they say in `open`.
    pub async fn put(&self, open: OpenWrite, bytes: &[u8]) -> Result<WriteResponse, Status> {
        let mut requests = vec![opening(open)];
        requests.extend(
            bytes
                .chunks(100_000)
                .map(|part| data(Bytes::copy_from_slice(part))),
        );
        requests.push(commit());
        self.write(requests).await
    }

    /// All pages, and how many there were.
    pub async fn list(
        &self,
        path: FilePath,
        depth: u32,
        page_size: u32,
    ) -> Result<(Vec<Entry>, usize), Status> {
        let (mut entries, mut pages) = (Vec::new(), 0);
        let mut page_token = Bytes::new();
        loop {
            let request = ListRequest {
                path: Some(path.clone()),
                depth,
                page_size,
                page_token,
            };
            let page = self.files().list(request).await?.into_inner();
            entries.extend(page.entries);
            pages += 1;
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok((entries, pages));
            }
        }
    }

    pub async fn remove(&self, path: FilePath, recursive: bool) -> Result<u64, Status> {
        let request = RemoveRequest {
            path: Some(path),
            recursive,
            missing_ok: false,
        };
        Ok(self.files().remove(request).await?.into_inner().removed)
    }
}
