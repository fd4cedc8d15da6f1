//! Streams to a guest without its agent: the floors.
//!
//! A few lines of Python serve them in the guest (`helper.py`). The bench reaches them
//! through the monitor's vsock socket, as soulboxd reaches the agent; where an agent
//! runs as a process of this host, through a Unix socket.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::agent::{Agent, Held};

const HELPER: &str = include_str!("helper.py");
const PORT: u32 = 5201;
/// As the helper's.
const BUFFER_BYTES: usize = 1 << 20;
/// Without a byte, whatever the guest does meanwhile.
const SILENCE: Duration = Duration::from_secs(120);
/// "OK 4294967295".
const MAX_ANSWER_BYTES: usize = 13;
const DONE: u8 = b'!';

/// Where the helper listens, as the host sees it.
pub(super) enum Way {
    /// A socket of a monitor, through which guest ports are dialled.
    Vsock(PathBuf),
    Unix(PathBuf),
}

pub(super) struct Raw {
    way: Way,
    echo: UnixStream,
    _helper: Option<Held>,
}

// === impl Way ===

impl Way {
    /// What the helper is told.
    fn address(&self) -> Result<String> {
        match self {
            Self::Vsock(_) => Ok(PORT.to_string()),
            Self::Unix(path) => Ok(path
                .to_str()
                .context("a folder with a strange name")?
                .into()),
        }
    }

    fn ask(&self, command: &str) -> Result<UnixStream> {
        let (Self::Vsock(path) | Self::Unix(path)) = self;
        let mut stream = UnixStream::connect(path)
            .with_context(|| format!("connecting to {}", path.display()))?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        if let Self::Vsock(_) = self {
            shake_hands(&mut stream)?;
        }
        writeln!(stream, "{command}")?;
        Ok(stream)
    }
}

/// One line each way, as with Firecracker. What follows the answer is the guest's.
fn shake_hands(stream: &mut (impl Read + Write)) -> Result<()> {
    writeln!(stream, "CONNECT {PORT}")?;
    let mut answer = Vec::new();
    let mut byte = [0];
    while answer.len() <= MAX_ANSWER_BYTES {
        stream
            .read_exact(&mut byte)
            .context("the monitor's vsock refused the connection")?;
        match byte[0] {
            b'\n' if answer.starts_with(b"OK ") => return Ok(()),
            b'\n' => break,
            byte => answer.push(byte),
        }
    }
    bail!(
        "the monitor's vsock answered {:?}",
        String::from_utf8_lossy(&answer)
    )
}

// === impl Raw ===

impl Raw {
    /// Starts the helper through the agent; it ends with this.
    pub(super) async fn start(agent: &mut Agent, way: Way) -> Result<Self> {
        let helper = agent
            .hold(&["python3", "-c", HELPER, &way.address()?])
            .await;
        let helper = helper.context("starting a Python program in the guest")?;
        Self::of(way, Some(helper))
    }

    fn of(way: Way, helper: Option<Held>) -> Result<Self> {
        Ok(Self {
            echo: way.ask("echo")?,
            way,
            _helper: helper,
        })
    }

    /// One byte, there and back.
    pub(super) fn round_trip(&self) -> Result<Duration> {
        let mut byte = [0];
        let mut echo = &self.echo;
        let start = Instant::now();
        echo.write_all(&byte)?;
        echo.read_exact(&mut byte).context("waiting for an echo")?;
        Ok(start.elapsed())
    }

    /// What so many fork, exec and wait of /bin/true took, as the guest measured it.
    pub(super) fn spawn(&self, count: u32) -> Result<Vec<Duration>> {
        let mut stream = self.way.ask(&format!("spawn {count}"))?;
        let mut json = String::new();
        stream
            .read_to_string(&mut json)
            .context("waiting for spawns")?;
        times(&json, count as usize)
    }

    /// To the guest, until it has all.
    pub(super) fn put(&self, bytes: u64) -> Result<Duration> {
        let buffer = vec![0; BUFFER_BYTES];
        let start = Instant::now();
        let mut stream = self.way.ask(&format!("take {bytes}"))?;
        let mut left = bytes;
        while left > 0 {
            let size = left.min(BUFFER_BYTES as u64);
            stream.write_all(&buffer[..size as usize])?;
            left -= size;
        }
        await_done(&mut stream)?;
        Ok(start.elapsed())
    }

    /// From the guest.
    pub(super) fn get(&self, bytes: u64) -> Result<Duration> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let start = Instant::now();
        let mut stream = self.way.ask(&format!("give {bytes}"))?;
        let mut left = bytes;
        while left > 0 {
            let read = stream.read(&mut buffer)? as u64;
            ensure!(read > 0, "a stream of {bytes} bytes ended {left} short");
            left = left.saturating_sub(read);
        }
        Ok(start.elapsed())
    }

    /// Into a new file there, of what is there already.
    pub(super) fn fill(&self, file: &str, bytes: u64) -> Result<Duration> {
        self.until_done(&format!("fill {file} {bytes}"))
    }

    /// Out of a file there, which goes, to nowhere.
    pub(super) fn drain(&self, file: &str) -> Result<Duration> {
        self.until_done(&format!("drain {file}"))
    }

    fn until_done(&self, command: &str) -> Result<Duration> {
        let start = Instant::now();
        await_done(&mut self.way.ask(command)?)?;
        Ok(start.elapsed())
    }

    /// What is in a folder here, into a new one there.
    pub(super) fn unpack(&self, from: &Path, to: &str) -> Result<Duration> {
        let start = Instant::now();
        let mut stream = self.way.ask(&format!("unpack {to}"))?;
        let packed = pack_command(from)
            .stdout(OwnedFd::from(stream.try_clone()?))
            .status();
        ensure!(packed.context("running tar")?.success(), "tar failed here");
        stream.shutdown(Shutdown::Write)?;
        await_done(&mut stream).context("tar failed in the guest")?;
        Ok(start.elapsed())
    }

    /// What is in a folder there, into one here.
    pub(super) fn pack(&self, from: &str, to: &Path) -> Result<Duration> {
        let start = Instant::now();
        let stream = self.way.ask(&format!("pack {from}"))?;
        let unpacked = unpack_command(to).stdin(OwnedFd::from(stream)).status();
        ensure!(
            unpacked.context("running tar")?.success(),
            "tar failed here"
        );
        Ok(start.elapsed())
    }
}

