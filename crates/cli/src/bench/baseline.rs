//! Results against earlier ones: the change of each configuration, and which of them are regressions.

use super::journal::{self, Machine, Record};
use super::points::{ModelFacts, Point};
use super::results::Results;
use super::sample::Sample;
use crate::errors::{Kind, Outcome, stop};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Earlier results.
#[derive(Debug)]
pub struct Baseline {
    path: PathBuf,
    machine: Machine,
    models: BTreeMap<String, ModelFacts>,
    /// Decoded tokens a second, by run.
    rates: BTreeMap<Point, Vec<f64>>,
    /// Tokens by hash.
    answers: BTreeMap<Point, String>,
}

/// What a comparison found.
#[derive(Debug, Default)]
pub struct Compared {
    /// Configurations that became slower by more than the threshold: a label and the change in percent.
    pub regressions: Vec<(String, f64)>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

impl Baseline {
    /// Reads what `--save` has written.
    ///
    /// # Errors
    /// It cannot be read, is no file of records, or has no runs.
    pub fn read(path: &Path) -> Outcome<Self> {
        let (records, _) = journal::read(path, "--baseline")?;
        let mut found = Self {
            path: path.to_owned(),
            machine: Machine::default(),
            models: BTreeMap::new(),
            rates: BTreeMap::new(),
            answers: BTreeMap::new(),
        };
        for record in records {
            match record {
                Record::Start { machine, .. } => found.machine = machine,
                Record::Model { path, facts } => {
                    found.models.insert(path, facts);
                }
                Record::Run { point, figures, .. } => {
                    let rate = figures.decoded_tokens as f64 / figures.decode_s.max(1e-9);
                    found.answers.insert(point.clone(), figures.answer.clone());
                    found.rates.entry(point).or_default().push(rate);
                }
                _ => {}
            }
        }
        if found.rates.is_empty() {
            let message =
                format!("--baseline {}: there are no runs in it; name a file that --save has written", path.display());
            return Err(stop(Kind::Config, message));
        }
        Ok(found)
    }

    /// Puts the changes into the rows. Configurations are the same if all their settings and the model's facts are;
    /// the model's path may be another.
    pub fn compare(&self, results: &mut Results, threshold_percent: f64) -> Compared {
        let mut compared = Compared::default();
        let name = self.path.display();
        if self.machine != results.machine {
            compared.notes.push(format!(
                "the baseline {name} is of another machine ({}), so changes say more about machines than about \
                 overspill",
                self.machine
            ));
        }
        let names = results.varying();
        let mut alone = 0;
        for row in &mut results.rows {
            if row.decode.is_empty() {
                continue;
            }
            let Some((point, rates)) = self.find(&row.point, &results.models) else {
                alone += 1;
                continue;
            };
            let before = Sample::of(rates.clone()).median;
            let change = (row.decode.median / before.max(1e-9) - 1.0) * 100.0;
            row.change_percent = Some(change);
            if change < -threshold_percent {
                compared.regressions.push((row.point.label(&names), change));
            }
            let answer = row.figures.as_ref().map(|figures| figures.answer.as_str());
            if answer != self.answers.get(point).map(String::as_str) {
                compared.notes.push(format!("{}: the tokens are not the baseline's", row.point.label(&names)));
            }
        }
        if alone > 0 {
            let models: Vec<_> = self.models.values().collect();
            let known = results.models.values().any(|facts| models.contains(&facts));
            let why = if known { "" } else { ": it is of another model" };
            compared.notes.push(format!("{alone} configurations have no counterpart in the baseline {name}{why}"));
        }
        compared
    }

    fn find(&self, point: &Point, models: &BTreeMap<String, ModelFacts>) -> Option<(&Point, &Vec<f64>)> {
        let facts = models.get(&point.model)?;
        let same_model = self.models.iter().filter(|(_, theirs)| *theirs == facts);
        same_model
            .into_iter()
            .find_map(|(path, _)| self.rates.get_key_value(&Point { model: path.clone(), ..point.clone() }))
    }
}

impl Compared {
    /// What an exit with a regression says.
    pub fn message(&self, threshold_percent: f64) -> String {
        let worst = self.regressions.iter().min_by(|a, b| a.1.total_cmp(&b.1));
        let worst =
            worst.map_or_else(String::new, |(label, change)| format!("; the worst is '{label}' ({change:+.1} %)"));
        format!(
            "{} configurations are slower than the baseline by more than {threshold_percent} %{worst}; run it again to \
             tell noise from a regression, or raise --threshold",
            self.regressions.len()
        )
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let memory = crate::sizes::human_bytes(self.memory_bytes);
        write!(f, "{}, {} threads, {memory}, {}", self.cpu, self.cores, self.system)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn baseline(factor: f64) -> (Baseline, Results) {
        let results = super::super::results::tests::results();
        let mut found = Baseline {
            path: "base".into(),
            machine: results.machine.clone(),
            models: results.models.values().map(|facts| ("moved".to_owned(), facts.clone())).collect(),
            rates: BTreeMap::new(),
            answers: BTreeMap::new(),
        };
        for row in results.rows.iter().filter(|row| !row.decode.is_empty()) {
            let point = Point { model: "moved".into(), ..row.point.clone() };
            found.rates.insert(point.clone(), row.decode.values.iter().map(|rate| rate * factor).collect());
            found.answers.insert(point, "abc".into());
        }
        (found, results)
    }

    #[test]
    fn what_is_slower_by_more_than_the_threshold_is_a_regression() {
        let (before, mut results) = baseline(1.25);
        let compared = before.compare(&mut results, 10.0);
        assert_eq!(compared.regressions.len(), 6);
        assert!((results.rows[0].change_percent.unwrap() + 20.0).abs() < 1e-6);
        assert!(compared.notes.is_empty(), "{:?}", compared.notes);
        assert!(compared.message(10.0).contains("6 configurations"), "{}", compared.message(10.0));
        assert!(before.compare(&mut results, 30.0).regressions.is_empty());
        assert!(results.table(false).render(false).contains("-20.0"));
    }

    #[test]
    fn another_machine_or_model_is_told() {
        let (mut before, mut results) = baseline(1.0);
        before.machine.cores += 1;
        assert!(before.compare(&mut results, 10.0).notes[0].contains("another machine"));
        before.machine.cores -= 1;
        before.models.values_mut().for_each(|facts| facts.weight_bytes += 1);
        let compared = before.compare(&mut results, 10.0);
        assert!(compared.regressions.is_empty() && compared.notes[0].contains("another model"), "{compared:?}");
        let (mut before, mut results) = baseline(1.0);
        before.answers.values_mut().for_each(|answer| answer.push('x'));
        assert!(before.compare(&mut results, 10.0).notes[0].contains("tokens are not"));
    }
}
