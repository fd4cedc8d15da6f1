//! The command line of SoulBox; see `soulbox_host::cli`.

fn main() -> std::process::ExitCode {
    soulbox_host::cli::main()
}
