//! For tests and benches: a client that drives one `soulbox-vmm` process step
//! by step, and guests of a few instructions. (`soulboxd` has a client of its
//! own, asynchronous and tied to its records.)

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use prost::Message as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use soulbox_proto::vmm::v1::{self, from_monitor::Message, reply::Result as Reply, request::Op};
use soulbox_proto::vmm::{MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS};

pub mod tap;

/// ELF machine number of x86-64.
pub const EM_X86_64: u16 = 62;
/// Where a tiny guest's code lies and starts.
pub const TINY_ENTRY: u64 = 0x10_0000;

/// The address of a guest's network device.
pub const GUEST_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];

/// How long a monitor may take to answer before a test gives up on it.
const PATIENCE: Duration = Duration::from_secs(120);

/// A monitor process and the control connection to it. Dropping it kills and
/// reaps the process.
#[derive(Debug)]
pub struct Monitor {
    child: Child,
    control: Control,
}

/// The client's end of a control connection.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    next_id: u64,
    /// Events that came while a reply was waited for, with their descriptors.
    events: Vec<(v1::event::Event, Vec<OwnedFd>)>,
}

/// A Boot request under construction.
#[derive(Debug)]
pub struct BootSpec {
    pub boot: v1::Boot,
    pub fds: Vec<OwnedFd>,
}

/// A Restore request under construction.
#[derive(Debug)]
pub struct RestoreSpec {
    pub restore: v1::Restore,
    pub fds: Vec<OwnedFd>,
}

// === impl Monitor ===

