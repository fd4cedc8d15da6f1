//! The daemon of a SoulBox host; see `soulbox_host::daemon`.

fn main() -> std::process::ExitCode {
    soulbox_host::daemon::main()
}
