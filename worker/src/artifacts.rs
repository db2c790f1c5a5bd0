//! P: what a job leaves behind: rules that say which files, and the way of each file from the guest over the spool to the
//! orchestrator. The spool comes first, so that a daemon that dies after the command can still finish the upload.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Poll;

use alloy_shared::id::{AttemptRef, BadName, Digest, printable};
use alloy_shared::limits;
use alloy_shared::wire::session::{ArtifactReport, Report};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use globset::GlobSet;
use tokio::sync::mpsc;

use crate::ctx::Ctx;
use crate::provider::{ArtifactRule, Guest, GuestFile, Listing, RuleKind, Unfit, VmError};
use crate::session::Input;
use crate::spool::{Spool, SpoolFile};
use crate::upstream::{Grant, TransferError};

/// Artifacts of one attempt that are on their way at once.
const PUTS: usize = 4;
/// Files that are compared with a rule before others may run.
const LOOKS: usize = 64;

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

/// What the rules asked for and did not get, as sentences.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Missed {
    /// `=GLOB` rules without a file: a failure.
    pub must: Vec<String>,
    pub warnings: Vec<String>,
}

/// Takes every file that the rules name to the orchestrator, reports each once it is there, and counts it in `reported`,
/// which stays true if this fails or is dropped. Returns what is not among them.
pub async fn collect(
    ctx: &Ctx,
    guest: &Arc<dyn Guest>,
    rules: &[ArtifactRule],
    grant: &Grant,
    reported: &AtomicU32,
) -> Result<Missed, CollectError> {
    if rules.is_empty() {
        return Ok(Missed::default());
    }
    let attempt = grant.attempt;
    let listing = guest.list(rules).await.map_err(CollectError::Vm)?;
    let missed = missed(rules, &listing).await;
    stream::iter(listing.files.into_iter().map(|file| deliver(ctx, guest, file, grant)))
        .buffered(PUTS)
        .try_for_each(|report| async {
            let report = Report::Artifact(report);
            ctx.inputs.send(Input::Report { attempt, report }).await.map_err(|_| CollectError::Stopping)?;
            reported.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
        .await?;
    Ok(missed)
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
    let bytes = guest.read(&path, size.saturating_add(1)).await.map_err(CollectError::Vm)?;
    let stashed = stash(&ctx.spool, grant.attempt, bytes, size).await.map_err(CollectError::Spool)?;
    let Some(sha256) = stashed else { return Err(CollectError::Changed(path)) };
    put(ctx, grant, &ctx.spool.stashed(grant.attempt, &sha256)).await?;
    Ok(ArtifactReport { path, size, sha256, mode, link: None })
}

/// Takes a file's bytes into the spool, unless there are fewer or more than were listed. A guest may send without end: the
/// first byte too many is the last that is waited for.
async fn stash(
    spool: &Spool,
    at: AttemptRef,
    mut bytes: mpsc::Receiver<Bytes>,
    size: u64,
) -> std::io::Result<Option<Digest>> {
    let mut stash = spool.stash(at).await?;
    let mut left = size;
    while let Some(chunk) = bytes.recv().await {
        match left.checked_sub(chunk.len() as u64) {
            Some(less) => left = less,
            None => return Ok(None),
        }
        stash.write(chunk).await?;
    }
    if left > 0 {
        return Ok(None);
    }
    let (sha256, _size) = stash.finish().await?;
    Ok(Some(sha256))
}

/// A farm that is away is waited for, as long as collecting may take: the build itself is done.
async fn put(ctx: &Ctx, grant: &Grant, file: &SpoolFile) -> Result<(), CollectError> {
    loop {
        match ctx.upstream.put(grant, file).await {
            Ok(_) => return Ok(()),
            Err(TransferError::Broken(why)) => {
                tracing::warn!(attempt = %grant.attempt, why, "an artifact cannot be delivered at the moment; trying again");
                ctx.env.sleep_until(ctx.env.now().mono + ctx.limits.heartbeat_ms).await;
            }
            Err(error @ (TransferError::Fenced(_) | TransferError::Refused(_) | TransferError::Spool(_))) => {
                return Err(CollectError::Transfer(error));
            }
        }
    }
}

/// Reads the rules of a spec.
pub fn parse(rules: &[String]) -> Result<Vec<ArtifactRule>, BadName> {
    if rules.len() > limits::ARTIFACT_RULES_MAX {
        let why = format!("are at most {}", limits::ARTIFACT_RULES_MAX);
        return Err(BadName { what: "artifact rules", why });
    }
    rules.iter().map(|text| ArtifactRule::parse(text).map_err(|why| bad(text, &why))).collect()
}

fn bad(rule: &str, why: &str) -> BadName {
    BadName { what: "artifact rule", why: format!("`{}` {why}", printable(rule)) }
}

/// The rules of one job, ready to judge paths. A rule that matches a directory takes or leaves all below it.
pub struct Matcher {
    rules: Vec<(ArtifactRule, GlobSet)>,
}

impl Matcher {
    pub fn new(rules: &[ArtifactRule]) -> Result<Self, BadName> {
        let compile = |rule: &ArtifactRule| {
            let globs = rule.compile().map_err(|why| bad(&rule.glob, &why))?;
            Ok((rule.clone(), globs))
        };
        Ok(Self { rules: rules.iter().map(compile).collect::<Result<_, _>>()? })
    }

    pub fn takes(&self, path: &str) -> bool {
        !self.excludes(path) && self.any(path, |kind| kind != RuleKind::Exclude)
    }

    pub fn excludes(&self, path: &str) -> bool {
        self.any(path, |kind| kind == RuleKind::Exclude)
    }

    /// True if a rule may take what lies below this directory. Nothing in it has to be looked at for that.
    pub fn may_take_below(&self, dir: &str) -> bool {
        let deeper =
            |glob: &str| dir.is_empty() || glob.contains("**") || glob.matches('/').count() > dir.matches('/').count();
        let near = |base: &str| base == dir || inside(base, dir) || inside(dir, base);
        let leads =
            |rule: &ArtifactRule| rule.kind != RuleKind::Exclude && deeper(&rule.glob) && near(&base(&rule.glob));
        self.takes(dir) || self.rules.iter().any(|(rule, _)| leads(rule)) && !self.excludes(dir)
    }

    fn any(&self, path: &str, kinds: impl Fn(RuleKind) -> bool) -> bool {
        self.rules.iter().any(|(rule, globs)| kinds(rule.kind) && globs.is_match(path))
    }

    /// Where to start looking: the plain parts that rules start with, none of them inside another. `""` is the root.
    pub fn bases(&self) -> Vec<String> {
        let taking = self.rules.iter().filter(|(rule, _)| rule.kind != RuleKind::Exclude);
        let mut bases: Vec<String> = taking.map(|(rule, _)| base(&rule.glob)).collect();
        bases.sort();
        bases.dedup();
        let all = bases.clone();
        bases.retain(|path| !all.iter().any(|up| up != path && inside(path, up)));
        bases
    }
}

fn inside(path: &str, up: &str) -> bool {
    up.is_empty() || path.strip_prefix(up).is_some_and(|rest| rest.starts_with('/'))
}

fn base(glob: &str) -> String {
    let plain = |part: &&str| !part.contains(['*', '?', '[', ']', '{', '}', '\\']);
    glob.split('/').take_while(plain).collect::<Vec<_>>().join("/")
}

async fn missed(rules: &[ArtifactRule], listing: &Listing) -> Missed {
    let mut missed = Missed::default();
    for rule in rules.iter().filter(|rule| rule.kind != RuleKind::Exclude) {
        let Ok(matcher) = Matcher::new(std::slice::from_ref(rule)) else { continue };
        if find(&listing.files, |file| matcher.takes(&file.path)).await.is_some() {
            continue;
        }
        let hidden = |unfit: &Unfit| unfit.why.hides() && matcher.may_take_below(&unfit.text());
        let unfit = find(&listing.unfit, |unfit| matcher.takes(&unfit.text()) || hidden(unfit)).await;
        match (rule.kind, unfit) {
            (RuleKind::Must, None) => missed.must.push(format!("={}", rule.glob)),
            (RuleKind::Must, Some(unfit)) => missed.must.push(format!("={} ({})", rule.glob, describe(unfit))),
            (RuleKind::Take, None) => {
                missed.warnings.push(format!("no file matches the artifact rule `{}`", rule.glob));
            }
            // That is a warning of its own.
            (RuleKind::Take, Some(_)) | (RuleKind::Exclude, _) => {}
        }
    }
    let named = listing.unfit.iter().take(limits::UNFIT_NAMED_MAX);
    missed.warnings.extend(named.map(|unfit| format!("not collected: {}", describe(unfit))));
    let more = listing.unfit.len().saturating_sub(limits::UNFIT_NAMED_MAX) as u64 + listing.unfit_more;
    if more > 0 {
        missed.warnings.push(format!("not collected: {more} more that cannot be artifacts"));
    }
    missed
}

/// Finds the first that fits, and lets others run again and again meanwhile: a deadline, or whoever stops the job.
async fn find<T>(all: &[T], fits: impl Fn(&T) -> bool) -> Option<&T> {
    for some in all.chunks(LOOKS) {
        if let Some(found) = some.iter().find(|one| fits(one)) {
            return Some(found);
        }
        if some.len() == LOOKS {
            give_way().await;
        }
    }
    None
}

async fn give_way() {
    let mut given = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut given, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

fn describe(unfit: &Unfit) -> String {
    format!("`{}`, because {}", unfit.shown(), unfit.why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Misfit;

    fn rules(texts: &[&str]) -> Vec<ArtifactRule> {
        parse(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn rules_take_what_they_say() {
        for (texts, path, taken) in [
            (&["out"][..], "out/a/b.txt", true),
            (&["out/"], "out/a/b.txt", true),
            (&["./out/"], "out/x", true),
            (&["out//a/./*.ipa"], "out/a/x.ipa", true),
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
        let nested = "{{{{{{{{{{a/".repeat(30) + "a" + &"}}}}}}}}}}/".repeat(30);
        for wrong in ["", "=", "!", "/etc", "../x", "a/../b", "[", "{a", &nested] {
            assert!(parse(&[wrong.to_owned()]).is_err(), "{wrong:?}");
        }
        let unread = ArtifactRule { kind: RuleKind::Take, glob: nested };
        let error = Matcher::new(&[unread]).map(drop).unwrap_err().to_string();
        assert!(error.starts_with("artifact rule `{{{") && error.contains("is no glob"), "{error}");
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

    #[tokio::test]
    async fn a_rule_that_matches_nothing_is_missed_by_name() {
        let file = |path: &str| GuestFile { path: path.into(), size: 1, mode: 0o644, link: None };
        let with =
            |files: &[&str]| Listing { files: files.iter().map(|path| file(path)).collect(), ..Listing::default() };
        let rules = rules(&["=bin/*", "=missing/*", "optional", "b*/x", "!bin/y"]);
        let warning = |glob: &str| format!("no file matches the artifact rule `{glob}`");
        let some = Missed { must: vec!["=missing/*".into()], warnings: vec![warning("optional")] };
        assert_eq!(missed(&rules, &with(&["bin/x"])).await, some);
        let none = Missed {
            must: vec!["=bin/*".into(), "=missing/*".into()],
            warnings: vec![warning("optional"), warning("b*/x")],
        };
        assert_eq!(missed(&rules, &with(&[])).await, none);
    }

    #[tokio::test]
    async fn what_is_no_artifact_is_named_and_is_why_a_rule_is_not_met() {
        let mut listing = Listing::default();
        listing.refuse(b"out/b\xffd".to_vec(), Misfit::Name);
        listing.refuse(b"pipe".to_vec(), Misfit::Pipe);
        let told = missed(&rules(&["=out/*", "=nothing", "pipe"]), &listing).await;
        assert_eq!(told.must, [r"=out/* (`out/b\xffd`, because its name is not UTF-8)", "=nothing"]);
        let named = [
            r"not collected: `out/b\xffd`, because its name is not UTF-8",
            "not collected: `pipe`, because it is a pipe",
        ];
        assert_eq!(told.warnings, named);

        let mut shut = Listing::default();
        shut.refuse(b"out/x".to_vec(), Misfit::Closed);
        let told = missed(&rules(&["=out/x/y/f", "out/**/*.log", "=bin/a/b", "other"]), &shut).await;
        assert_eq!(
            told.must,
            ["=out/x/y/f (`out/x`, because it is a directory that cannot be read)", "=bin/a/b"],
            "what it hides is no reason for a rule that leads elsewhere"
        );
        let named = [
            "no file matches the artifact rule `other`",
            "not collected: `out/x`, because it is a directory that cannot be read",
        ];
        assert_eq!(told.warnings, named);

        let mut many = Listing { unfit_more: 5, ..Listing::default() };
        (0..limits::UNFIT_NAMED_MAX + 2).for_each(|n| many.refuse(n.to_string().into_bytes(), Misfit::Socket));
        let told = missed(&rules(&["*"]), &many).await.warnings;
        assert_eq!(told.len(), limits::UNFIT_NAMED_MAX + 1);
        assert!(told.last().unwrap().contains(": 7 more"), "{told:?}");
    }

    #[tokio::test]
    async fn a_long_look_for_what_is_missed_lets_a_deadline_pass() {
        let mut listing = Listing::default();
        (0..limits::ARTIFACTS_MAX).for_each(|n| listing.refuse(n.to_string().into_bytes(), Misfit::Pipe));
        let rules = rules(&["=nothing"]);
        let mut look = std::pin::pin!(missed(&rules, &listing));
        assert!(futures_util::poll!(&mut look).is_pending(), "it gives way");
        assert_eq!(look.await.must, ["=nothing"]);
    }

    #[tokio::test]
    async fn a_file_is_kept_if_it_has_the_listed_bytes_and_its_guest_is_left_at_the_first_too_many() {
        let assignment = crate::spool::tests::assignment();
        let (spool, at) = (Spool::memory(), assignment.attempt);
        spool.begin(&assignment).await.unwrap();
        for (sent, ends, kept) in [
            (&["abc", "de"][..], true, Some(Digest::of(b"abcde"))),
            (&["abc", "d"], true, None),
            (&["abc", "def"], true, None),
            (&["abc", "def"], false, None),
            (&["abc", "de", "f"], false, None),
        ] {
            let (tx, rx) = mpsc::channel(8);
            sent.iter().for_each(|piece| tx.try_send(Bytes::from_static(piece.as_bytes())).unwrap());
            let more = (!ends).then_some(tx);
            let mut stashed = Box::pin(stash(&spool, at, rx, 5));
            match futures_util::poll!(&mut stashed) {
                Poll::Ready(found) => assert_eq!(found.unwrap(), kept, "{sent:?}"),
                Poll::Pending => panic!("more is waited for: {sent:?}"),
            }
            drop(stashed);
            assert!(more.is_none_or(|tx| tx.is_closed()));
        }
        let (tx, rx) = mpsc::channel(1);
        drop(tx);
        assert_eq!(stash(&spool, at, rx, 0).await.unwrap(), Some(Digest::of(b"")), "an empty file is a file");
    }

    #[test]
    fn what_is_too_deep_concerns_the_rules_that_may_lead_there() {
        for (texts, dir, may) in [
            (&["out"][..], "out/deep", true),
            (&["**/*.o"], "out/deep", true),
            (&["out/*.o"], "out/deep", false),
            (&["*/*/*.o"], "out/deep", true),
            (&["**", "!out"], "out/deep", false),
            (&["other", "!**/*.o"], "out/deep", false),
            (&["other/**/*.o", "outer/a/b"], "out/deep", false),
            (&["a"], "", true),
            (&["out/deep/down/*.o"], "out", true),
        ] {
            assert_eq!(Matcher::new(&rules(texts)).unwrap().may_take_below(dir), may, "{texts:?}");
        }
    }
}
