//! FilesystemService: files of the guest, with the rights of a user.
//!
//! `place` turns a path into descriptors, `jobs` and `incoming` carry the work to
//! threads that may block and its bytes to and from the caller; the others are the
//! calls.

mod archive;
mod change;
mod entry;
mod error;
mod ignored;
mod incoming;
mod jobs;
mod list;
mod place;
mod read;
mod remove;
mod search;
mod tree;
mod watch;
mod write;
mod xattr;

use bytes::Bytes;
use soulbox_proto::guest::v1::filesystem_service_server::FilesystemService;
use soulbox_proto::guest::v1::*;
use tonic::{Request, Response, Status, Streaming};

use self::archive::{Download, Upload};
use self::change::Attributes;
use self::entry::entry_of;
use self::error::Told as _;
use self::jobs::{Jobs, Responses};
use self::place::{PATH_MAX_BYTES, Place, View};
use self::read::Reader;
use self::search::Search;
use self::write::Writer;
use crate::spec::Violations;

/// Serves FilesystemService. Clones share everything.
#[derive(Clone)]
pub(crate) struct Files {
    jobs: Jobs,
}

// === impl Files ===

impl Files {
    pub(crate) fn new() -> Self {
        Self { jobs: Jobs::new() }
    }
}

#[tonic::async_trait]
impl FilesystemService for Files {
    async fn stat(&self, request: Request<StatRequest>) -> Result<Response<StatResponse>, Status> {
        let StatRequest { path, follow } = request.into_inner();
        let place = Place::check(path, "path")?;
        let entry = self.jobs.at(place, move |place, view| {
            const DOING: &str = "look at";
            let file = view.look(&place.path, follow, DOING)?;
            let path = Bytes::copy_from_slice(&place.path);
            entry_of(file, path).told(DOING, &place.path)
        });
        let entry = Some(entry.await?);
        Ok(Response::new(StatResponse { entry }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let mut request = request.into_inner();
        let place = Place::check(request.path.take(), "path")?;
        let asked = list::Asked::check(&request)?;
        let listed = self
            .jobs
            .at(place, move |place, view| list::list(place, view, &asked));
        Ok(Response::new(listed.await?))
    }

    type ReadStream = Responses<ReadResponse>;

    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let ReadRequest {
            path,
            offset,
            length,
        } = request.into_inner();
        let place = Place::check(path, "path")?;
        if i64::try_from(offset).is_err() {
            return Err(Violations::of("offset", "must be less than 2^63").into());
        }
        let open = move |place: &Place, view: &View| Reader::open(place, view, offset, length);
        Ok(Response::new(self.jobs.stream(place, open).await?))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let Some(write_request::Message::Open(mut open)) = first.and_then(|first| first.message)
        else {
            return Err(Violations::of("open", "must be the first message of the call").into());
        };
        let place = Place::check(open.path.take(), "open.path")?;
        let asked = write::Asked::check(&open)?;
        let open = move || place.visit(|view| Writer::open(&place, view, &asked));
        let written = incoming::feed(&self.jobs, requests, open, write::piece, false);
        Ok(Response::new(written.await?))
    }

    async fn make_directory(
        &self,
        request: Request<MakeDirectoryRequest>,
    ) -> Result<Response<MakeDirectoryResponse>, Status> {
        let mut request = request.into_inner();
        let place = Place::check(request.path.take(), "path")?;
        let mode = change::check_mode(request.mode, "mode")?;
        let made = self.jobs.at(place, move |place, view| {
            change::make_directory(place, view, &request, mode)
        });
        Ok(Response::new(made.await?))
    }

    async fn r#move(
        &self,
        request: Request<MoveRequest>,
    ) -> Result<Response<MoveResponse>, Status> {
        let mut request = request.into_inner();
        let from = Place::check(request.from.take(), "from")?;
        let to = from.sibling(request.to.take(), "to")?;
        change::check_move(&request)?;
        let moved = self.jobs.at(from, move |from, view| {
            change::rename(from, &to, view, &view.beside(&to)?, &request)
        });
        let entry = Some(moved.await?);
        Ok(Response::new(MoveResponse { entry }))
    }

