//! P: what a job leaves behind: rules that say which files, and the way of each file from the guest over the spool to the
//! orchestrator. The spool comes first, so that a daemon that dies after the command can still finish the upload.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use alloy_shared::id::{BadName, Digest, printable};
use alloy_shared::limits;
use alloy_shared::wire::session::{ArtifactReport, Report};
use alloy_shared::wire::source::check_path;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use globset::{GlobBuilder, GlobMatcher};

use crate::executor::Ctx;
use crate::provider::{ArtifactRule, Guest, GuestFile, RuleKind, VmError};
use crate::session::Input;
use crate::upstream::{Grant, TransferError};

/// Artifacts of one attempt that are on their way at once.
const PUTS: usize = 4;

#[derive(Debug)]
pub enum CollectError {
    Vm(VmError),
    /// The file's bytes were not those that were listed.
    Changed(String),
    Spool(std::io::Error),
    Transfer(TransferError),
    /// The session takes no more reports: the daemon is stopping.
    Stopping,
}

/// The globs that match nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unmet {
    /// Of `=GLOB` rules: a failure.
    pub must: Vec<String>,
    /// Of plain rules: worth a warning.
    pub may: Vec<String>,
}

/// Takes every file that the rules name to the orchestrator, reports each once it is there, and counts it in `reported`,
/// which stays true if this fails or is dropped. Returns the rules without a file.
pub async fn collect(
    ctx: &Ctx,
    guest: &Arc<dyn Guest>,
    rules: &[ArtifactRule],
    grant: &Grant,
    reported: &AtomicU32,
) -> Result<Unmet, CollectError> {
    if rules.is_empty() {
        return Ok(Unmet::default());
    }
    let attempt = grant.attempt;
    let files = guest.list(rules).await.map_err(CollectError::Vm)?;
    let unmet = Unmet { must: missing(RuleKind::Must, rules, &files), may: missing(RuleKind::Take, rules, &files) };
    stream::iter(files.into_iter().map(|file| deliver(ctx, guest, file, grant)))
        .buffered(PUTS)
        .try_for_each(|report| async {
            let report = Report::Artifact(report);
            ctx.inputs.send(Input::Report { attempt, report }).await.map_err(|_| CollectError::Stopping)?;
            reported.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
        .await?;
    Ok(unmet)
}

async fn deliver(
    ctx: &Ctx,
    guest: &Arc<dyn Guest>,
    file: GuestFile,
    grant: &Grant,
) -> Result<ArtifactReport, CollectError> {
    let GuestFile { path, size, mode, link } = file;
    if link.is_some() {
        return Ok(ArtifactReport { path, size: 0, sha256: Digest::of(b""), mode, link });
    }
    // One byte more than was listed, so that a file that grew is told from one that did not.
    let mut bytes = guest.read(&path, size.saturating_add(1)).await.map_err(CollectError::Vm)?;
    let mut stash = ctx.spool.stash(grant.attempt).await.map_err(CollectError::Spool)?;
    while let Some(chunk) = bytes.recv().await {
        stash.write(chunk).await.map_err(CollectError::Spool)?;
    }
    let (sha256, len) = stash.finish().await.map_err(CollectError::Spool)?;
    if len != size {
        return Err(CollectError::Changed(path));
    }
    ctx.upstream.put(grant, &ctx.spool.stashed(grant.attempt, &sha256)).await.map_err(CollectError::Transfer)?;
    Ok(ArtifactReport { path, size, sha256, mode, link: None })
}

/// Reads the rules of a spec.
pub fn parse(rules: &[String]) -> Result<Vec<ArtifactRule>, BadName> {
    if rules.len() > limits::ARTIFACT_RULES_MAX {
        let why = format!("are at most {}", limits::ARTIFACT_RULES_MAX);
        return Err(BadName { what: "artifact rules", why });
    }
    let rules = rules.iter().map(|text| parse_rule(text)).collect::<Result<Vec<_>, _>>()?;
    Matcher::new(&rules)?;
    Ok(rules)
}

fn parse_rule(text: &str) -> Result<ArtifactRule, BadName> {
    let (kind, glob) = match text.as_bytes().first() {
        Some(b'=') => (RuleKind::Must, &text[1..]),
        Some(b'!') => (RuleKind::Exclude, &text[1..]),
        Some(_) | None => (RuleKind::Take, text),
    };
    let glob = glob.strip_prefix("./").unwrap_or(glob);
    let glob = match glob.trim_end_matches('/') {
        "." => "**",
        glob => glob,
    };
    check_path(glob).map_err(|error| bad(text, &error.to_string()))?;
    Ok(ArtifactRule { kind, glob: glob.to_owned() })
}

fn bad(rule: &str, why: &str) -> BadName {
    BadName { what: "artifact rule", why: format!("`{}`: {why}", printable(rule)) }
}

/// The rules of one job, ready to judge paths. A rule that matches a directory takes or leaves all below it.
pub struct Matcher {
    rules: Vec<(ArtifactRule, GlobMatcher)>,
}

impl Matcher {
    pub fn new(rules: &[ArtifactRule]) -> Result<Self, BadName> {
        let compile = |rule: &ArtifactRule| {
            let glob = GlobBuilder::new(&rule.glob).literal_separator(true).backslash_escape(true).build();
            let glob = glob.map_err(|error| bad(&rule.glob, &error.kind().to_string()))?;
            Ok((rule.clone(), glob.compile_matcher()))
        };
        Ok(Self { rules: rules.iter().map(compile).collect::<Result<_, _>>()? })
    }

    pub fn takes(&self, path: &str) -> bool {
        !self.excludes(path) && self.any(path, |kind| kind != RuleKind::Exclude)
    }

    pub fn excludes(&self, path: &str) -> bool {
        self.any(path, |kind| kind == RuleKind::Exclude)
    }

    fn any(&self, path: &str, kinds: impl Fn(RuleKind) -> bool) -> bool {
        self.rules.iter().any(|(rule, glob)| kinds(rule.kind) && covers(glob, path))
    }

    /// Where to start looking: the plain parts that rules start with, none of them inside another. `""` is the root.
    pub fn bases(&self) -> Vec<String> {
        let taking = self.rules.iter().filter(|(rule, _)| rule.kind != RuleKind::Exclude);
        let mut bases: Vec<String> = taking.map(|(rule, _)| base(&rule.glob)).collect();
        bases.sort();
        bases.dedup();
        let inside =
            |path: &str, up: &str| up.is_empty() || path.strip_prefix(up).is_some_and(|rest| rest.starts_with('/'));
        let all = bases.clone();
        bases.retain(|path| !all.iter().any(|up| up != path && inside(path, up)));
        bases
    }
}

/// True when the glob matches the path or a directory above it.
fn covers(glob: &GlobMatcher, path: &str) -> bool {
    let mut at = path;
    loop {
        if glob.is_match(at) {
            return true;
        }
        match at.rsplit_once('/') {
            Some((up, _)) => at = up,
            None => return false,
        }
    }
}

fn base(glob: &str) -> String {
    let plain = |part: &&str| !part.contains(['*', '?', '[', ']', '{', '}', '\\']);
    glob.split('/').take_while(plain).collect::<Vec<_>>().join("/")
}

/// The rules of this kind that match none of the files.
fn missing(kind: RuleKind, rules: &[ArtifactRule], files: &[GuestFile]) -> Vec<String> {
    let unmet =
        rules.iter().filter(|rule| rule.kind == kind).filter(|rule| match Matcher::new(std::slice::from_ref(rule)) {
            Ok(matcher) => !files.iter().any(|file| matcher.takes(&file.path)),
            Err(_unparsed) => true,
        });
    unmet.map(|rule| rule.glob.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(texts: &[&str]) -> Vec<ArtifactRule> {
        parse(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn rules_take_what_they_say() {
        for (texts, path, taken) in [
            (&["out"][..], "out/a/b.txt", true),
            (&["out/"], "out/a/b.txt", true),
            (&["./out/"], "out/x", true),
            (&["out"], "output", false),
            (&["*.log"], "a.log", true),
            (&["*.log"], "sub/a.log", false),
            (&["**/*.log"], "sub/deep/a.log", true),
            (&["**/*.log"], "a.log", true),
            (&["*.xcresult"], "r.xcresult/Data/1", true),
            (&["=bin/app"], "bin/app", true),
            (&["out", "!out/tmp"], "out/tmp/x", false),
            (&["out", "!out/tmp"], "out/keep", true),
            (&["!out/tmp", "out"], "out/tmp/x", false),
            (&["out", "!**/*.o"], "out/a/b.o", false),
            (&["{a,b}/x"], "b/x", true),
            (&["."], "any/thing", true),
            (&["[ab].txt"], "b.txt", true),
            (&["!x"], "y", false),
        ] {
            assert_eq!(Matcher::new(&rules(texts)).unwrap().takes(path), taken, "{texts:?} {path}");
        }
    }

    #[test]
    fn wrong_rules_are_refused_by_name() {
        for wrong in ["", "=", "!", "/etc", "../x", "a/../b", "a//b", "[", "{a"] {
            assert!(parse(&[wrong.to_owned()]).is_err(), "{wrong:?}");
        }
        assert!(parse(&vec!["a".to_owned(); limits::ARTIFACT_RULES_MAX + 1]).is_err());
    }

    #[test]
    fn looking_starts_at_the_plain_part_of_each_rule() {
        for (texts, bases) in [
            (&["out/a/*.txt", "out/b"][..], &["out/a", "out/b"][..]),
            (&["out", "out/b/*.x", "outer"], &["out", "outer"]),
            (&["out", "**/*.x"], &[""]),
            (&["build/*/x", "!build/tmp/y"], &["build"]),
            (&["!only"], &[]),
        ] {
            assert_eq!(Matcher::new(&rules(texts)).unwrap().bases(), bases, "{texts:?}");
        }
    }

    #[test]
    fn a_rule_that_matches_nothing_is_missed_by_name() {
        let file = |path: &str| GuestFile { path: path.into(), size: 1, mode: 0o644, link: None };
        let rules = rules(&["=bin/*", "=missing/*", "optional", "b*/x", "!bin/y"]);
        assert_eq!(missing(RuleKind::Must, &rules, &[file("bin/x")]), ["missing/*"]);
        assert_eq!(missing(RuleKind::Must, &rules, &[]), ["bin/*", "missing/*"]);
        assert_eq!(missing(RuleKind::Take, &rules, &[file("bin/x")]), ["optional"]);
        assert_eq!(missing(RuleKind::Take, &rules, &[]), ["optional", "b*/x"]);
    }
}