/// The host's side of a tree that travels.
pub(super) fn pack_command(folder: &Path) -> Command {
    let mut tar = Command::new("tar");
    tar.args(["-cf", "-", "-C"]).arg(folder).arg(".");
    tar.stdin(Stdio::null());
    tar
}

pub(super) fn unpack_command(folder: &Path) -> Command {
    let mut tar = Command::new("tar");
    // Of the agent's archives the users are the guest's.
    tar.args(["--no-same-owner", "-xf", "-", "-C"]).arg(folder);
    tar.stdout(Stdio::null());
    tar
}

fn await_done(stream: &mut UnixStream) -> Result<()> {
    let mut done = [0];
    stream
        .read_exact(&mut done)
        .context("waiting for the guest")?;
    ensure!(done == [DONE], "the guest said {done:?}");
    Ok(())
}

fn times(json: &str, count: usize) -> Result<Vec<Duration>> {
    let seconds: Vec<f64> =
        serde_json::from_str(json).with_context(|| format!("the guest's times are {json:?}"))?;
    ensure!(
        seconds.len() == count,
        "the guest has {} times of {count}",
        seconds.len()
    );
    let time = |&seconds: &f64| Duration::try_from_secs_f64(seconds);
    let times: Result<_, _> = seconds.iter().map(time).collect();
    times.context("a time of the guest is none")
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Cursor};
    use std::process::Child;

    use super::*;

    struct Helper {
        child: Child,
        raw: Raw,
        folder: tempfile::TempDir,
    }

    impl Helper {
        fn start() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let way = Way::Unix(folder.path().join("helper.sock"));
            let mut child = Command::new("python3")
                .args(["-c", HELPER, &way.address().unwrap()])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut said = String::new();
            let mut stdout = BufReader::new(child.stdout.take().unwrap());
            stdout.read_line(&mut said).unwrap();
            assert_eq!(said, "ready\n");
            Self {
                raw: Raw::of(way, None).unwrap(),
                child,
                folder,
            }
        }
    }

    impl Drop for Helper {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    #[test]
    fn the_helper_does_what_it_is_asked() {
        let mut helper = Helper::start();
        let raw = &mut helper.raw;
        raw.round_trip().unwrap();
        raw.round_trip().unwrap();
        assert_eq!(raw.spawn(3).unwrap().len(), 3);
        for bytes in [0, 1, 3 * BUFFER_BYTES as u64 + 1] {
            raw.put(bytes).unwrap();
            raw.get(bytes).unwrap();
            let file = helper.folder.path().join("file");
            raw.fill(file.to_str().unwrap(), bytes).unwrap();
            assert_eq!(file.metadata().unwrap().len(), bytes);
            raw.drain(file.to_str().unwrap()).unwrap();
            assert!(!file.exists());
        }
        assert!(
            raw.way
                .ask("nothing")
                .and_then(|mut peer| await_done(&mut peer))
                .is_err()
        );
    }

    #[test]
    fn trees_travel() {
        let helper = Helper::start();
        let folder = helper.folder.path();
        let (here, back) = (folder.join("here"), folder.join("back"));
        std::fs::create_dir_all(here.join("inner")).unwrap();
        std::fs::create_dir(&back).unwrap();
        std::fs::write(here.join("inner/file"), vec![7; 100_000]).unwrap();
        let there = folder.join("there").to_str().unwrap().to_owned();
        helper.raw.unpack(&here, &there).unwrap();
        helper.raw.pack(&there, &back).unwrap();
        let read = std::fs::read(back.join("inner/file")).unwrap();
        assert_eq!(read, vec![7; 100_000]);

        // It is there already; and no tree is no archive.
        assert!(helper.raw.unpack(&here, &there).is_err());
        assert!(helper.raw.pack("/nowhere", &back).is_err());
    }

    #[test]
    fn a_refused_handshake_is_told() {
        let shake = |answer: &[u8]| {
            let mut stream = Cursor::new(vec![0; 13]);
            stream.get_mut().extend(answer);
            let shaken = shake_hands(&mut stream);
            assert!(stream.get_ref().starts_with(b"CONNECT 5201\n"));
            shaken.map(|()| stream.position())
        };
        // Not a byte of what follows is taken.
        assert_eq!(shake(b"OK 1073741824\nmore").unwrap(), 13 + 14);
        for bad in [&b""[..], b"NO\n", b"OK 11111111111111111111111\n"] {
            assert!(shake(bad).is_err());
        }
    }

    #[test]
    fn times_are_read_or_refused() {
        let millis = Duration::from_millis;
        assert_eq!(times("[0.001, 0.25]", 2).unwrap(), [millis(1), millis(250)]);
        for bad in ["", "[0.1]", "[0.1, 0.2, 0.3]", "[0.1, -1]", "[0.1, null]"] {
            assert!(times(bad, 2).is_err(), "{bad}");
        }
    }
}