    async fn remove(
        &self,
        request: Request<RemoveRequest>,
    ) -> Result<Response<RemoveResponse>, Status> {
        let RemoveRequest {
            path,
            recursive,
            missing_ok,
        } = request.into_inner();
        let place = Place::check(path, "path")?;
        let removed = self.jobs.at(place, move |place, view| {
            remove::remove(place, view, recursive, missing_ok)
        });
        let removed = removed.await?;
        Ok(Response::new(RemoveResponse { removed }))
    }

    async fn make_symlink(
        &self,
        request: Request<MakeSymlinkRequest>,
    ) -> Result<Response<MakeSymlinkResponse>, Status> {
        let MakeSymlinkRequest { path, target } = request.into_inner();
        let place = Place::check(path, "path")?;
        if target.is_empty() || target.contains(&0) || target.len() >= PATH_MAX_BYTES {
            let problem = "must have 1 to 4,095 bytes and no NUL byte";
            return Err(Violations::of("target", problem).into());
        }
        let made = self.jobs.at(place, move |place, view| {
            change::make_symlink(place, view, &target)
        });
        let entry = Some(made.await?);
        Ok(Response::new(MakeSymlinkResponse { entry }))
    }

    async fn set_attributes(
        &self,
        request: Request<SetAttributesRequest>,
    ) -> Result<Response<SetAttributesResponse>, Status> {
        let mut request = request.into_inner();
        let place = Place::check(request.path.take(), "path")?;
        let attributes = Attributes::check(&request)?;
        let set = self
            .jobs
            .at(place, move |place, view| attributes.set(place, view));
        let entry = Some(set.await?);
        Ok(Response::new(SetAttributesResponse { entry }))
    }

    async fn get_xattrs(
        &self,
        request: Request<GetXattrsRequest>,
    ) -> Result<Response<GetXattrsResponse>, Status> {
        let GetXattrsRequest { path, follow } = request.into_inner();
        let place = Place::check(path, "path")?;
        let xattrs = self
            .jobs
            .at(place, move |place, view| xattr::get(place, view, follow));
        let xattrs = xattrs.await?;
        Ok(Response::new(GetXattrsResponse { xattrs }))
    }

    async fn set_xattr(
        &self,
        request: Request<SetXattrRequest>,
    ) -> Result<Response<SetXattrResponse>, Status> {
        let mut request = request.into_inner();
        let place = Place::check(request.path.take(), "path")?;
        xattr::check(&request)?;
        let set = self
            .jobs
            .at(place, move |place, view| xattr::set(place, view, &request));
        set.await?;
        Ok(Response::new(SetXattrResponse {}))
    }

    type SearchStream = Responses<SearchResponse>;

    async fn search(
        &self,
        request: Request<SearchRequest>,
    ) -> Result<Response<Self::SearchStream>, Status> {
        let mut request = request.into_inner();
        let place = Place::check(request.path.take(), "path")?;
        // Compiles what may be large, so not on the agent's own thread.
        let open = move |place: &Place, view: &View| {
            Search::open(place, view, search::Asked::check(&request)?)
        };
        Ok(Response::new(self.jobs.stream(place, open).await?))
    }

    type WatchStream = Responses<WatchResponse>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let WatchRequest { path, recursive } = request.into_inner();
        let place = Place::check(path, "path")?;
        let watched = watch::watch(&self.jobs, place, recursive).await?;
        Ok(Response::new(watched))
    }

    type DownloadStream = Responses<DownloadResponse>;

    async fn download(
        &self,
        request: Request<DownloadRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        let request = request.into_inner();
        let compression = request.compression();
        let place = Place::check(request.path, "path")?;
        let open = move |place: &Place, view: &View| Download::open(place, view, compression);
        Ok(Response::new(self.jobs.stream(place, open).await?))
    }

    async fn upload(
        &self,
        request: Request<Streaming<UploadRequest>>,
    ) -> Result<Response<UploadResponse>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let Some(upload_request::Message::Open(mut open)) = first.and_then(|first| first.message)
        else {
            return Err(Violations::of("open", "must be the first message of the call").into());
        };
        let place = Place::check(open.path.take(), "open.path")?;
        let compression = archive::check(&open)?;
        let open =
            move || place.visit(|view| Upload::open(&place, view, compression, open.keep_owners));
        let uploaded = incoming::feed(&self.jobs, requests, open, archive::piece, true);
        Ok(Response::new(uploaded.await?))
    }
}
