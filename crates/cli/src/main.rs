//! The `overspill` command line: arguments in, the library's work, reports out.
//!
//! Results go to standard output and everything else to standard error; `--json` puts exactly one object on standard
//! output, also when it fails. Exit codes are in [`errors::Kind`]. No weights are touched here.
// rustdoc evaluates auto traits through all of wgpu and naga.
#![recursion_limit = "256"]
#![forbid(unsafe_code)]

mod args;
mod audit;
mod audit_duplicates;
mod audit_pruning;
mod bench;
mod changes;
mod device;
mod disk;
mod doctor;
mod errors;
mod execute;
mod inspect;
mod interrupt;
mod layers;
mod limit;
mod log;
mod machine;
mod plan;
mod plan_args;
mod plan_hardware;
mod plan_model;
mod plan_report;
mod progress;
mod prompt;
mod report;
mod routing;
mod run;
mod sampling;
mod simulate;
mod simulate_lists;
mod sizes;
mod smallest;
mod status;
mod summary;
mod synth;
mod timeline;
mod top;
mod trace;
mod watch;

use args::{Cli, Command};
use clap::{CommandFactory, Parser};
use errors::{CliError, Kind, Outcome, Stop};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    if cli.command.looks_at_adapters() {
        hush_mesa();
    }
    let json = cli.command.json();
    match log::install(cli.log).and_then(|()| execute(&cli.command)) {
        Ok(()) | Err(Stop::StdoutClosed) => ExitCode::SUCCESS,
        Err(Stop::Error(error)) => fail(&error, json),
    }
}

/// Mesa's device-select layer complains on standard error where there is no desktop session, at each look for adapters.
/// It can only be switched off by the environment, which a program must not change once threads may run; so begin anew
/// with the switch set.
#[cfg(all(target_os = "linux", feature = "gpu"))]
fn hush_mesa() {
    use std::os::unix::process::CommandExt as _;
    const SWITCH: &str = "NODEVICE_SELECT";
    let has_session = std::env::var_os("XDG_RUNTIME_DIR").is_some_and(|dir| std::path::Path::new(&dir).is_dir());
    if has_session || std::env::var_os(SWITCH).is_some() {
        return;
    }
    let mut arguments = std::env::args_os();
    if let (Ok(program), Some(name)) = (std::env::current_exe(), arguments.next()) {
        // This returns only if it fails; then the complaint stays.
        let _ = std::process::Command::new(program).arg0(name).args(arguments).env(SWITCH, "1").exec();
    }
}

#[cfg(not(all(target_os = "linux", feature = "gpu")))]
fn hush_mesa() {}

fn execute(command: &Command) -> Outcome {
    match command {
        Command::Run(args) => run::run(args),
        Command::Bench(args) => bench::bench(args),
        Command::Top(args) => top::top(args),
        Command::Inspect(args) => inspect::inspect(args),
        Command::Doctor(args) => doctor::doctor(args),
        Command::Synth(args) => synth::synth(args),
        Command::Plan(args) => plan::plan(args),
        Command::Simulate(args) => simulate::simulate(args),
        Command::Audit(args) => audit::audit(args),
        Command::Completions(args) => completions(args.shell),
        Command::Man => manual(),
    }
}

/// Help and versions go to standard output, complaints to standard error, both in clap's words.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // A closed pipe is no failure.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    if std::env::args_os().any(|arg| arg == "--json") {
        let text = error.to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text).trim();
        let _ = report::print_json(&CliError::new(Kind::Usage, text).json());
    }
    let _ = error.print();
    ExitCode::from(Kind::Usage.exit_code())
}

fn fail(error: &CliError, json: bool) -> ExitCode {
    if json {
        // If nobody reads it, the exit code still tells.
        let _ = report::print_json(&error.json());
    }
    let mark = report::red("error:", report::coloured(&std::io::stderr()));
    report::note(&format!("{mark} {error}"));
    ExitCode::from(error.kind.exit_code())
}

fn completions(shell: clap_complete::Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "overspill", &mut script);
    report::print(&String::from_utf8_lossy(&script))
}

fn manual() -> Outcome {
    let mut page = Vec::new();
    let written = render_manual(&mut page);
    written.map_err(|error| errors::stop(Kind::Failed, format!("cannot write the manual page: {error}")))?;
    report::print(&String::from_utf8_lossy(&page))
}

/// One page for all commands: the program's own sections, then each command's description and options.
fn render_manual(page: &mut Vec<u8>) -> std::io::Result<()> {
    let mut command = Cli::command();
    command.build();
    let main = clap_mangen::Man::new(command.clone());
    main.render_title(page)?;
    main.render_name_section(page)?;
    main.render_synopsis_section(page)?;
    main.render_description_section(page)?;
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let section = clap_mangen::Man::new(sub.clone());
        let name = sub.get_name().to_uppercase();
        page.extend_from_slice(format!(".SH COMMAND {name}\n").as_bytes());
        let mut body = Vec::new();
        section.render_description_section(&mut body)?;
        section.render_synopsis_section(&mut body)?;
        section.render_options_section(&mut body)?;
        page.extend_from_slice(String::from_utf8_lossy(&body).replace(".SH ", ".SS ").as_bytes());
    }
    main.render_extra_section(page)?;
    main.render_version_section(page)
}
