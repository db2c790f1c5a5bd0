//! D: what an artifact rule says. Farm and senders read it as workers do, so that nobody learns after the command has run
//! that a rule was wrong.

use globset::{Error, Glob, GlobBuilder, GlobSet};

use super::source::check_path;
use crate::limits;

/// One rule of a job's artifacts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArtifactRule {
    pub kind: RuleKind,
    /// Relative to the workspace; `*` stops at `/`; a directory stands for all below it.
    pub glob: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleKind {
    /// Taken if it is there.
    Take,
    /// Taken, and missed if it is not there.
    Must,
    /// Left out, whatever else takes it.
    Exclude,
}

impl ArtifactRule {
    /// Reads a rule as people write it, `./out//` for `out`. An error says what the rule is or does wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (kind, glob) = match text.split_at_checked(1) {
            Some(("=", glob)) => (RuleKind::Must, glob),
            Some(("!", glob)) => (RuleKind::Exclude, glob),
            Some(_) | None => (RuleKind::Take, text),
        };
        if glob.is_empty() || glob.len() > limits::PATH_MAX {
            return Err(format!("is empty, or longer than {} bytes", limits::PATH_MAX));
        }
        if glob.starts_with('/') || glob.split('/').any(|part| part == "..") {
            return Err("leaves the workspace; rules are relative to it".to_owned());
        }
        if glob.contains(char::is_control) {
            return Err("holds a control character".to_owned());
        }
        let parts: Vec<&str> = glob.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
        let glob = if parts.is_empty() { "**".to_owned() } else { parts.join("/") };
        check_path(&glob).map_err(|error| format!("can name nothing: {error}"))?;
        // What matches is not made here: it takes some fifty times as long, and one thread checks all jobs of a farm.
        read(&glob).map_err(|error| no_glob(&error))?;
        if glob.matches('{').count() > limits::RULE_BRACES_MAX {
            return Err(format!("has more than {} `{{`; several rules can say the same", limits::RULE_BRACES_MAX));
        }
        Ok(Self { kind, glob })
    }

    /// Makes what matches all that the rule speaks of: what its glob matches, and everything below that. It succeeds for
    /// what [`Self::parse`] takes.
    pub fn compile(&self) -> Result<GlobSet, String> {
        // The first one sees to it that the second one says what it seems to say.
        let globs = read(&self.glob).and_then(|own| Ok([own, read(&format!("{}/**", self.glob))?]));
        globs.and_then(GlobSet::new).map_err(|error| no_glob(&error))
    }
}

fn read(glob: &str) -> Result<Glob, Error> {
    GlobBuilder::new(glob).literal_separator(true).backslash_escape(true).build()
}

fn no_glob(error: &Error) -> String {
    format!("is no glob: {}", error.kind())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_read_as_a_person_means_it() {
        for (text, kind, glob) in [
            ("out", RuleKind::Take, "out"),
            ("=out/*.ipa", RuleKind::Must, "out/*.ipa"),
            ("!out/tmp/", RuleKind::Exclude, "out/tmp"),
            ("build//out/*.ipa", RuleKind::Take, "build/out/*.ipa"),
            ("a/./b", RuleKind::Take, "a/b"),
            ("=.//./out/.//", RuleKind::Must, "out"),
            ("!./*.o", RuleKind::Exclude, "*.o"),
            (".", RuleKind::Take, "**"),
            ("=./", RuleKind::Must, "**"),
            ("==x", RuleKind::Must, "=x"),
            ("é/.hid", RuleKind::Take, "é/.hid"),
        ] {
            assert_eq!(ArtifactRule::parse(text), Ok(ArtifactRule { kind, glob: glob.to_owned() }), "{text}");
        }
    }

    #[test]
    fn what_no_worker_could_collect_by_is_refused() {
        let deep = ["d"; limits::PATH_DEPTH_MAX + 1].join("/");
        let nested = "{{{{{{{{{{a/".repeat(30) + "a" + &"}}}}}}}}}}/".repeat(30);
        for (text, why) in [
            ("", "is empty"),
            ("=", "is empty"),
            (&"x/".repeat(600), "longer than 1024 bytes"),
            ("/etc", "leaves the workspace"),
            ("a/../b", "leaves the workspace"),
            ("!..", "leaves the workspace"),
            ("a\nb", "control character"),
            ("a[", "is no glob: unclosed character class"),
            ("{a", "is no glob"),
            ("a\\", "is no glob: dangling"),
            (&deep, "deeper than 64"),
            (&"n".repeat(256), "longer than 255"),
            (&nested[..200], "is no glob: unclosed"),
            (&nested, "more than 64 `{`; several rules"),
        ] {
            let said = ArtifactRule::parse(text).unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
        let unread = ArtifactRule { kind: RuleKind::Take, glob: nested.trim_end_matches('/').to_owned() };
        assert!(unread.compile().unwrap_err().contains("is no glob"), "and it is no panic");
    }

    #[test]
    fn whatever_is_taken_compiles() {
        // Each brace is a group, a choice and a sequence.
        let (opens, closes) = ("x{a*,".repeat(16), "[!b]}?".repeat(16));
        let nested = [[&opens[..]; 4], [&closes[..]; 4]].concat().join("/");
        assert_eq!(nested.matches('{').count(), limits::RULE_BRACES_MAX);
        let parts = ["a", "?", "*", "**", "[!a-y]", "[é-ü]", "é", "\\*", "."];
        let long = parts.map(|part| [&part.repeat(250 / part.len())[..]; 4].join("/"));
        let deep = parts.map(|part| [part; limits::PATH_DEPTH_MAX / 2].join("/**/"));
        let braces = ["{a,b*}"; limits::RULE_BRACES_MAX].join("/");
        for text in long.into_iter().chain(deep).chain([nested, braces]) {
            let rule = ArtifactRule::parse(&text).unwrap_or_else(|why| panic!("{text} {why}"));
            assert_eq!(rule.compile().map(drop), Ok(()), "{text}");
        }
    }

    /// A plain number generator, the same in every run.
    struct Dice(u64);

    impl Dice {
        fn pick<'a>(&mut self, all: &[&'a str]) -> &'a str {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            all[(self.0 >> 33) as usize % all.len()]
        }
        fn text(&mut self, all: &[&str], most: usize) -> String {
            let words = (0..most).map(|_| self.pick(all)).collect::<Vec<_>>();
            words.concat()
        }
    }

    #[test]
    fn a_rule_matches_what_its_glob_matches_and_all_below_that() {
        let mut dice = Dice(7);
        let mut hits = [0, 0];
        for _ in 0..400 {
            let text =
                dice.text(&["a", "b", "a.o", "/", "/", "*", "**", "?", "{a,b}", "{a/b,*}", "[!a]", "/**/", ""], 5);
            let Ok(rule) = ArtifactRule::parse(&text) else { continue };
            let globs = rule.compile().unwrap();
            let own = read(&rule.glob).unwrap().compile_matcher();
            for _ in 0..100 {
                let path = dice.text(&["a", "b", "a.o", "/", "/", "c", ""], 6);
                if check_path(&path).is_err() {
                    continue;
                }
                let above = path.match_indices('/').map(|(at, _)| &path[..at]);
                let expected = above.chain([&path[..]]).any(|path| own.is_match(path));
                assert_eq!(globs.is_match(&path), expected, "{} {path}", rule.glob);
                hits[usize::from(expected)] += 1;
            }
        }
        assert!(hits.iter().all(|count| *count > 500), "{hits:?}");
    }
}
