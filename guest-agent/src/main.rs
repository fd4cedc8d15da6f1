use std::process::ExitCode;

use soulbox_guest::options::{Options, USAGE, Wanted};

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args_os().skip(1), std::process::id()) {
        Ok(Wanted::Run(options)) => options,
        Ok(Wanted::Help) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Ok(Wanted::Version) => {
            println!("soulbox-guest {}", soulbox_guest::VERSION);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("soulbox-guest: {error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match soulbox_guest::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soulbox-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}