impl Monitor {
    /// Starts a monitor. The control socket is its stdin, so that the standard
    /// library can use posix_spawn.
    pub fn spawn(program: &Path) -> io::Result<Self> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let child = Command::new(program)
            .args(["--control-fd", "0"])
            .env_clear()
            .stdin(Stdio::from(theirs))
            .spawn()?;
        // A spawn returns before exec has exchanged the memory, whose pagemap is wanted.
        let before = std::fs::read_link("/proc/self/exe")?;
        let program = format!("/proc/{}/exe", child.id());
        while std::fs::read_link(&program).is_ok_and(|program| program == before) {
            std::thread::yield_now();
        }
        Ok(Self {
            child,
            control: Control::new(ours),
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn control(&mut self) -> &mut Control {
        &mut self.control
    }

    /// The process's page map, which it cannot open itself.
    pub fn pagemap(&self) -> io::Result<File> {
        File::open(format!("/proc/{}/pagemap", self.pid()))
    }

    /// Waits until the process has ended by itself.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        let give_up = Instant::now() + PATIENCE;
        loop {
            match self.child.try_wait()? {
                Some(status) => return Ok(status),
                None if Instant::now() > give_up => return Err(io::ErrorKind::TimedOut.into()),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Closes the control connection, as a client that has died would.
    pub fn abandon(&mut self) -> io::Result<()> {
        let (unconnected, _) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        self.control = Control::new(unconnected);
        Ok(())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // It may have ended by itself; then there is only the zombie to reap.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// === impl Control ===

impl Control {
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            next_id: 1,
            events: Vec::new(),
        }
    }

    /// Sends a request with descriptors and waits for its reply.
    pub fn request(&mut self, op: Op, fds: &[OwnedFd]) -> io::Result<Reply> {
        Ok(self.request_with_fds(op, fds)?.0)
    }

    /// The same, with the descriptors of the reply.
    pub fn request_with_fds(
        &mut self,
        op: Op,
        fds: &[OwnedFd],
    ) -> io::Result<(Reply, Vec<OwnedFd>)> {
        let id = self.post(op, fds)?;
        self.reply_to(id)
    }

    /// Sends a request without waiting for its reply. Returns its id.
    pub fn post(&mut self, op: Op, fds: &[OwnedFd]) -> io::Result<u64> {
        let id = self.next_id;
        self.next_id += 1;
        let request = v1::Request { id, op: Some(op) };
        self.send(&request.encode_to_vec(), fds)?;
        Ok(id)
    }

    /// Waits for the reply to the last request.
    pub fn reply_to(&mut self, id: u64) -> io::Result<(Reply, Vec<OwnedFd>)> {
        loop {
            match self.receive()? {
                (Message::Reply(reply), fds) if reply.id == id => {
                    let result = reply.result.ok_or(io::ErrorKind::InvalidData)?;
                    return Ok((result, fds));
                }
                (Message::Reply(_), _) => return Err(io::ErrorKind::InvalidData.into()),
                (Message::Event(event), fds) => self.events.extend(event.event.map(|e| (e, fds))),
            }
        }
    }

    /// Boots; a refusal is an error with the monitor's message.
    pub fn boot(&mut self, spec: BootSpec) -> io::Result<v1::Booted> {
        match self.request(Op::Boot(spec.boot), &spec.fds)? {
            Reply::Booted(booted) => Ok(booted),
            other => Err(refused(other)),
        }
    }

    /// Makes a shell; a refusal is an error with the monitor's message.
    pub fn prepare(&mut self, shape: v1::MachineShape) -> io::Result<v1::Prepared> {
        let prepare = v1::Prepare {
            shape: Some(shape),
            ..v1::Prepare::default()
        };
        self.prepare_with(prepare, vec![kvm()?])
    }

    /// As [`Self::prepare`], with more descriptors than that of KVM.
    pub fn prepare_with(
        &mut self,
        prepare: v1::Prepare,
        fds: Vec<OwnedFd>,
    ) -> io::Result<v1::Prepared> {
        match self.request(Op::Prepare(prepare), &fds)? {
            Reply::Prepared(prepared) => Ok(prepared),
            other => Err(refused(other)),
        }
    }

    /// Restores; a refusal is an error with the monitor's message. With the reply
    /// come the host's ends of the spare connections.
    pub fn restore(&mut self, spec: RestoreSpec) -> io::Result<(v1::Restored, Vec<OwnedFd>)> {
        match self.request_with_fds(Op::Restore(spec.restore), &spec.fds)? {
            (Reply::Restored(restored), spares) => Ok((restored, spares)),
            (other, _) => Err(refused(other)),
        }
    }

    /// Snapshots a machine without disks into `folder`; it goes on.
    pub fn snapshot(&mut self, folder: &Path, keep: u32) -> io::Result<v1::Snapshotted> {
        let new = |name| File::create_new(folder.join(name)).map(OwnedFd::from);
        let snapshot = v1::Snapshot {
            state_fd: 0,
            memory_fd: 1,
            keep_memory_layers: keep,
            disks: Vec::new(),
            leave_paused: false,
        };
        let fds = [new("snapshot")?, new("memory")?];
        match self.request(Op::Snapshot(snapshot), &fds)? {
            Reply::Snapshotted(snapshotted) => Ok(snapshotted),
            other => Err(refused(other)),
        }
    }

    pub fn metrics(&mut self) -> io::Result<v1::Metrics> {
        match self.request(Op::GetMetrics(v1::GetMetrics {}), &[])? {
            Reply::Metrics(metrics) => Ok(metrics),
            other => Err(io::Error::other(format!("{other:?}"))),
        }
    }

    /// Waits for the next event.
    pub fn event(&mut self) -> io::Result<(v1::event::Event, Vec<OwnedFd>)> {
        if !self.events.is_empty() {
            return Ok(self.events.remove(0));
        }
        match self.receive()? {
            (Message::Event(v1::Event { event: Some(event) }), fds) => Ok((event, fds)),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Waits for the end of the machine.
    pub fn exited(&mut self) -> io::Result<v1::Exited> {
        loop {
            if let (v1::event::Event::Exited(exited), _) = self.event()? {
                return Ok(exited);
            }
        }
    }

    /// Sends bytes as they are.
    pub fn send(&self, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        }
        sendmsg(
            &self.socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    fn receive(&self) -> io::Result<(Message, Vec<OwnedFd>)> {
        wait_readable(&self.socket)?;
        let mut bytes = vec![0; MAX_MESSAGE_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let fds = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        let message = v1::FromMonitor::decode(&bytes[..received.bytes])?
            .message
            .ok_or(io::ErrorKind::InvalidData)?;
        Ok((message, fds))
    }
}

// === impl BootSpec ===

impl BootSpec {
    /// A machine without disks or vsock that enters `kernel`, an ELF image or a
    /// bzImage.
    pub fn new(vcpu_count: u32, memory_mib: u32, kernel: &[u8]) -> io::Result<Self> {
        let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC)?);
        file.write_all(kernel)?;
        Ok(Self {
            boot: v1::Boot {
                machine: Some(v1::MachineConfig {
                    vcpu_count,
                    memory_mib,
                    ..Default::default()
                }),
                kvm_fd: 0,
                kernel_fd: 1,
                console_fd: None,
                control_listener_fd: None,
                pagemap_fd: None,
            },
            fds: vec![kvm()?, file.into()],
        })
    }

    /// Adds a descriptor and returns its index.
    pub fn add_fd(&mut self, fd: impl Into<OwnedFd>) -> u32 {
        self.fds.push(fd.into());
        (self.fds.len() - 1) as u32
    }

    /// Lets the monitor find the memory that its guest writes.
    pub fn with_pagemap(mut self, monitor: &Monitor) -> io::Result<Self> {
        let pagemap = monitor.pagemap()?;
        self.boot.pagemap_fd = Some(self.add_fd(pagemap));
        Ok(self)
    }

    /// Gives the guest's console a pipe and returns its reading end.
    pub fn with_console(mut self) -> io::Result<(Self, io::PipeReader)> {
        let (reader, writer) = io::pipe()?;
        self.boot.console_fd = Some(self.add_fd(writer));
        Ok((self, reader))
    }

    /// Gives the guest a network device without limits, on a TAP if there is
    /// one.
    pub fn with_net(mut self, tap: Option<OwnedFd>) -> Self {
        let tap_fd = tap.map(|tap| self.add_fd(tap));
        if let Some(machine) = &mut self.boot.machine {
            machine.net = Some(net(tap_fd));
        }
        self
    }
}

// === impl RestoreSpec ===

impl RestoreSpec {
    /// The snapshot of a machine without disks or vsock, in the last of the
    /// folders that it builds on. Without `kvm` there must be a shell.
    pub fn new(folders: &[&Path], kvm: Option<OwnedFd>) -> io::Result<Self> {
        let mut spec = Self::with_layers(folders, 0)?;
        spec.restore.kvm_fd = kvm.map(|kvm| spec.add_fd(kvm));
        Ok(spec)
    }

    /// The same, in a shell that has the memory of the first folder.
    pub fn on_first_layer(folders: &[&Path]) -> io::Result<Self> {
        let mut spec = Self::with_layers(folders, 1)?;
        spec.restore.first_layer_prepared = true;
        Ok(spec)
    }

    fn with_layers(folders: &[&Path], prepared: usize) -> io::Result<Self> {
        let own = folders.last().ok_or(io::ErrorKind::InvalidInput)?;
        let mut spec = Self {
            restore: v1::Restore::default(),
            fds: Vec::new(),
        };
        spec.restore.state_fd = spec.add_fd(File::open(own.join("snapshot"))?);
        for folder in folders.iter().skip(prepared) {
            let memory = spec.add_fd(File::open(folder.join("memory"))?);
            spec.restore.memory_fds.push(memory);
        }
        Ok(spec)
    }

    /// Adds a descriptor and returns its index.
    pub fn add_fd(&mut self, fd: impl Into<OwnedFd>) -> u32 {
        self.fds.push(fd.into());
        (self.fds.len() - 1) as u32
    }

    /// Lets the monitor find the memory that its guest writes.
    pub fn with_pagemap(mut self, monitor: &Monitor) -> io::Result<Self> {
        let pagemap = monitor.pagemap()?;
        self.restore.pagemap_fd = Some(self.add_fd(pagemap));
        Ok(self)
    }

    /// Gives the guest's console a pipe and returns its reading end.
    pub fn with_console(mut self) -> io::Result<(Self, io::PipeReader)> {
        let (reader, writer) = io::pipe()?;
        self.restore.console_fd = Some(self.add_fd(writer));
        Ok((self, reader))
    }

    /// Gives the machine's network device no limits, and a TAP if there is one.
    pub fn with_net(mut self, tap: Option<OwnedFd>) -> Self {
        let tap_fd = tap.map(|tap| self.add_fd(tap));
        self.restore.net = Some(net(tap_fd));
        self
    }
}

fn net(tap_fd: Option<u32>) -> v1::Net {
    v1::Net {
        mac: GUEST_MAC.to_vec(),
        tap_fd,
        ..Default::default()
    }
}

fn refused(reply: Reply) -> io::Error {
    match reply {
        Reply::Error(error) => io::Error::other(error.message),
        other => io::Error::other(format!("{other:?}")),
    }
}

/// `/dev/kvm`.
pub fn kvm() -> io::Result<OwnedFd> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    Ok(kvm.into())
}

/// An ELF executable of one segment, loaded and entered at `address`.
pub fn elf(machine: u16, address: u64, code: &[u8]) -> Vec<u8> {
    const HEADER_BYTES: usize = 64;
    const SEGMENT_HEADER_BYTES: usize = 56;
    let code_at = HEADER_BYTES + SEGMENT_HEADER_BYTES;
    let mut image = vec![0u8; code_at];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01"); // 64-bit, little-endian, version 1
    put(16, &2u16.to_le_bytes()); // ET_EXEC
    put(18, &machine.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(24, &address.to_le_bytes()); // e_entry
    put(32, &(HEADER_BYTES as u64).to_le_bytes()); // e_phoff
    put(52, &(HEADER_BYTES as u16).to_le_bytes());
    put(54, &(SEGMENT_HEADER_BYTES as u16).to_le_bytes());
    put(56, &1u16.to_le_bytes()); // e_phnum
    put(HEADER_BYTES, &1u32.to_le_bytes()); // PT_LOAD
    put(HEADER_BYTES + 4, &7u32.to_le_bytes()); // rwx
    put(HEADER_BYTES + 8, &(code_at as u64).to_le_bytes());
    put(HEADER_BYTES + 16, &address.to_le_bytes());
    put(HEADER_BYTES + 24, &address.to_le_bytes());
    put(HEADER_BYTES + 32, &(code.len() as u64).to_le_bytes());
    put(HEADER_BYTES + 40, &(code.len() as u64).to_le_bytes());
    image.extend_from_slice(code);
    image
}

/// A kernel image of a few instructions of 64-bit code.
pub fn tiny_guest(code: &[u8]) -> Vec<u8> {
    elf(EM_X86_64, TINY_ENTRY, code)
}

/// Instructions for tiny guests.
pub mod code {
    /// Writes one byte to an I/O port: `mov dx, port; mov al, byte; out dx, al`.
    pub fn out(port: u16, byte: u8) -> Vec<u8> {
        let [low, high] = port.to_le_bytes();
        vec![0x66, 0xba, low, high, 0xb0, byte, 0xee]
    }

    /// Waits for ever: `hlt; jmp -3`.
    pub const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

    /// Never leaves the guest: `jmp -2`.
    pub const SPIN: [u8; 2] = [0xeb, 0xfe];

    /// An instruction that does not exist. There is no interrupt table, so the
    /// fault becomes a triple fault: `ud2`.
    pub const CRASH: [u8; 2] = [0x0f, 0x0b];
}

fn wait_readable(fd: &OwnedFd) -> io::Result<()> {
    let timeout = Timespec {
        tv_sec: PATIENCE.as_secs() as i64,
        tv_nsec: 0,
    };
    match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}
