//! Rows, medians and ratios, as JSON and as Markdown.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::Options;
use super::floors::{Floors, quantile};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Better {
    Lower,
    Higher,
}

/// One case. Samples of all rounds, ours and each peer's; `None` is a peer that is not here.
#[derive(Debug, Serialize)]
pub struct Row {
    pub case: String,
    pub unit: &'static str,
    pub better: Better,
    pub aim: &'static str,
    pub ours: Vec<f64>,
    pub peers: BTreeMap<String, Option<Vec<f64>>>,
    pub note: String,
}

impl Row {
    pub fn new(case: &str, unit: &'static str, better: Better, aim: &'static str) -> Row {
        Row { case: case.into(), unit, better, aim, ours: Vec::new(), peers: BTreeMap::new(), note: String::new() }
    }

    pub fn ours(&mut self, samples: Vec<f64>) {
        self.ours.extend(samples);
    }

    pub fn peer(&mut self, name: &str, samples: Option<Vec<f64>>) {
        let all = self.peers.entry(name.to_owned()).or_insert_with(|| samples.is_some().then(Vec::new));
        if let (Some(all), Some(samples)) = (all, samples) {
            all.extend(samples);
        }
    }

    /// How many samples there are, ours and each peer's.
    pub fn mark(&self) -> (usize, BTreeMap<String, usize>) {
        let peers = self.peers.iter().map(|(name, samples)| (name.clone(), samples.as_ref().map_or(0, Vec::len)));
        (self.ours.len(), peers.collect())
    }

    /// Takes back what was sampled since the mark.
    pub fn rewind(&mut self, (ours, peers): &(usize, BTreeMap<String, usize>)) {
        self.ours.truncate(*ours);
        for (name, samples) in &mut self.peers {
            if let Some(samples) = samples {
                samples.truncate(peers.get(name).copied().unwrap_or(0));
            }
        }
    }

    /// How often better than this peer, by medians.
    pub fn ratio(&self, peer: &[f64]) -> f64 {
        let (ours, theirs) = (quantile(&self.ours, 0.5), quantile(peer, 0.5));
        match self.better {
            Better::Lower => theirs / ours,
            Better::Higher => ours / theirs,
        }
    }
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub machine: String,
    pub profile: &'static str,
    pub rounds: usize,
    pub rows: Vec<Row>,
    pub floors: Vec<Floors>,
}

impl Report {
    pub fn new(options: &Options) -> Report {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        Report {
            machine: format!("{} {}, {cores} cores", std::env::consts::OS, std::env::consts::ARCH),
            profile: if cfg!(debug_assertions) { "bench built without optimisation" } else { "release" },
            rounds: options.rounds,
            rows: Vec::new(),
            floors: Vec::new(),
        }
    }

    pub fn markdown(&self) -> String {
        let mut out = format!(
            "# Bench\n\n{}, {}, {} rounds A-B-A-B; medians (least to most).\n\n",
            self.machine, self.profile, self.rounds
        );
        out.push_str("| Case | Alloy | Peer | Peer's | Times better | Aim |\n|---|---|---|---|---:|---|\n");
        for row in &self.rows {
            let ours = spread(&row.ours, row.unit);
            if row.peers.is_empty() {
                let _ = writeln!(out, "| {} | {ours} | – | – | – | {} |", row.case, row.aim);
            }
            for (peer, samples) in &row.peers {
                let (theirs, ratio) = match samples {
                    Some(samples) => (spread(samples, row.unit), format!("{:.2}", row.ratio(samples))),
                    None => ("not measured".to_owned(), "–".to_owned()),
                };
                let _ = writeln!(out, "| {} | {ours} | {peer} | {theirs} | {ratio} | {} |", row.case, row.aim);
            }
        }
        out.push('\n');
        for row in self.rows.iter().filter(|row| !row.note.is_empty()) {
            let _ = writeln!(out, "- {}: {}", row.case, row.note);
        }
        out.push_str("\n## Floors\n\n| | Median | Least | Most |\n|---|---:|---:|---:|\n");
        type Pick = fn(&Floors) -> f64;
        let picks: [(&str, Pick); 5] = [
            ("fdatasync p50, ms", |floors| floors.fdatasync_p50_ms),
            ("fdatasync p99, ms", |floors| floors.fdatasync_p99_ms),
            ("pipe, MB/s", |floors| floors.pipe_mb_s),
            ("fork and exec p50, ms", |floors| floors.fork_exec_p50_ms),
            ("5 million steps, ms", |floors| floors.spin_ms),
        ];
        for (name, pick) in picks.iter().filter(|_| !self.floors.is_empty()) {
            let values: Vec<f64> = self.floors.iter().map(pick).collect();
            let at = |fraction| quantile(&values, fraction);
            let _ = writeln!(out, "| {name} | {:.3} | {:.3} | {:.3} |", at(0.5), at(0.0), at(1.0));
        }
        out
    }

    pub fn save(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("bench.json"), serde_json::to_vec_pretty(self)?)?;
        fs::write(dir.join("bench.md"), self.markdown())?;
        Ok(())
    }
}

fn spread(samples: &[f64], unit: &str) -> String {
    let at = |fraction| quantile(samples, fraction);
    format!("{:.2} {unit} ({:.2} to {:.2}, n={})", at(0.5), at(0.0), at(1.0), samples.len())
}
