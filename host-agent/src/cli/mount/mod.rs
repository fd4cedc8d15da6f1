//! `soulbox mount`: files of a sandbox in a directory of the host, through FUSE.

mod answers;
mod attributes;
mod content;
mod errno;
mod filesystem;
mod guest;
mod handles;
mod invalidate;
mod listing;
mod point;
mod tree;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clap::builder::{OsStringValueParser, TypedValueParser as _};
use fuser::{Config, FileType, Session, SessionACL};
use soulbox_proto::guest::v1::StatRequest;
use tokio::time::MissedTickBehavior;

use self::attributes::Attributes;
use self::filesystem::Mounted;
use self::guest::Guest;
use self::invalidate::Invalidations;
pub(super) use self::point::MountError;
use self::point::{MountPoint, Options};
use super::connect::Host;
use super::error::CliError;
use super::place::{Files, Place, answer};
use super::signals::Signals;

/// How long the first watch may take before the mount is used without.
const FIRST_WATCH: Duration = Duration::from_secs(5);
/// How long the last writes may take.
const LAST_WRITES: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub(super) struct MountArgs {
    /// The sandbox, and which of its directories [default: the user's home].
    #[arg(value_name = "SANDBOX[:PATH]",
        value_parser = OsStringValueParser::new().try_map(Place::parse))]
    place: Place,
    /// A directory here.
    #[arg(value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    directory: PathBuf,
    /// As which of the sandbox's users: a name or UID[:GID] [default: the template's].
    #[arg(long, default_value = "", hide_default_value = true)]
    user: String,
    /// Refuse to change anything.
    #[arg(long)]
    read_only: bool,
    /// Let other users of this host in, with all the rights that the sandbox gives.
    #[arg(long)]
    allow_other: bool,
}

/// Until a signal, an unmount, or the sandbox's end.
pub(super) async fn mount(host: &Host, args: MountArgs) -> Result<u8, CliError> {
    let mut signals = Signals::install()?;
    let guest = open(host, &args).await?;
    let place = args.place.to_string();
    let source = point::source(&place);
    let options = Options {
        source: &source,
        read_only: args.read_only,
        allow_other: args.allow_other,
    };
    let (guest, queue) = guest;
    let (point, device) = MountPoint::attach(&args.directory, &options)?;
    let (mounted, mut ended) = Mounted::new(Arc::clone(&guest), tokio::runtime::Handle::current());
    let acl = match args.allow_other {
        true => SessionACL::All,
        false => SessionACL::Owner,
    };
    let session = device.try_clone().and_then(|again| {
        let session = Session::from_fd(mounted, device, acl, Config::default())?;
        Ok((session.spawn()?, again))
    });
    let (session, device) = session.map_err(|source| {
        point.detach();
        MountError::Session { source }
    })?;
    invalidate::run(session.notifier(), device, queue);
    let (state, mut told) = tokio::sync::watch::channel(watch::State::Starting);
    let watching = watch::keep(Arc::clone(&guest), state);
    tokio::pin!(watching);
    let ready = ready(&mut told, &place, point.path());
    tokio::pin!(ready);
    let mut is_ready = false;
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let gone = loop {
        tokio::select! {
            _ = signals.next() => break None,
            _ = &mut ended => break None,
            status = &mut watching => break Some(status),
            () = &mut ready, if !is_ready => is_ready = true,
            _ = tick.tick() => guest.settle_idle().await,
        }
    };
    if gone.is_none() {
        // Without an answer they stay undone.
        let _ = tokio::time::timeout(LAST_WRITES, guest.end()).await;
    }
    point.detach();
    match gone {
        None => Ok(0),
        Some(status) => Err(MountError::Gone {
            path: point.path().display().to_string(),
            said: status.message().to_owned(),
        }
        .into()),
    }
}

type Queue = tokio::sync::mpsc::Receiver<Vec<tree::Stale>>;

/// The directory in the guest.
async fn open(host: &Host, args: &MountArgs) -> Result<(Arc<Guest>, Queue), CliError> {
    let place = &args.place;
    let metrics = host.metrics(&place.sandbox).await?;
    // On a connection of its own, which no unread file holds up.
    let watched = Files::of(host.files(&place.sandbox).await?, &args.user);
    let files = Files::of(host.files(&place.sandbox).await?, &args.user);
    let base = Bytes::from(place.path.clone());
    let request = StatRequest {
        path: files.path(base.clone()),
        follow: true,
    };
    let said = answer(files.client.clone().stat(request)).await?;
    let root = Attributes::try_from(said.entry);
    let root = root.map_err(|error| CliError::Nonsense {
        message: error.to_string(),
    })?;
    if root.identity.kind != FileType::Directory {
        let place = place.to_string();
        return Err(MountError::NotADirectory { place }.into());
    }
    let (invalidations, queue) = Invalidations::new();
    let guest = Guest::new([files, watched], metrics, base, &root, invalidations);
    Ok((Arc::new(guest), queue))
}

/// Says so once, when the first watch stands, or will not.
async fn ready(
    told: &mut tokio::sync::watch::Receiver<watch::State>,
    place: &str,
    directory: &std::path::Path,
) {
    let known = told.wait_for(|state| *state != watch::State::Starting);
    let state = match tokio::time::timeout(FIRST_WATCH, known).await {
        Ok(Ok(state)) => state.clone(),
        Ok(Err(_)) | Err(_) => watch::State::Starting,
    };
    if let watch::State::Refused(said) = state {
        eprintln!("soulbox: nothing is cached while the sandbox cannot watch its files: {said}");
    }
    let directory = directory.display();
    eprintln!("soulbox: ready: {place} is on {directory}; Ctrl-C unmounts it");
}
