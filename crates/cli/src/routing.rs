//! Which experts the tokens of a run used, as a table that `plan --routing` and `simulate --routing` understand.

use crate::errors::{Kind, Outcome, stop};
use overspill_infer::decoder::ChosenExpert;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

/// A table's first line. `phase` is 0 for tokens of the prompt and 1 for those that were generated; `step` is the token's
/// place in the sequence.
const HEADER: &str = "turn,phase,step,layer,expert";

/// Makes the file, so that a path that is no good is refused before anything is computed.
///
/// # Errors
/// It cannot be made.
pub fn create(path: &Path) -> Outcome<File> {
    File::create(path).map_err(|error| failed(path, &error))
}

/// Writes what routers chose, of a prompt of so many tokens and what came after it.
///
/// # Errors
/// The file cannot be written.
pub fn write(file: File, path: &Path, chosen: &[ChosenExpert], prompt_tokens: usize) -> Outcome {
    // A chunk of a prompt goes through the layers together; the table goes token by token.
    let mut chosen: Vec<&ChosenExpert> = chosen.iter().collect();
    chosen.sort_by_key(|choice| (choice.position, choice.layer));
    let mut out = BufWriter::new(file);
    let mut write = || {
        writeln!(out, "{HEADER}")?;
        for ChosenExpert { position, layer, expert } in &chosen {
            let phase = u8::from(*position >= prompt_tokens);
            writeln!(out, "0,{phase},{position},{layer},{expert}")?;
        }
        out.flush()
    };
    write().map_err(|error| failed(path, &error))
}

fn failed(path: &Path, error: &std::io::Error) -> crate::errors::Stop {
    let message = format!("--record-routing {}: {error}; name a file that can be written", path.display());
    stop(Kind::Io, message)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use overspill_sim::RoutingTrace;

    /// What a run writes, the planner reads: the tokens after the prompt alone.
    #[test]
    fn the_planner_reads_what_a_run_writes() {
        let path = std::env::temp_dir().join(format!("overspill-cli-routing-{}", std::process::id()));
        let chosen = |position, layer, expert| ChosenExpert { position, layer, expert };
        let all =
            [chosen(0, 0, 7), chosen(1, 0, 5), chosen(0, 1, 6), chosen(1, 1, 4), chosen(2, 0, 3), chosen(2, 1, 2)];
        write(create(&path).unwrap(), &path, &all, 1).unwrap();
        let trace = RoutingTrace::parse(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!((trace.tokens(), trace.prompt_tokens(), trace.layers), (2, 1, 2));
        std::fs::remove_file(&path).unwrap();
        assert!(create(Path::new("/nowhere/at/all.csv")).is_err());
    }
}
