//! `replica`: the agent on a protected machine and the operator's command line. This
//! file only dispatches; each command has a file of its own in `commands`, the daemon is
//! in `run`.

mod cli;
mod commands;
mod control;
mod failure;
mod log_command;
mod output;
mod plan;
mod quantity;
mod requests;
mod run;
mod store_folder;
mod text;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use cli::{Cli, Command, StoreCommand};
use failure::Failure;

fn main() -> ExitCode {
    // Not one of clap's subcommands: nobody but the daemon starts it, and no usage names it.
    let mut arguments = std::env::args_os().skip(1);
    let outcome = match (arguments.next(), arguments.next()) {
        (Some(first), None) if first == "watchdog" => run::watchdog(),
        _ => dispatch(Cli::parse()),
    };
    match outcome {
        Ok(code) => code,
        // A reader that has seen enough (`| head`) is no failure of ours.
        Err(Failure::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("replica: {failure}");
            failure.exit_code()
        }
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode, Failure> {
    let daemon = cli.daemon;
    match cli.command {
        Command::Run(args) => run::run(&daemon, &args),
        Command::Protect(args) => commands::protect::run(&daemon, args),
        Command::Unprotect(args) => commands::volume::unprotect(&daemon, args),
        Command::Pause(args) => commands::volume::pause(&daemon, args),
        Command::Resume(args) => commands::volume::resume(&daemon, args),
        Command::Status(args) => commands::status::run(&daemon, &args),
        Command::Point(args) => commands::point::run(&daemon, args),
        Command::Points(args) => commands::points::run(&daemon, &args),
        Command::Restore(args) => commands::restore::run(&daemon, &args),
        Command::Open(args) => commands::open::run(&daemon, &args),
        Command::Close(args) => commands::open::close(&daemon, args),
        Command::Verify(args) => commands::volume::verify(&daemon, args),
        Command::Resync(args) => commands::volume::resync(&daemon, &args),
        Command::Adopt(args) => commands::adopt::run(&daemon, args),
        Command::Failover(args) => commands::failover::run(&daemon, &args),
        Command::ChangePoint(args) => commands::failover::change_point(&daemon, &args),
        Command::Commit(args) => commands::failover::commit(&daemon, &args),
        Command::Reprotect(args) => commands::home::reprotect(&daemon, &args),
        Command::Failback(args) => commands::home::failback(&daemon, &args),
        Command::Drill(args) => commands::drill::run(&daemon, &args),
        Command::Migrate(args) => commands::migrate::run(&daemon, &args),
        Command::Plan(command) => commands::plan::run(&daemon, &command),
        Command::Machine(command) => commands::machine::run(&daemon, &command),
        Command::Store(StoreCommand::Check(args)) => commands::store_check::run(&args),
        Command::Log(command) => log_command::run(command),
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "replica",
                &mut std::io::stdout(),
            );
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { dir } => {
            std::fs::create_dir_all(&dir)?;
            clap_mangen::generate_to(Cli::command(), &dir)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
