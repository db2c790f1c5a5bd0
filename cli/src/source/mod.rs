//! S: the working tree as it is on disk, made into a manifest: what goes, what is refused, and why.
//!
//! [`walk`] reads the tree, [`upload`] sends what the farm does not have, [`git`] records where the tree stood. What must not
//! happen silently is an error with a name in it: a secret that travels, a file that cannot, a tree that changes underfoot.

pub(crate) mod git;
mod secret;
pub(crate) mod upload;
mod walk;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use alloy_shared::limits;
use alloy_shared::wire::source::{Entry, EntryKind, Manifest};

use crate::output::{Failure, plural};
use walk::Found;

/// Names listed in one message; the rest is counted.
const NAMED_MAX: usize = 20;

/// A tree that was read without a change in it.
#[derive(Debug)]
pub(crate) struct Scan {
    pub(crate) root: PathBuf,
    pub(crate) manifest: Manifest,
    /// What the sender should know and the farm need not.
    pub(crate) warnings: Vec<String>,
    /// Files that look like a secret, and why.
    pub(crate) secrets: BTreeMap<String, &'static str>,
}

impl Scan {
    pub(crate) fn files(&self) -> u64 {
        self.manifest.entries().iter().filter(|entry| entry.kind != EntryKind::Dir).count() as u64
    }

    /// A warning about those of git's files that are not in the tree.
    pub(crate) fn left_out(&self, mut tracked: Vec<String>) -> Option<String> {
        let sent: HashSet<&str> = self.manifest.entries().iter().map(|entry| entry.path.as_str()).collect();
        tracked.retain(|path| !sent.contains(path.as_str()));
        (!tracked.is_empty()).then(|| {
            format!("git keeps these files, but an ignore rule leaves them out of what is sent: {}", named(tracked))
        })
    }
}

/// Reads the whole tree. Blocks: call it from a thread that may.
pub(crate) fn scan(root: &Path, allow_secret_files: bool) -> Result<Scan, Failure> {
    let root = root.canonicalize().map_err(|error| Failure::io(&root.display().to_string(), &error))?;
    if !root.is_dir() {
        return Err(Failure::usage(format!("{} is no directory", root.display())));
    }
    let walked = walk::walk(&root)?;
    if !walked.refused.is_empty() {
        let list: Vec<String> = walked.refused.iter().map(|r| format!("{} {}", r.path, r.why)).collect();
        return Err(Failure::error(format!("the tree cannot be sent: {}", named(list)))
            .hint("list it in .alloyignore, or remove it"));
    }
    let secrets = secrets(&walked.found);
    if !allow_secret_files {
        refuse_secrets(&secrets)?;
    }
    let mut warnings = walked.warnings;
    warnings.extend(
        case_collisions(walked.found.iter().map(|found| found.path.as_str()))
            .into_iter()
            .map(|(a, b)| format!("`{a}` and `{b}` differ only in case: on a Mac they are one file")),
    );
    walk::assert_unchanged(&root, &walked.found)?;
    let manifest = Manifest::new(entries(walked.found)).map_err(|error| Failure::error(error.to_string()))?;
    Ok(Scan { root, manifest, warnings, secrets })
}

/// Directories follow from their files; only those without anything in them are entries.
fn entries(found: Vec<Found>) -> Vec<Entry> {
    let mut full: HashSet<&str> = HashSet::new();
    for found in &found {
        if let Some((parent, _)) = found.path.rsplit_once('/') {
            full.insert(parent);
        }
    }
    let empty: Vec<bool> =
        found.iter().map(|found| found.kind != EntryKind::Dir || !full.contains(found.path.as_str())).collect();
    let kept = found.into_iter().zip(empty).filter(|(_, keep)| *keep);
    kept.map(|(found, _)| Entry {
        path: found.path,
        kind: found.kind,
        mode: found.mode,
        size: found.size,
        chunks: found.chunks,
        target: found.target,
    })
    .collect()
}

fn secrets(found: &[Found]) -> BTreeMap<String, &'static str> {
    let files = found.iter().filter(|found| found.kind == EntryKind::File);
    files.filter_map(|found| Some((found.path.clone(), found.secret?))).collect()
}

fn refuse_secrets(secrets: &BTreeMap<String, &'static str>) -> Result<(), Failure> {
    if secrets.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = secrets.iter().map(|(path, why)| format!("{path} ({why})")).collect();
    let what = if secrets.len() == 1 { "this file looks" } else { "these files look" };
    Err(Failure::error(format!("{what} like a secret and would be sent: {}", named(list)))
        .hint("list it in .gitignore or .alloyignore, or send it with --allow-secret-files"))
}

/// Pairs of paths that a file system without case would make one.
fn case_collisions<'a>(paths: impl Iterator<Item = &'a str>) -> Vec<(String, String)> {
    let mut seen: HashMap<String, &str> = HashMap::new();
    let mut pairs = Vec::new();
    for path in paths {
        if let Some(other) = seen.insert(path.to_lowercase(), path)
            && other != path
            && pairs.len() < NAMED_MAX
        {
            let (a, b) = if other < path { (other, path) } else { (path, other) };
            pairs.push((a.to_owned(), b.to_owned()));
        }
    }
    pairs.sort();
    pairs
}

fn named(mut list: Vec<String>) -> String {
    list.sort();
    let more = list.len().saturating_sub(NAMED_MAX);
    list.truncate(NAMED_MAX);
    let text = list.join(", ");
    if more == 0 { text } else { format!("{text} and {} more", plural(more as u64, "file")) }
}

/// The pieces that a file of this size is cut into: one, unless it is larger than a blob may be.
fn piece_len(size: u64) -> u64 {
    if size <= limits::BLOB_MAX as u64 { size } else { limits::BLOB_PIECE as u64 }
}

#[cfg(test)]
mod tests;
