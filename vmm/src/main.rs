//! `soulbox-vmm`: one process is one microVM.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::process::ExitCode;

use soulbox_vmm::monitor::Outcome;
use soulbox_vmm::{error_chain, jail, monitor};

const HELP: &str = "\
soulbox-vmm: SoulBox's KVM monitor; one process is one microVM

It is started by soulboxd, not by hand: all it works with comes as descriptors
over its control socket (proto/soulbox/vmm/v1/control.proto).

Usage: soulbox-vmm --control-fd N

Options:
      --control-fd N  The inherited SOCK_SEQPACKET control socket
  -h, --help          Print this help
  -V, --version       Print the version

Exit status: 0 when the machine ended as its guest or its client asked,
1 when it could not be built or broke down, 2 for a wrong command line.";

enum Command {
    Run(RawFd),
    Print(String),
}

fn main() -> ExitCode {
    let control = match parse(std::env::args().skip(1)) {
        Ok(Command::Run(fd)) => fd,
        Ok(Command::Print(text)) => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(problem) => {
            eprintln!("soulbox-vmm: {problem}; see soulbox-vmm --help");
            return ExitCode::from(2);
        }
    };
    // A monitor that is half broken must not go on serving its guest.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("soulbox-vmm: {panic}");
        std::process::abort();
    }));
    let Some(control) = own(control) else {
        eprintln!("soulbox-vmm: descriptor {control} is not a socket; start it through soulboxd");
        return ExitCode::from(2);
    };
    if let Err(error) = jail::enter(&control) {
        eprintln!("soulbox-vmm: {}", error_chain(&error));
        return ExitCode::FAILURE;
    }
    match monitor::run(control) {
        // Exits with the machine undropped; see `run`.
        Ok((Outcome::Ended, _machine)) => std::process::exit(0),
        Ok((Outcome::Failed, _machine)) => std::process::exit(1),
        Err(error) => {
            eprintln!("soulbox-vmm: {}", error_chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// One option does not need a parser crate in a process that is started for
/// every sandbox.
fn parse(mut args: impl Iterator<Item = String>) -> Result<Command, String> {
    match (args.next().as_deref(), args.next(), args.next()) {
        (Some("-h" | "--help"), None, None) => Ok(Command::Print(HELP.to_owned())),
        (Some("-V" | "--version"), None, None) => {
            let version = concat!("soulbox-vmm ", env!("CARGO_PKG_VERSION"));
            Ok(Command::Print(version.to_owned()))
        }
        (Some("--control-fd"), Some(fd), None) => match fd.parse() {
            Ok(fd) if fd >= 0 => Ok(Command::Run(fd)),
            _ => Err(format!("--control-fd takes a descriptor number, not {fd}")),
        },
        (None, _, _) => Err("--control-fd is missing".to_owned()),
        (Some(other), _, _) => Err(format!("{other} is not understood here")),
    }
}

/// Takes over the inherited descriptor, if it is an open socket.
#[allow(unsafe_code)]
fn own(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: the number comes from the parent, which passes a descriptor for
    // this process to own. Nothing else here has been opened yet, so nobody
    // else owns it; if it is not open at all, the check below says so before it
    // is used, and the number is given up without being closed.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    match rustix::net::sockopt::socket_type(&owned) {
        Ok(_) => {
            rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC).ok()?;
            Some(owned)
        }
        Err(_) => {
            let _ = owned.into_raw_fd();
            None
        }
    }
}
